"""Gates: judge measurements by rules."""
