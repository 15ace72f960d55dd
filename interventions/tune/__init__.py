"""Interventions of the category `tune`."""
