"""Evaluation logs of other tools: read their samples, pair two logs, judge the later one. Imports no torch."""
