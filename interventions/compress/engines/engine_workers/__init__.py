"""Drivers of the engines: each runs in the engine's process, with the engine's interpreter.

They import nothing of this project but their siblings: all they know is in the job's folder.
"""
