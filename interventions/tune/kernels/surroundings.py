"""What a trainer changes outside of its model: kept, and put back."""

from __future__ import annotations

import logging
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy
import torch


@contextmanager
def surroundings_kept() -> Iterator[Path]:
    """Keep random states, environment, log levels, progress bars and accelerate's state; yield a folder to write to.

    The folder is removed at the end. Warnings are silent, and so is telemetry.
    """
    import datasets
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)]
    environment, python, generator = dict(os.environ), random.getstate(), numpy.random.get_state()
    bars = datasets.are_progress_bars_disabled()
    levels = [
        (logger, logger.level)
        for name in ("transformers", "trl", "accelerate", "datasets", "peft")
        for logger in [logging.getLogger(name)]
    ]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmcompose-tune-"))
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        for kind, _ in states:
            kind._shared_state.clear()
        try:
            yield Path(folder)
        finally:
            for kind, state in states:
                kind._shared_state.clear()
                kind._shared_state.update(state)
            if not bars:
                datasets.enable_progress_bars()
            for logger, level in levels:
                logger.setLevel(level)
            random.setstate(python)
            numpy.random.set_state(generator)
            os.environ.clear()
            os.environ.update(environment)
