"""Interventions of the category `edit`."""
