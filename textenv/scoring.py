"""Scoring finished episodes: reward model − β·KL. Rewards are made here and nowhere else.

The reward of an episode is the sum of its named ``reward_terms``. The KL in it is the k1 estimator
``Σ_t log π(y_t | ·) − log π_ref(y_t | ·)`` over the response tokens, EOS included; prompt and padding do not count.
"""

import inspect
import logging
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from textenv.config import KLSource
from textenv.kl import kl_k1
from textenv.lm import LanguageModel, Responses, TokenRule, response_logprobs
from textenv.protocols import RewardModel
from textenv.settings import NonNegative, check_value

logger = logging.getLogger("textenv")


class Finished(NamedTuple):
    """A batch of finished episodes, as tokens and as text."""

    tokens: Responses
    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]
    """What reward models may ask for besides the texts; ``finish_reason`` always."""
    logprobs: Float[np.ndarray, "B T"] | None
    """Log-probabilities that the agent reported of its own tokens; None when it reported none."""


class Scored(NamedTuple):
    """What an episode earned and why."""

    rewards: Float[np.ndarray, " B"]
    """Sum of ``terms``."""
    terms: dict[str, Float[np.ndarray, " B"]]
    rm_scores: Float[np.ndarray, " B"]
    kl_per_token: Float[np.ndarray, "B T"] | None
    """k1 per token, zeros on padding; None where the KL is unknown (``kl_source="reference"``)."""
    kl_source: str
    """Where the policy's log-probabilities came from: "reported", "policy", "reference" or "none"."""
    gold: Float[np.ndarray, " B"] | None
    truncated: Bool[np.ndarray, " B"]
    """Whether the reward model read only the beginning of the response, since the whole is longer than its context."""


_truncated: ContextVar[set[str] | None] = ContextVar("truncated", default=None)


def note_truncated(completions: Iterable[str]) -> None:
    """For reward models: tell the environment that scores by them which completions were not read to their end."""
    if (noted := _truncated.get()) is not None:
        noted.update(completions)


@contextmanager
def truncations() -> Iterator[set[str]]:
    """The completions that reward models note inside the block."""
    noted: set[str] = set()
    before = _truncated.set(noted)
    try:
        yield noted
    finally:
        _truncated.reset(before)


class Scorer:
    """Turns finished episodes into rewards."""

    warned: ClassVar[bool] = False
    """Whether this process has already warned that the KL is unknown."""

    def __init__(
        self,
        *,
        reference: LanguageModel,
        reward_model: RewardModel,
        rule: TokenRule,
        kl_coef: float,
        kl_source: KLSource = "auto",
        missing_eos_penalty: float | None = None,
        gold: RewardModel | None = None,
        batch_size: int = 64,
    ) -> None:
        check_value("kl_source", kl_source, KLSource)
        check_value("kl_coef", kl_coef, Annotated[NonNegative, "Use 0 to switch the KL off."])
        self.reference = reference
        self.rule = rule
        self.kl_coef = kl_coef
        self.kl_source: KLSource = kl_source
        self.missing_eos_penalty = missing_eos_penalty
        self.policy: PreTrainedModel | None = None
        self.batch_size = batch_size
        self._reward_model = reward_model
        self._gold = gold

    def score(self, episodes: Finished) -> Scored:
        """Score a batch, each row on its own."""
        with truncations() as noted:
            terms = reward_model_terms(self._reward_model, episodes)
        truncated = np.array([completion in noted for completion in episodes.completions])
        rm_scores = np.asarray(sum(terms.values()), dtype=np.float64)
        if self.missing_eos_penalty is not None:
            cut = np.array([reason == "length" for reason in episodes.columns["finish_reason"]])
            terms["missing_eos"] = np.where(cut, -float(self.missing_eos_penalty), 0.0)

        source = self._source(episodes)
        kl_per_token: np.ndarray | None = np.zeros(episodes.tokens.response_ids.shape, dtype=np.float32)
        if source == "reference":
            kl_per_token = None
            terms["reference_logprob"] = self.kl_coef * self._logprobs(self.reference.model, episodes).sum(1)
        elif source != "none":
            if source == "policy":
                assert self.policy is not None
                logprobs = self._logprobs(self.policy, episodes)
            else:
                assert episodes.logprobs is not None
                logprobs = np.where(episodes.tokens.response_mask.numpy(), episodes.logprobs, 0.0)
            kl_per_token = kl_k1(logprobs, self._logprobs(self.reference.model, episodes)).astype(np.float32)
            terms["kl"] = -self.kl_coef * kl_per_token.sum(1, dtype=np.float64)

        gold = None
        if self._gold is not None:
            same = self._gold is self._reward_model
            gold = rm_scores.copy() if same else call_reward_model(self._gold, episodes)
        rewards = np.asarray(sum(terms.values()), dtype=np.float64)
        return Scored(rewards, terms, rm_scores, kl_per_token, source, gold, truncated)

    def _source(self, episodes: Finished) -> str:
        if self.kl_source == "reported" and episodes.logprobs is None:
            raise ValueError(
                "kl_source 'reported' needs the log-probability of every action. "
                "Call report_logprobs(...) before each step, or pass logprobs= to play."
            )
        if self.kl_source == "policy" and self.policy is None:
            raise ValueError("kl_source 'policy' needs a policy. Call attach_policy(model) before the first episode.")
        if self.kl_source != "auto":
            return self.kl_source
        if episodes.logprobs is not None:
            return "reported"
        if self.policy is not None:
            return "policy"
        if self.kl_coef > 0 and not Scorer.warned:
            Scorer.warned = True
            logger.warning(
                "kl_coef is %g but the policy's log-probabilities are unknown: the KL counts as 0. "
                "Call report_logprobs(...) before each step, attach_policy(model), or use kl_source='reference'.",
                self.kl_coef,
            )
        return "none"

    def _logprobs(self, model: PreTrainedModel, episodes: Finished) -> Float[np.ndarray, "B T"]:
        return response_logprobs(model, episodes.tokens, self.rule, batch_size=self.batch_size).double().numpy()


