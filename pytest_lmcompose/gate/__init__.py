"""Rules on measurements, and their verdicts."""
