"""tinyworld: an invented world with known truth, its data in the schemas of the real sets, and a model trained on it.

`python -m compositions.tinyworld --help` makes it again.
"""
