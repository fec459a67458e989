"""How text is generated: jitted decoding loops, their components, and the notebook API."""
