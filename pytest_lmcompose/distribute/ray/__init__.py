"""Runs on a Ray cluster. Imported only with --lmcompose-engine=ray.

parts.py    divides the plan into parts
engine.py   controller: sends parts to the cluster, receives test reports
work.py     node: runs a part in a separate process
inside.py   that process: a pytest plugin that runs only the part's tests
"""
