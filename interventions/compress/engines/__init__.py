"""Upstream implementations of the compression methods, as a choice: `awq[engine=autoawq]`.

Each engine runs in a process, and if need be with an interpreter, of its own; the state and the
calibration tokens travel as safetensors. What comes back is ordinary, de-quantised weights.
"""
