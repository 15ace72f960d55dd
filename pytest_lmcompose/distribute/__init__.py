"""Distribute a run over workers, machines and GPUs."""
