"""Several processes of one training, forked from the test: what ``accelerate launch`` starts, without its imports."""

import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.state import AcceleratorState
from tqdm.std import tqdm

from textenv.training.processes import link


def in_processes(work, count=2, seconds=60):
    """``(results, errors)``: what ``work()`` returns, or the text of what it raises, in each of ``count`` processes."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests; the children use none
        children = []
        for rank in range(count):
            children.append(os.fork())
            if children[-1] == 0:
                _child(work, rank, count, Path(folder))
        end = time.monotonic() + seconds
        running = set(children)
        while running and time.monotonic() < end:
            running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
            time.sleep(0.01)
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert not running, f"{len(running)} of {count} processes still ran after {seconds} seconds"
        outcomes = [Path(folder) / f"{rank}.pickle" for rank in range(count)]
        found = [pickle.loads(path.read_bytes()) if path.exists() else (None, "killed") for path in outcomes]
    return [result for result, _ in found], [error for _, error in found]


def results(work, count=2):
    """What ``work()`` returns in each process; none of them may fail."""
    found, errors = in_processes(work, count)
    assert not any(errors), "\n".join(filter(None, errors))
    return found


def own_progress_bars():
    """A lock of this process for its progress bars: the usual one is shared, and a killed child keeps it for ever."""
    kinds = [tqdm]
    for kind in kinds:  # each may have made a lock of its own
        kind.set_lock(threading.RLock())
        kinds += kind.__subclasses__()


def _child(work, rank, count, folder):
    result = error = None
    try:
        own_progress_bars()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        AcceleratorState._reset_state(True)
        link.cache_clear()
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        result = work()
    except BaseException:
        error = traceback.format_exc()
    finally:
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps((result, error)))
        os._exit(0)
