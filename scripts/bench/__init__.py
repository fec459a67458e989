"""How fast it is: one module per benchmark, and what they share in `timing`."""
