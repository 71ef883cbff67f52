"""Frozen models out of memory while others are trained: in the CPU's memory with a GPU, in a file on a CPU.

A reference and a reward model score responses; then they wait until the update is over. With a GPU their weights go to
the CPU meanwhile (OpenRLHF and verl call it offloading). On a CPU they lie in a temporary file that is mapped into
memory: the system reads it when a weight is used, and forgets what it has read when it is told to.
"""

import contextlib
import ctypes
import mmap
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage, nn


class Stay:
    """Models that stay where they are, with the verbs of :class:`Offload`."""

    def away(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def before_a_rollout(self) -> None:
        pass


class Offload:
    """The weights of some models, as they are: all that refer to one piece of memory do so afterwards."""

    def __init__(self, models: Iterable[nn.Module], *, keep: nn.Module) -> None:
        """Everything but what ``keep`` uses too. On a CPU, the weights move into a file in the folder for temporary
        files, which disappears with the process.

        Raises:
            ValueError: nothing is left, or this system cannot forget what it has read.
            OSError: the disk is full.
        """
        used = {_address(weight) for weight in keep.parameters()}
        found: dict[int, list[Tensor]] = defaultdict(list)
        for weight in {id(w): w for model in models for w in model.parameters()}.values():
            if weight.nbytes and _address(weight) not in used:
                found[_address(weight)].append(weight)
        if not found:
            rule = "offload_frozen must have weights to move, which the policy does not use, got none"
            raise ValueError(f"{rule}. Leave it out: with lora_rank the policy is trained on the reference's weights.")
        self._shared = list(found.values())
        self._file = self._mapped() if self._shared[0][0].device.type == "cpu" else None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Out of memory, or of the GPU's memory; on a CPU a weight that is used meanwhile is read again."""
        if self._file is not None:
            self._file.madvise(mmap.MADV_DONTNEED)
            yield
            return
        devices = [weights[0].device for weights in self._shared]
        for weights in self._shared:
            _move(weights, weights[0].untyped_storage().cpu())
        try:
            yield
        finally:
            for weights, device in zip(self._shared, devices, strict=True):
                _move(weights, weights[0].untyped_storage().to(device=device))

    def before_a_rollout(self) -> None:
        """Give the system what the allocator of glibc keeps after tensors are freed; with another one, do nothing."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def _mapped(self) -> mmap.mmap:
        """The file that holds all weights from now on."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise ValueError("offload_frozen needs Linux, macOS or a GPU, got none of them. Leave it out.")
        sizes = [weights[0].untyped_storage().nbytes() for weights in self._shared]
        total = sum(map(_aligned, sizes))
        try:
            with tempfile.TemporaryFile(prefix="textenv-") as file:
                for _ in range(0, total, _BLOCK):
                    file.write(bytes(_BLOCK))  # written, not left out: a full disk is an error here, and a crash later
                file.flush()
                mapped = mmap.mmap(file.fileno(), 0)
        except OSError as error:
            rule = f"offload_frozen must have {total / 1e9:.2f} GB in the folder for temporary files, got {error}"
            raise OSError(f"{rule}. Free space, let TMPDIR name another folder, or leave it out.") from error
        start = 0
        for weights, size in zip(self._shared, sizes, strict=True):
            storage = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start).untyped_storage()
            storage.copy_(weights[0].untyped_storage())
            _move(weights, storage)
            start += _aligned(size)
        mapped.flush()
        return mapped


_BLOCK = 2**20


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _address(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr()


def _move(weights: list[Tensor], storage: UntypedStorage) -> None:
    """Let all weights of one storage refer to another one with the same contents."""
    for weight in weights:
        empty = torch.empty(0, dtype=weight.dtype, device=storage.device)
        weight.data = empty.set_(storage, weight.storage_offset(), weight.shape, weight.stride())
