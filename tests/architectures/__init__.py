"""Every architecture of transformers as a tiny model, and whether all methods and evaluators work on it."""
