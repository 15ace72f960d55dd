"""The data of a run: records in the schemas of the real data sets, and what is drawn from them."""
