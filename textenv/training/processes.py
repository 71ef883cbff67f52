"""Several processes of one training (``accelerate launch``), data parallel: who does what, and how results meet.

Supervised training wraps its loss in Accelerate's DDP. Learners do not: they call a policy in several ways (to sample,
for log-probabilities, for values), and the wrapper sees one ``forward`` alone. Instead every process of a learner holds
all weights, plays the slots of its own environment, and then knows the whole batch, so that whatever is computed from a
batch is global by itself. Each computes the gradient of its share of a minibatch, divided by the counts of the whole
one; the sum over processes is the gradient of one process. In one process all functions here do nothing. Weights in
shares: :mod:`textenv.training.memory.sharding`.

All processes must call them alike. What they exchange is pickled, which is safe between the processes of one run.
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Int
from torch import Tensor, nn

T = TypeVar("T")
_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@functools.cache
def link() -> Accelerator:
    """What links the processes of this run; without CUDA they compute on the CPU.

    Sharding is ours (:mod:`textenv.training.memory.sharding`), so Accelerate is not told of it.

    Raises:
        ValueError: the launcher asks for another kind of training than DDP or FSDP2.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        rule = "several processes must be launched as DDP or FSDP2, got DeepSpeed"
        raise ValueError(f"{rule}. Its stage 3 is what FSDP2 does: launch with examples/accelerate/fsdp2.yaml.")
    sharded()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or each would believe that it is alone
    accelerator = Accelerator(device_placement=False)
    if accelerator.num_processes < launched or accelerator.distributed_type not in _DATA_PARALLEL:
        found = f"{accelerator.num_processes} of {launched} by {accelerator.distributed_type.value}"
        raise ValueError(f"all launched processes must find each other, on CUDA or the CPU, got {found}. Use those.")
    return accelerator


@functools.cache
def sharded() -> bool:
    """Whether the launcher asks for weights that are shared out over the processes.

    Raises:
        ValueError: in a way that is not ours.
    """
    if not _asked("ACCELERATE_USE_FSDP"):
        return False
    ours = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}
    for name, value in {**ours, "ACCELERATE_MIXED_PRECISION": "no"}.items():
        found = os.environ.get(name, value).lower()
        if found != value:
            rule = f"{name.lower()} must be {value}, got {found}"
            remedy = "offload_frozen, gradient_checkpointing and the environment's dtype are settings of the training"
            raise ValueError(f"{rule}. Launch with examples/accelerate/fsdp2.yaml; {remedy}.")
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _asked(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() in ("true", "1")


def leave() -> None:
    """Leave the other processes when all is done: one that ends without can abort in a thread of its connections."""
    link().end_training()


def is_main() -> bool:
    """Whether this process writes files and talks to the terminal."""
    return link().is_main_process


def together(value: T) -> list[T]:
    """What each process gives, in their order, in every process."""
    found: list = [None] * link().num_processes
    if len(found) == 1:
        return [value]
    torch.distributed.all_gather_object(found, value)
    return found


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(together(flag))


def on_main(work: Callable[[], T]) -> T:
    """What ``work`` returns or raises in the main process, which alone does it, in every process."""
    if link().num_processes == 1:
        return work()
    result: T | None = None
    error = None
    if is_main():
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, error = together((result, error))[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _device() -> torch.device:
    """Where this process computes; Accelerate numbers even the CPU."""
    device = link().device
    return torch.device("cpu") if device.type == "cpu" else device


def own_device(asked: str | None) -> str | None:
    """The device of this process: the launcher's if there are several processes.

    Raises:
        ValueError: another kind was asked for.
    """
    if link().num_processes == 1:
        return asked
    device = _device()
    if asked is not None and torch.device(asked).type != device.type:
        rule = f"device must be left to the launcher, which gives each process one ({device})"
        raise ValueError(f"{rule}, got {asked!r}. Leave it out; ACCELERATE_USE_CPU=true puts all on the CPU.")
    return str(device)


def own_seed(seed: int, slots: int) -> int:
    """The seed of the first of so many ``slots`` of this process: slot i of all processes has ``seed + i``."""
    return seed + link().process_index * slots


def rounds_of(episodes: int, slots: int) -> int:
    """How often the processes, with so many ``slots`` each, play to make a batch.

    Raises:
        ValueError: no whole number of times.
    """
    processes = link().num_processes
    if episodes % (slots * processes):
        rule = f"batch_size must be a multiple of the environment's num_envs, got {episodes} and {slots}"
        raise ValueError(f"{rule}{f' in each of {processes} processes' if processes > 1 else ''}. Change one.")
    return episodes // (slots * processes)


def check_groups(num_envs: int, group_size: int) -> None:
    """Refuse slots that groups do not fill."""
    if num_envs % group_size:
        rule = f"num_envs must be a multiple of group_size, got {num_envs} and {group_size}"
        raise ValueError(f"{rule}. Change one.")


def own_slots(slots: int) -> int:
    """The number of slots of this process.

    Raises:
        ValueError: the processes cannot share them equally.
    """
    processes = link().num_processes
    if slots % processes:
        raise ValueError(f"num_envs must be a multiple of the {processes} processes, got {slots}. Change it.")
    return slots // processes


def own_part(items: list[T]) -> list[T]:
    """The part of this process in a list that all parts make up."""
    size = len(items) // link().num_processes
    return items[link().process_index * size :][:size]


def own_share(index: Int[Tensor, " n"], lengths: Int[Tensor, " B"]) -> Int[Tensor, " m"]:
    """The rows of ``index`` whose gradient this process computes: about as many tokens as each other process."""
    if link().num_processes == 1:
        return index
    return index[lengths[index].argsort(stable=True)][link().process_index :: link().num_processes]


def own_generator(shared: torch.Generator) -> torch.Generator:
    """The generator that this process samples with, seeded by the ``shared`` one, which stays the same in all."""
    if link().num_processes == 1:
        return shared
    shared.set_state(together(shared.get_state())[0])
    seed = int(torch.randint(2**62, (), generator=shared))
    return torch.Generator().manual_seed(seed + link().process_index)


def same_weights(model: nn.Module) -> None:
    """Give a model of every process the weights that it has in the main one.

    Raises:
        ValueError: it is not on the device of its process.
    """
    if link().num_processes == 1:
        return
    device, own = next(model.parameters()).device, _device()
    if device != own:
        rule = f"the environment's device must be that of its process, {str(own)!r}"
        raise ValueError(f"{rule}, got {str(device)!r}. Make it with that device.")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                torch.distributed.broadcast(weight, 0)


def sum_gradients(weights: Iterable[Tensor]) -> None:
    """Add up the gradients of the processes; a weight that has none in any of them keeps none. Those of shares are
    added up as they are made."""
    if link().num_processes > 1 and not sharded():
        weights = list(weights)
        having = together([weight.grad is not None for weight in weights])
        for weight, *found in zip(weights, *having, strict=True):
            if any(found):
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                torch.distributed.all_reduce(weight.grad)