def reward_model_terms(reward_model: RewardModel, episodes: Finished) -> dict[str, Float[np.ndarray, " B"]]:
    """What a reward model contributes: ``{"reward_model": scores}``, or its parts if it itemises them.

    A reward model that is a sum may have a method ``terms(prompts, completions, **columns)`` that returns the scores of
    each part by name. It is called once, instead of the model, and the parts appear as ``reward_model/<name>``.
    """
    itemise: Any = getattr(reward_model, "terms", None)
    if not callable(itemise):
        return {"reward_model": call_reward_model(reward_model, episodes)}
    texts = episodes.prompts, episodes.completions
    parts: Any = itemise(*map(list, texts), **accepted_columns(itemise, episodes.columns))
    if not (isinstance(parts, Mapping) and parts):
        rule = f"terms of {_called(reward_model)} must return a dict of names and scores"
        raise ValueError(f"{rule}, got {reprlib.repr(parts)}. Return at least one part, or leave the method terms out.")
    return {
        f"reward_model/{name}": checked_scores(scores, *texts, f"part {name!r} of {_called(reward_model)}")
        for name, scores in parts.items()
    }


def call_reward_model(reward_model: RewardModel, episodes: Finished) -> Float[np.ndarray, " B"]:
    """Scores as float64, one finite number per episode.

    Raises:
        ValueError: the model returned anything else; names the model and the prompt.
    """
    return score_texts(reward_model, episodes.prompts, episodes.completions, episodes.columns)


def score_texts(
    reward_model: RewardModel,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    name: str | None = None,
) -> Float[np.ndarray, " B"]:
    """Call a reward model with the columns that it takes: one finite float64 per text, or a ValueError on ``name``."""
    scores = reward_model(list(prompts), list(completions), **accepted_columns(reward_model, columns))
    return checked_scores(scores, prompts, completions, name or _called(reward_model))


def checked_scores(
    scores: Any, prompts: Sequence[str], completions: Sequence[str], name: str
) -> Float[np.ndarray, " B"]:
    """Scores as float64, one finite number per text, or a ValueError that names the prompt.

    Takes a list, or a tensor or array ``[B]`` or ``[B, 1]`` (a one-label classifier's logits), with gradient or not.
    """
    unordered = isinstance(scores, str | bytes | Mapping | Set)
    if unordered or not isinstance(scores, Iterable) or getattr(scores, "shape", None) == ():
        raise ValueError(f"{name} must return a list of scores, got {reprlib.repr(scores)}. Return one per text.")
    values: list[Any] = [s.item() if getattr(s, "shape", None) in ((), (1,)) else s for s in scores]
    if len(values) != len(prompts):
        found = f"{len(values)} for {len(prompts)}"
        raise ValueError(f"{name} must return one score per episode, got {found}. Return one per text.")
    for value, prompt, completion in zip(values, prompts, completions, strict=True):
        if not (isinstance(value, int | float | np.floating) and abs(value) <= sys.float_info.max):
            raise ValueError(
                f"{name} must return finite scores, one number per text, got {reprlib.repr(value)} for prompt "
                f"{prompt!r} and response {completion!r}. Fix the reward model."
            )
    return np.array(values, dtype=np.float64)


def _called(reward_model: Any) -> str:
    """A reward model in an error: by the name of its function or class."""
    return f"reward model {getattr(reward_model, '__name__', type(reward_model).__name__)!r}"


def accepted_columns(function: Callable[..., Any], columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The columns that a reward model takes: by name, or all of them through ``**columns``."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {key: list(values) for key, values in columns.items() if everything or key in parameters}


class ReturnUnit(RunningMeanStd):
    """The standard deviation of all returns so far, by which rewards may be divided (Engstrom et al. 2020)."""

    def __init__(self) -> None:
        super().__init__(epsilon=0.0)

    def after(self, returns: Float[Tensor, " B"]) -> float:
        """The unit with these returns as well; 1 while all are alike."""
        self.update(returns.double().numpy())
        deviation = float(self.var) ** 0.5
        return deviation if deviation > 1e-6 else 1.0


def spread_kl(
    score: Float[Tensor, " B"],
    kl_per_token: Float[Tensor, "B T"],
    kl_coef: float,
    lengths: Int[Tensor, " B"],
    *,
    per_token: bool,
) -> Float[Tensor, "B T"]:
    """Token rewards that sum to ``score − kl_coef · Σ_t KL_t``.

    The score always goes to the last real token. So does the KL (as the environment pays it), unless ``per_token``
    charges each token its own; both have the same return at the start state.
    """
    steps = torch.arange(kl_per_token.shape[1], device=kl_per_token.device)
    last = steps == (lengths - 1)[:, None]
    kl = torch.where(steps < lengths[:, None], kl_per_token, 0.0)
    if per_token:
        return torch.where(last, score[:, None], 0.0) - kl_coef * kl
    return torch.where(last, (score - kl_coef * kl.sum(1))[:, None], 0.0)
