"""Interventions of the category `steer`."""
