"""Processes that were launched for sharded training (FSDP2), in tests."""

import os

from tests.processes import results
from textenv.training.processes import link, sharded


def in_shares(work, **environment):
    """``work()`` as a process does it that ``accelerate launch`` has started for FSDP2."""

    def launched():
        os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment})
        link.cache_clear()
        sharded.cache_clear()
        return work()

    return launched


def shared_out(work, count=2):
    """What ``work()`` returns in each of ``count`` such processes."""
    return results(in_shares(work), count)
