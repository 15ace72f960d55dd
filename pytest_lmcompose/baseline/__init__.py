"""Stored runs: save them, compare with them, and detect drift."""
