"""Interventions of the category `unlearn`."""
