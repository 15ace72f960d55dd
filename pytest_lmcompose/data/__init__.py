"""The data of a run: read from files in the schemas of the original datasets, and sampled."""
