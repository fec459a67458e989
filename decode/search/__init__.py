"""Search: several hypotheses of a text go on together, and a strategy chooses among them."""
