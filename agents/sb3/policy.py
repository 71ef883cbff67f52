"""A Hugging Face causal language model as a Stable-Baselines3 policy.

Stable-Baselines3 gives the policy two spaces, and gives the environment a batch of actions; nothing else passes between
them. Therefore

* the action space (:class:`TokenSpace`) tells the policy the name of the reference and the rule for drawing tokens;
* the policy leaves its last :class:`Decision` where the environment (:class:`agents.sb3.TextVecEnv`) finds it. The
  environment takes it if it is about the observation that it gave and the actions that it received. Neither holds the
  other, so wrappers, ``set_env``, ``load`` and ``evaluate_policy`` work unchanged, and pickles contain none of it.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Int
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from textenv.config import Loading
from textenv.episode import observation_tokens
from textenv.lm import LanguageModel, Responses, ScalarHead, TokenRule, rows
from textenv.lm.adapters import adapters
from textenv.lm.decoding import decodes_with_cache
from textenv.lm.prefix import PrefixCache, prefix_outputs
from textenv.task import Task
from textenv.training.memory import MemoryConfig, named_policy
from textenv.training.trainable import trainable_weights

EXACT_FLOATS = 2**24
"""Stable-Baselines3 passes actions through float32, which is exact up to this number."""

MEMORY_OPTIONS = ("lora_rank", "lora_alpha", "train_layers", "gradient_checkpointing")
"""Settings of :class:`textenv.training.memory.MemoryConfig` that a policy takes."""


class TokenSpace(spaces.Discrete):
    """``Discrete(V)`` that also tells a policy how a text environment draws tokens. Equal to any ``Discrete(V)``."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.reference.vocab_size)
        self.reference = task.config.reference
        self.loading = task.config.loading
        self.rule = task.rule
        self.prompt_width = task.prompt_width


class Decision(NamedTuple):
    """The last decision of a policy."""

    observation: PyTorchObs
    actions: Int[Tensor, " N"]
    logprobs: Float[Tensor, " N"]
    """Log-probabilities of the actions, under the distribution that they were drawn from."""
    rule: TokenRule


_last = threading.local()


def take_decision(observation: Any, actions: Int[np.ndarray, " N"]) -> Decision | None:
    """The last decision of this thread if it took these actions on this observation, else None; given out once."""
    decision: Decision | None = getattr(_last, "decision", None)
    if decision is None or not np.array_equal(decision.actions.cpu().numpy(), actions):
        return None
    if isinstance(observation, dict) != isinstance(decision.observation, dict):
        return None
    seen = decision.observation if isinstance(decision.observation, dict) else {"": decision.observation}
    given = observation if isinstance(observation, dict) else {"": observation}
    if seen.keys() != given.keys() or any(not np.array_equal(seen[key].cpu().numpy(), given[key]) for key in given):
        return None
    _last.decision = None
    return decision


