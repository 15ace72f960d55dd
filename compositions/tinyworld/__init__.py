"""tinyworld: an invented world, its data in the schemas of real datasets, and a model trained on it.

`python -m compositions.tinyworld --help` shows how to generate all of it again.
"""
