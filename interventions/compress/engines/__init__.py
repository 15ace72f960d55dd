"""Upstream implementations of the compression methods: `awq[engine=autoawq]`.

Each engine runs in its own process, optionally with its own interpreter. The weights and the calibration
tokens are passed as safetensors files. The engine returns de-quantised weights.
"""
