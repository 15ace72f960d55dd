"""The suite: test modules, recipes under conf/, thresholds, and the embedded world."""
