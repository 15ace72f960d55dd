"""Load the model, and build its states step by step."""
