"""The model: loaded, changed step by step, and brought back."""