class CausalLMPolicy(ActorCriticPolicy):
    """A causal language model that draws the next token, with a value head on its last hidden state.

    ``policy_kwargs``: ``model`` (registered name, folder or hub id; default: the environment's reference), ``rule`` and
    ``prompt_width`` (default: the environment's, see :class:`TokenSpace`), ``use_cache`` (keys and values are kept
    between the steps of a rollout), ``lora_rank``, ``lora_alpha``, ``train_layers`` and ``gradient_checkpointing`` (see
    :class:`textenv.training.memory.MemoryConfig`), ``optimizer_class``, ``optimizer_kwargs``.

    The policy trains its own copy of the model, which is found by name when an agent is loaded: a saved agent holds
    weights, not the module. With ``lora_rank`` it trains adapters on the weights of the environment's reference, and a
    saved agent holds what is trained alone. Dropout is off. Observations of both modes are read as integers; no
    features are extracted.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        *,
        model: str | None = None,
        rule: TokenRule | None = None,
        prompt_width: int | None = None,
        use_cache: bool = True,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        train_layers: int | None = None,
        gradient_checkpointing: bool = False,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde must be off, since tokens are discrete, got True. Leave it out.")
        if optimizer_kwargs is None:
            optimizer_kwargs = {"eps": 1e-5} if issubclass(optimizer_class, torch.optim.Adam) else {}
        # Past ActorCriticPolicy's own constructor, which would build a perceptron on float features.
        BasePolicy.__init__(
            self, observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        told = action_space if isinstance(action_space, TokenSpace) else None
        self.model_name = _given("model", model, told and told.reference)
        self.rule: TokenRule = _given("rule", rule, told and told.rule)
        self.prompt_width: int = _given("prompt_width", prompt_width, told and told.prompt_width)
        self.use_cache = use_cache
        self.memory = MemoryConfig(
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            train_layers=train_layers,
            gradient_checkpointing=gradient_checkpointing,
        )
        # Stable-Baselines3 has seeded the global generator, from which its own policies draw their weights too.
        seed = int(torch.randint(2**31, ())) if lora_rank else 0
        self._trained = named_policy(self.memory, self.model_name, told.loading if told else Loading(), seed)
        _check_vocabulary(self.model_name, self._trained.vocab_size, int(action_space.n))
        self.model = self._trained.model
        self.value_head = ScalarHead(self._trained.hidden_size)
        self._cache = PrefixCache()
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_class(trained, lr=lr_schedule(1), **optimizer_kwargs)  # type: ignore[call-arg]
        # The cache sees most changes of weights itself, but not those of fused optimisers.
        self.optimizer.register_step_post_hook(lambda *_: self._cache.forget())

    @property
    def language_model(self) -> LanguageModel:
        """The model that is trained: ``save_pretrained(folder)`` writes it (adapters alone, where it has some), and
        ``merged()`` is a plain copy."""
        return replace(self._trained, model=self.model)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All weights; with adapters only what is trained, since the others are shared."""
        weights = super().state_dict(*args, **kwargs)
        return {name: weights[name] for name in trainable_weights(self)} if adapters(self.model) else weights

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """ValueError: the policy has adapters, and the weights are not exactly those that it trains."""
        if not adapters(self.model):
            return super().load_state_dict(state_dict, strict, assign)
        if other := state_dict.keys() ^ trainable_weights(self).keys():
            rule = "weights to load must be those that a policy with adapters trains"
            raise ValueError(
                f"{rule}, got {sorted(other)[0]} on one side only. Use the policy_kwargs of the saved agent."
            )
        return super().load_state_dict(state_dict, strict=False)

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[Int[Tensor, " N"], Float[Tensor, "N 1"], Float[Tensor, " N"]]:
        """Actions, values of the state before them, and log-probabilities."""
        distribution, values = self._outputs(obs, action_masks)
        actions, logprobs = self._decide(obs, deterministic, distribution)
        return actions, values, logprobs

    def evaluate_actions(
        self, obs: PyTorchObs, actions: Int[Tensor, " B"], action_masks: Any = None
    ) -> tuple[Float[Tensor, "B 1"], Float[Tensor, " B"], Float[Tensor, " B"] | None]:
        """Values, log-probabilities and entropies of given actions, with gradient."""
        distribution, values = self._outputs(obs, action_masks)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs, action_masks: Any = None) -> CategoricalDistribution:
        return self._outputs(obs, action_masks)[0]

    def predict_values(self, obs: PyTorchObs) -> Float[Tensor, "B 1"]:
        return self._outputs(obs)[1]

    def _predict(
        self, observation: PyTorchObs, deterministic: bool = False, action_masks: Any = None
    ) -> Int[Tensor, " B"]:
        return self._decide(observation, deterministic, self._outputs(observation, action_masks)[0])[0]

    def set_training_mode(self, mode: bool) -> None:
        super().set_training_mode(mode)
        if mode:
            self._cache.forget()  # frees the memory for training

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ("observation_space", "action_space", "rule", "prompt_width", "use_cache")
        kept = {name: getattr(self, name) for name in (*names, "optimizer_class", "optimizer_kwargs")}
        memory = {name: getattr(self.memory, name) for name in MEMORY_OPTIONS}
        return {**kept, **memory, "lr_schedule": self._dummy_schedule, "model": self.model_name}

    def _decide(
        self, obs: PyTorchObs, deterministic: bool, distribution: CategoricalDistribution
    ) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """Actions and their log-probabilities, left where the environment finds them."""
        actions = distribution.get_actions(deterministic=deterministic)
        logprobs = distribution.log_prob(actions)
        _last.decision = Decision(obs, actions.detach(), logprobs.detach(), self.rule)
        return actions, logprobs

    def _outputs(self, obs: PyTorchObs, masks: Any = None) -> tuple[CategoricalDistribution, Float[Tensor, "B 1"]]:
        """The distribution of the next token under the rule and the masks, and values; cached unless with gradient."""
        batch = self._read(obs)
        ids, lengths = rows(batch).input_ids, batch.total_lengths
        if self.use_cache and not torch.is_grad_enabled() and decodes_with_cache(self.model):
            logits, hidden = self._cache.outputs(self.model, ids, lengths)
        else:
            logits, hidden = prefix_outputs(self.model, ids, lengths)
        logprobs = self.rule.logprobs(logits, batch.response_lengths)
        if masks is not None:
            logprobs = _masked(logprobs, masks)
        distribution = CategoricalDistribution(logprobs.shape[1])
        return distribution.proba_distribution(action_logits=logprobs), self.value_head(hidden)[:, None]

    def _read(self, obs: PyTorchObs) -> Responses:
        """The tokens in a batch of observations of either mode."""
        ids = obs["input_ids"] if isinstance(obs, dict) else obs
        if ids.is_floating_point():
            rule = f"observations must be integers, got {ids.dtype}"
            raise ValueError(f"{rule}. Do not normalise them: use VecNormalize(..., norm_obs=False).")
        return observation_tokens(obs, self.prompt_width)


