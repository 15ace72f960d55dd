"""Several workers or machines: which of them does what, and on which GPU."""
