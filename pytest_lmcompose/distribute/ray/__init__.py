"""Runs on a Ray cluster. Imported only with --lmcompose-engine=ray.

parts.py    which tests go together, and which state each part starts from
engine.py   in the controller: sends the parts out, and takes the tests' reports in
work.py     on a node: runs a part in a process of its own
inside.py   in that process: a plugin of pytest that runs the part's tests alone
"""
