"""Read checkpoints of all kinds as full-precision weights."""
