"""Interventions of the category `compress`."""
