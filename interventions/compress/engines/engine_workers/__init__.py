"""Drivers of the engines: each runs in the engine's process, with the engine's interpreter.

They import only each other; all their input is in the job's folder.
"""
