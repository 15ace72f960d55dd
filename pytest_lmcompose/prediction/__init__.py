"""Predict from the states of single steps which order of two steps is better; see docs/prediction.md."""
