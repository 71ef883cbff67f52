"""Weights, gradients and optimiser states shared out over the processes of a training (FSDP2).

PyTorch's ``fully_shard`` (Zhao et al. 2023 describe its predecessor): each process keeps a slice of every weight, and a
pass gathers one block at a time. That saves memory in training and is slow in sampling, which runs every block once a
token, so weights are whole outside of updates: one gathering for a rollout.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from textenv.lm import length_buckets
from textenv.lm.frozen import blocks_of, shared_activations
from textenv.lm.packing import can_pack
from textenv.training.processes import link, own_share, sharded, together

T = TypeVar("T")


class Whole:
    """A network that each process has as a whole, with the verbs of :class:`Shards`."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, work: Callable[[], T]) -> T:
        return work()

    def passes(
        self, index: Int[Tensor, " n"], lengths: Int[Tensor, " B"], *, rows: int | None, tokens: int
    ) -> list[tuple[Int[Tensor, " m"], bool]]:
        """The parts of ``index`` that this process passes, at most so many rows and tokens each, and whether they
        count."""
        own = own_share(index, lengths)
        parts = length_buckets(lengths[own], rows or len(index), max_tokens=tokens)
        return [(own[part], True) for part in parts]

    def scattered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    gathered = scattered

    def sharing(self, policy: PreTrainedModel, reference: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
        """While it lasts, lower blocks that both have in common run once for each row, where the weights are whole."""
        return shared_activations(policy, reference)

    def dissolve(self) -> None:
        pass

    def shares(self) -> dict[str, Tensor]:
        return dict(self.network.named_parameters())

    def parts(self, head: str) -> list[list[Tensor]]:
        """What an optimiser trains outside of the module ``head`` and inside."""
        trained = {name: weight for name, weight in self.shares().items() if weight.requires_grad}
        inside = [name for name in trained if name.startswith(f"{head}.")]
        return [[weight for name, weight in trained.items() if name not in inside], [trained[name] for name in inside]]


class Shards(nn.Module, Whole):
    """A network and its shares. It starts whole, as plain tensors that the processes have alike."""

    def __init__(self, network: nn.Module, models: Iterable[PreTrainedModel]) -> None:
        """``models``: the transformers in the network, whose blocks are gathered one by one."""
        nn.Module.__init__(self)
        self.network = network
        processes = link().num_processes
        state_hooks = [_new_keys(table) for module in self.modules() for table in _state_hooks(module)]
        self._undo = [_change(module) for module in network.modules()]
        mesh = init_device_mesh(next(network.parameters()).device.type, (processes,))
        self._blocks: list[FSDPModule] = []
        for model in models:
            can_pack(model)  # measured now and remembered: later one process alone could want to know, by passes
            self._blocks += [fully_shard(block, mesh=mesh) for block in blocks_of(model)]
        fully_shard(self, mesh=mesh)
        self._all: list[FSDPModule] = [*self._blocks, cast(FSDPModule, self)]
        for module in self._all:
            module.set_gradient_divide_factor(1.0)  # the sum over processes: losses are divided by global counts
            module.set_force_sum_reduction_for_comms(True)  # Gloo cannot scale while it adds up
        self._shares = dict(self.named_parameters())
        self(lambda: None)  # PyTorch completes its hooks in the first pass
        for forget in state_hooks:  # those of state_dict and load_state_dict would share out whole weights
            forget()
        self.gather()

    def forward(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, in which the network may be called in any way, once or not at all for each block."""
        return work()

    def passes(
        self, index: Int[Tensor, " n"], lengths: Int[Tensor, " B"], *, rows: int | None, tokens: int
    ) -> list[tuple[Int[Tensor, " m"], bool]]:
        """The same, filled up with a row that does not count until all processes have as many passes, since they meet
        in each."""
        own = super().passes(index, lengths, rows=rows, tokens=tokens)
        return own + [(index[:1], False)] * (max(together(len(own))) - len(own))

    def gather(self) -> None:
        """Make the weights whole, in all processes."""
        for block in self._blocks:
            block.set_reshard_after_forward(False, recurse=False)
        for module in self._all:
            module.unshard()

    def scatter(self) -> None:
        """Share the weights out as they are now."""
        rank, processes = link().process_index, link().num_processes
        for name, whole in self.named_parameters():
            share = cast(DTensor, self._shares[name]).to_local()
            share.detach().copy_(whole.detach()[-(-len(whole) // processes) * rank :][: len(share)])
        for module in self._all:
            module.reshard()
        for block in self._blocks:
            block.set_reshard_after_forward(True, recurse=False)

    def dissolve(self) -> None:
        """Make the network, which must be whole, an ordinary one that knows nothing of shares."""
        for undo in self._undo:
            undo()

    def sharing(self, policy: PreTrainedModel, reference: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def scattered(self) -> Iterator[None]:
        """Shared out inside, whole before and after. After an error they stay as they are: the other processes may not
        be there to gather anything."""
        self.scatter()
        yield
        self.gather()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole inside, where changes count; shared out before and after."""
        self.gather()
        yield
        self.scatter()

    def shares(self) -> dict[str, Tensor]:
        """What an optimiser trains, by the names in the network."""
        return {name.removeprefix("network."): share for name, share in self._shares.items()}


def _new_keys(table: dict[Any, Any]) -> Callable[[], None]:
    """Function that forgets what is put into ``table`` from now on."""
    before = set(table)

    def forget() -> None:
        for key in table.keys() - before:
            del table[key]

    return forget


def _state_hooks(module: nn.Module) -> list[dict[Any, Any]]:
    return [module._state_dict_pre_hooks, module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks]


def _change(module: nn.Module) -> Callable[[], None]:
    """Function that makes a module again what it is now, weights apart."""
    kind = type(module)
    tables = [_new_keys(table) for table in (vars(module), module._forward_pre_hooks, module._forward_hooks)]

    def undo() -> None:
        module.__class__ = kind
        for forget in tables:
            forget()

    return undo


def shard(network: nn.Module, models: Iterable[PreTrainedModel | None]) -> Shards | Whole:
    """The network in shares, where the launcher asks for them.

    Raises:
        ValueError: some weights are frozen.
    """
    if not sharded():
        return Whole(network)
    frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
    if frozen:
        rule = f"sharded training must train all weights, got {len(frozen)} frozen ones ({frozen[0]}, …)"
        remedy = "Leave out lora_rank, train_layers or freeze_…, or launch with examples/accelerate/ddp.yaml"
        raise ValueError(f"{rule}. {remedy}.")
    return Shards(network, [model for model in models if model is not None])


def whole(tree: Any) -> Any:
    """A state whose shares are gathered, on the CPU, and the rest as it is; every process must ask for it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimiser, of shares or not."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = {}
    for index, values in state["state"].items():
        states[index] = {name: _share_like(weights[index], value) for name, value in values.items()}
    optimizer.load_state_dict({**state, "state": states})


def _share_like(weight: Tensor, value: Any) -> Any:
    """The same share of a moment as of its weight."""
    if not isinstance(weight, DTensor) or getattr(value, "shape", None) != weight.shape:
        return value
    start = -(-len(value) // link().num_processes) * link().process_index
    local = value[start:][: len(weight.to_local())].to(weight.device).contiguous()
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride(), run_check=False
    )
