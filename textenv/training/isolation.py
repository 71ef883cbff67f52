"""Keep global state (random generators, transformers' logging) as it was."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from transformers.utils import logging as hf_logging


@contextlib.contextmanager
def untouched_globals() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's global random states and transformers' log level; hide its bars inside."""
    python, numpy, level = random.getstate(), np.random.get_state(), hf_logging.get_verbosity()  # noqa: NPY002
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