class TokenEmbedding(BaseFeaturesExtractor):
    """Learned embeddings of all token columns, side by side: small vocabularies in a stock policy (perceptron, DQN).

    A column always means the same position (the response starts in column P), so nothing is pooled. Padding is embedded
    as zeros. Features: ``(P + T) · dim``.
    """

    def __init__(self, observation_space: spaces.Space, dim: int = 16) -> None:
        box = observation_space["input_ids"] if isinstance(observation_space, spaces.Dict) else observation_space
        assert isinstance(box, spaces.Box)
        super().__init__(observation_space, features_dim=box.shape[0] * dim)
        self.embedding = nn.Embedding(int(box.high.max()) + 1, dim)

    def forward(self, observations: PyTorchObs) -> Float[Tensor, "B F"]:
        """Stable-Baselines3 has turned the ids into floats, which are exact up to 2²⁴."""
        if isinstance(observations, dict):
            ids, real = observations["input_ids"], observations["attention_mask"] > 0
        else:
            ids, real = observations, observations >= 0
        return (self.embedding(ids.long().clamp(min=0)) * real[:, :, None]).flatten(1)


def _given(name: str, value: Any, default: Any) -> Any:
    value = default if value is None else value
    if value is None:
        raise ValueError(
            f"{name} must be given where the action space does not carry it, got None. Make the environment with "
            f"agents.sb3.make_vec_env, or pass policy_kwargs={{'{name}': ...}}."
        )
    return value


def _masked(logprobs: Float[Tensor, "B V"], masks: Any) -> Float[Tensor, "B V"]:
    """The distribution restricted to the tokens that ``masks`` allow (True), not normalised."""
    allowed = torch.as_tensor(masks, device=logprobs.device).reshape(logprobs.shape).bool()
    left = (allowed & (logprobs > -torch.inf)).any(1)
    if not left.all():
        found = f"none of {logprobs.shape[1]} in row {int(left.int().argmin())}"
        raise ValueError(f"an action mask must allow at least one token, got {found}. Fix action_masks().")
    return logprobs.masked_fill(~allowed, -torch.inf)


def _check_vocabulary(name: str, vocabulary: int, actions: int) -> None:
    if vocabulary != actions:
        raise ValueError(
            f"the policy must have the environment's vocabulary, got {vocabulary} tokens in {name!r} and {actions} "
            "actions. Start the policy from the environment's reference."
        )
    if actions > EXACT_FLOATS:
        rule = f"actions must number {EXACT_FLOATS} or fewer for Stable-Baselines3, which stores them as floats"
        raise ValueError(f"{rule}, got {actions}. Use a learner of this package.")
