"""Training a policy in little memory: adapters on shared weights, fewer layers, recomputed activations."""

import copy
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from textenv import registry
from textenv.config import Loading
from textenv.lm import LanguageModel, load_language_model
from textenv.lm.adapters import adapter_base, adapters, add_adapters, shared_copy
from textenv.lm.frozen import blocks_of
from textenv.settings import Count, Positive, PositiveInt, check_settings
from textenv.task import Task
from textenv.training.memory.offload import Offload, Stay
from textenv.training.trainable import check_trainable


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How much of a policy is trained, and what is kept in memory for it; see docs/memory.md."""

    lora_rank: Count = 0
    """Rank of adapters on every linear layer of the trunk. They alone are trained, on the weights of the reference, so
    that there is one model in memory; 0 trains a copy of the reference."""
    lora_alpha: Positive | None = None
    """Adapters are scaled by lora_alpha / lora_rank. Higher moves the policy faster; None is twice the rank."""
    train_layers: PositiveInt | None = None
    """Train only so many blocks from the top and what follows them; embeddings, and an LM head that shares their
    weights, stay as they are. None trains all."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them: the same gradient."""
    adam_8bit: bool = False
    """Keep Adam's moments in 8 bits (bitsandbytes; needs CUDA)."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError(f"lora_alpha needs lora_rank, got {self.lora_alpha:g} alone. Give both, or neither.")


@dataclass(frozen=True, kw_only=True)
class PassConfig(MemoryConfig):
    """The same, and how much of a batch a learner has in memory at once."""

    rollout_slots: PositiveInt | None = None
    """Responses generated at once; None: all, or 256 by a server. Fewer save memory and take longer; the responses are
    the same."""
    micro_batch_size: PositiveInt | None = None
    """Episodes per forward pass; None takes the whole minibatch. Lower saves memory; the gradient is the same."""
    max_tokens_per_pass: PositiveInt = 16_384
    """Tokens per forward pass, prompts included; a longer episode has one to itself. Lower saves memory too."""
    offload_frozen: bool = False
    """Keep the reference and a reward model that is a network out of memory during updates: in the CPU's memory with a
    GPU, in a temporary file on a CPU."""

    @property
    def limits(self) -> dict[str, Any]:
        """Of a forward pass, as :meth:`textenv.training.memory.sharding.Whole.passes` takes them."""
        return {"rows": self.micro_batch_size, "tokens": self.max_tokens_per_pass}


def policy_to_train(config: MemoryConfig, task: Task, policy: LanguageModel | None = None) -> LanguageModel:
    """What a learner trains: ``policy`` or a copy of the task's reference, in float32; with ``lora_rank``, new adapters
    on the very weights of either.

    Raises:
        ValueError: the policy has other adapters or fewer layers than asked for, or has weights to train that are not
            in float32.
    """
    seed = getattr(config, "seed", 0)
    if config.lora_rank and (policy is None or not adapters(policy.model)):
        name = task.config.reference if policy is None else policy.name
        policy = _with_adapters(policy or task.reference, name, config, seed)
    elif policy is None:
        policy = registry.fresh_language_model(task.config.reference, **_where(task))
    return _restricted(policy, config)


def named_policy(config: MemoryConfig, name: str, loading: Loading, seed: int) -> LanguageModel:
    """What is trained where there is no task: a float32 copy of the model behind ``name``; with ``lora_rank``, new
    adapters (``seed``) on the weights of the one that is shared, as ``loading`` says. Raises as
    :func:`policy_to_train`."""
    if config.lora_rank:
        policy = _with_adapters(registry.language_model(name, *loading), name, config, seed)
    else:
        policy = registry.fresh_language_model(name)
    return _restricted(policy, config)


class Trunk(NamedTuple):
    """A network whose hidden states a value function reads."""

    model: PreTrainedModel
    hidden_size: int


Network = TypeVar("Network", LanguageModel, Trunk)


def critic_to_train(config: MemoryConfig, task: Task, place: str) -> LanguageModel | Trunk | None:
    """What a value function reads at ``place``: None (the policy), with "trunk" another copy of the reference, with
    "reward-model" one of the reward model's trunk (Ouyang et al. 2022); with ``lora_rank``, adapters on either.

    Raises:
        ValueError: the reward model is no decoder with the tokens of the policy; or see :func:`policy_to_train`.
    """
    if place == "trunk":
        return policy_to_train(config, task)
    if place != "reward-model":
        return None
    found: Any = registry.reward_model(task.config.reward_model, *task.config.loading)
    rule = "value_function='reward-model' needs a reward model that is a decoder with the tokens of the policy"
    remedy = "Use value_function='trunk'"
    if not (getattr(found, "is_decoder", False) and isinstance(getattr(found, "model", None), PreTrainedModel)):
        called = getattr(found, "__name__", type(found).__name__)
        raise ValueError(f"{rule}, got {called}. {remedy}.")
    if not task.reference.tokenizer.get_vocab().items() <= found.tokenizer.get_vocab().items():
        raise ValueError(f"{rule}, got {found.name!r}, which has others. {remedy}.")
    if found.max_tokens is not None and found.max_tokens < task.width:
        raise ValueError(f"{rule} and reads {task.width} of them, got one of {found.max_tokens}. {remedy}.")
    trunk = found.model.base_model
    if config.lora_rank:
        trunk = _adapted(trunk, config, getattr(config, "seed", 0))
    else:
        trunk = copy.deepcopy(trunk).float().requires_grad_()
    return _restricted(Trunk(trunk, found.model.score.in_features), config)


def frozen_to_offload(config: PassConfig, task: Task, policy: nn.Module) -> Offload | Stay:
    """The models that score responses, out of memory during updates if ``config`` says so.

    Raises:
        ValueError, OSError: see :class:`textenv.training.memory.offload.Offload`.
    """
    if not config.offload_frozen:
        return Stay()
    scoring: Any = registry.reward_model(task.config.reward_model, *task.config.loading)
    models = (task.reference.model, getattr(scoring, "model", None))
    return Offload([model for model in models if isinstance(model, nn.Module)], keep=policy)


def saved_policy(folder: str | Path, task: Task) -> LanguageModel:
    """The policy that a learner saved in ``folder``; an adapter shares the weights of the task's reference or of the
    model that it names."""
    base = adapter_base(folder)
    if base is None:
        return load_language_model(folder, **_where(task))
    if base == registry.portable_name(task.config.reference):
        return load_language_model(folder, base=task.reference)
    return registry.fresh_language_model(str(folder), *task.config.loading)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of each block in passes with gradient, and compute the rest again in the backward pass.

    Raises:
        ValueError: the model does not support it.
    """
    # Deprecated under its old name, and not there yet under its new one in transformers 5.0.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.base_model.register_forward_pre_hook(_recompute_with_gradient)


