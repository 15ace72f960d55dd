"""Interventions of the category `checkpoint`."""
