"""Small networks trained beside a model: filters and draft heads, one file each."""