def _recompute_with_gradient(trunk: nn.Module, arguments: Any) -> None:
    """transformers recomputes in blocks that are in training mode, and takes their cache away: not in sampling."""
    for module in trunk.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = torch.is_grad_enabled()


def _where(task: Task) -> dict[str, Any]:
    """How a model with weights to train is loaded: in float32, whatever the task's dtype."""
    return {"device": task.config.device, "attn_implementation": task.config.attn_implementation}


def _adapted(model: PreTrainedModel, config: MemoryConfig, seed: int) -> PreTrainedModel:
    """New adapters on the weights of a model; an LM head gets none."""
    model = shared_copy(model)
    alpha, head = config.lora_alpha or 2.0 * config.lora_rank, model.get_output_embeddings()
    add_adapters(model, rank=config.lora_rank, alpha=alpha, seed=seed, leave=head)
    return model


def _with_adapters(base: LanguageModel, name: str, config: MemoryConfig, seed: int) -> LanguageModel:
    model = _adapted(base.model, config, seed)
    for adapter in adapters(model).values():
        adapter.task_type, adapter.base_model_name_or_path = "CAUSAL_LM", registry.portable_name(name)
    return dataclasses.replace(base, model=model)


def _restricted(policy: Network, config: MemoryConfig) -> Network:
    """The same network, with no more to train than ``config`` says."""
    found = {getattr(adapter, "r", 0) for adapter in adapters(policy.model).values()}
    if config.lora_rank and found != {config.lora_rank}:
        rule = f"lora_rank must be 0 or the rank of the policy's own adapters ({', '.join(map(str, found))})"
        raise ValueError(f"{rule}, got {config.lora_rank}. Leave it out.")
    if config.train_layers is not None:
        _freeze_below(policy.model, config.train_layers)
    check_trainable(policy.model)
    if config.gradient_checkpointing:
        recompute_activations(policy.model)
    return policy


def _freeze_below(model: PreTrainedModel, layers: int) -> None:
    """Freeze all embeddings and all blocks but the ``layers`` last ones."""
    blocks = blocks_of(model)
    if layers > len(blocks):
        raise ValueError(
            f"train_layers must be {len(blocks)} or less, the blocks of the model, got {layers}. Lower it."
        )
    for frozen in [*blocks[: len(blocks) - layers], *(m for m in model.modules() if isinstance(m, nn.Embedding))]:
        frozen.requires_grad_(False)


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process so far, 10⁶ bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
