"""Interventions of the category `merge`."""
