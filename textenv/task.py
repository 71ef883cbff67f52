"""A task ready to run: models resolved, prompts encoded, finished episodes scored."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedModel

from textenv import registry
from textenv.config import OptionError, TaskConfig
from textenv.data.records import PromptSet
from textenv.lm import LanguageModel, Responses, Sampled, TokenRule, sample_responses
from textenv.lm.adapters import plain_model
from textenv.lm.chat import placed_chats
from textenv.scoring import Finished, Scored, Scorer

_log = logging.getLogger(__name__)

SHOWN = 80
"""Characters of a prompt that an error quotes."""


class EncodedPrompts(NamedTuple):
    """A prompt set as tokens."""

    prompts: tuple[Any, ...]
    """As given: strings, or chats."""
    texts: list[str]
    ids: list[list[int]]
    columns: dict[str, tuple[Any, ...]]


class Outcome(NamedTuple):
    """Rewards of finished episodes, and their infos column by column."""

    rewards: Float[np.ndarray, " n"]
    infos: dict[str, Any]
    """Arrays, lists of strings, or a nested dict of arrays; one entry per episode."""


class Task:
    """A task ready to run: models resolved, prompts encoded, spaces built."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.reference = registry.language_model(config.reference, *config.loading)
        self.prompt_width = config.max_prompt_tokens
        self.width = config.max_prompt_tokens + config.max_new_tokens
        limit = self.reference.max_tokens
        if limit is not None and self.width > limit:
            rule = f"max_prompt_tokens + max_new_tokens must fit the reference's context ({limit})"
            raise ValueError(f"{rule}, got {self.width}. Lower one of them.")
        self.prompts = encode_prompts(config.prompts, self.reference, config.max_prompt_tokens, config.long_prompts)
        self.rule = token_rule(
            self.reference,
            temperature=config.temperature,
            min_new_tokens=config.min_new_tokens,
            stop_tokens=config.stop_tokens,
        )
        reward_model = registry.reward_model(config.reward_model, *config.loading)
        self._check_reward_context(reward_model)
        self.scorer = Scorer(
            reference=self.reference,
            reward_model=reward_model,
            rule=self.rule,
            kl_coef=config.kl_coef,
            kl_source=config.kl_source,
            missing_eos_penalty=config.missing_eos_penalty,
            gold=registry.reward_model(config.gold, *config.loading) if config.gold else None,
            batch_size=config.score_batch_size,
        )
        self.observation_space = self._observation_space()
        self.action_space = spaces.Discrete(self.reference.vocab_size)

    def _check_reward_context(self, reward_model: Any) -> None:
        """Refuse a budget that a reward model of the same tokens cannot read: it needs one token more, to end with."""
        limit, tokenizer = (getattr(reward_model, name, None) for name in ("max_tokens", "tokenizer"))
        if limit is None or tokenizer is None or self.config.max_new_tokens < limit:
            return
        if self.reference.tokenizer.get_vocab().items() <= tokenizer.get_vocab().items():
            raise ValueError(
                f"max_new_tokens must be below the reward model's context ({limit}), got {self.config.max_new_tokens}. "
                "Lower it, or use a reward model that reads more."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies carry names and numbers; models are resolved again by name, and shared."""
        policy = self.scorer.policy
        if policy not in (None, self.reference.model):
            raise ValueError(
                "an environment is pickled by the names of its models, got an attached policy, which has no name. "
                "Call attach_policy(None) first, and attach the policy to the copy."
            )
        return _restored_task, (self.config, self.scorer.kl_coef, policy is not None)

    def precision(self) -> torch.autocast:
        """Passes of float32 weights inside it compute in the task's ``dtype``."""
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16, enabled=enabled)

    def respond(
        self,
        model: PreTrainedModel,
        batch: Responses,
        *,
        generator: torch.Generator | None,
        greedy: bool = False,
        value_head: nn.Module | None = None,
        slots: int | None = None,
    ) -> Sampled:
        """Sample a whole response of a model to each prompt, ``slots`` at once, under this task's rule and budget."""
        return sample_responses(
            model,
            batch.prompt_ids,
            batch.prompt_lengths,
            max_new_tokens=self.config.max_new_tokens,
            rule=self.rule,
            pad_id=self.reference.pad_id,
            generator=generator,
            greedy=greedy,
            value_head=value_head,
            slots=slots,
        )

    def _observation_space(self) -> spaces.Space:
        top, width = self.reference.vocab_size - 1, self.width
        if self.config.obs_mode == "tokens":
            return spaces.Box(-1, top, (width,), np.int64)
        return spaces.Dict(
            {
                "input_ids": spaces.Box(0, top, (width,), np.int64),
                "attention_mask": spaces.Box(0, 1, (width,), np.int8),
                "prompt_length": spaces.Box(0, self.prompt_width, (1,), np.int64),
                "response_length": spaces.Box(0, self.config.max_new_tokens, (1,), np.int64),
            }
        )

    def outcome(self, finished: Finished) -> Outcome:
        """Score finished episodes and lay out their infos."""
        scored: Scored = self.scorer.score(finished)
        infos: dict[str, Any] = {
            "reward_terms": scored.terms,
            "rm_score": scored.rm_scores,
            "kl_coef": np.full(len(scored.rewards), float(self.scorer.kl_coef)),
            "kl_source": [scored.kl_source] * len(scored.rewards),
            "response_length": finished.tokens.response_lengths.numpy().copy(),
            "finish_reason": finished.columns["finish_reason"],
            "truncated_response": scored.truncated,
            "prompt": finished.prompts,
            "response": finished.completions,
        }
        if scored.kl_per_token is not None:
            infos["kl"] = scored.kl_per_token.sum(1, dtype=np.float64)
            infos["kl_per_token"] = scored.kl_per_token
        if scored.gold is not None:
            infos["gold_score"] = scored.gold
        return Outcome(scored.rewards, infos)


def _restored_task(config: TaskConfig, kl_coef: float, reference_attached: bool) -> Task:
    task = Task(config)
    task.scorer.kl_coef = kl_coef
    task.scorer.policy = task.reference.model if reference_attached else None
    return task


class ScoredByTask:
    """The part of an environment that does not depend on the number of its episodes."""

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012
    render_mode: str | None
    task: Task

    def _set_up(self, render_mode: str | None, options: dict[str, Any]) -> None:
        if render_mode not in (None, "ansi"):
            raise OptionError(f"render_mode must be None or 'ansi', got {render_mode!r}. Leave it out.")
        self.render_mode = render_mode
        self.task = Task(TaskConfig.checked(**options))

    @property
    def reference(self) -> LanguageModel:
        """The language model that the KL is measured against. Shared: do not train it."""
        return self.task.reference

    @property
    def kl_coef(self) -> float:
        """β. A new value applies to the episodes that end from now on."""
        return self.task.scorer.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        self.task.scorer.kl_coef = value

    def attach_policy(self, model: nn.Module | None) -> None:
        """Let the environment compute the policy's log-probabilities, by one pass over each finished episode.

        ``model`` is a causal language model of transformers, or peft's ``PeftModel`` of one.
        """
        self.task.scorer.policy = None if model is None else plain_model(model)


@functools.lru_cache(maxsize=16)
def _encode(prompts: PromptSet, reference: LanguageModel) -> EncodedPrompts:
    with placed_chats(reference.tokenizer, prompts.prompts, prompts.place):
        texts = [reference.prompt_text(prompt) for prompt in prompts.prompts]
        ids = [reference.encode_prompt(prompt) for prompt in prompts.prompts]
    return EncodedPrompts(prompts.prompts, texts, ids, prompts.columns)


def encode_prompts(source: Any, reference: LanguageModel, width: int, long: str = "error") -> EncodedPrompts:
    """Tokens of a prompt set whose prompts fit ``width``; ``long`` is an option of the task. A named set is encoded
    once."""
    prompts = registry.prompt_set(source)
    encoded = _encode(prompts, reference)
    for number, (text, ids) in enumerate(zip(encoded.texts, encoded.ids, strict=True)):
        if long == "error" or not ids:
            _check_prompt(text, ids, width, f"{prompts.place(number)}: ")
    if any(len(ids) > width for ids in encoded.ids):
        encoded = _without_long(encoded, width) if long == "drop" else _cut(encoded, reference, width)
    return encoded


def _without_long(encoded: EncodedPrompts, width: int) -> EncodedPrompts:
    kept = [i for i, ids in enumerate(encoded.ids) if len(ids) <= width]
    total = len(encoded.ids)
    if not kept:
        rule = f"a prompt set must hold a prompt of at most max_prompt_tokens ({width}) tokens"
        raise ValueError(f"{rule}, got {total} longer ones. Raise max_prompt_tokens, or set long_prompts='cut'.")
    _log.warning("%d of %d prompts have more than %d tokens and are left out.", total - len(kept), total, width)
    return EncodedPrompts(
        tuple(encoded.prompts[i] for i in kept),
        [encoded.texts[i] for i in kept],
        [encoded.ids[i] for i in kept],
        {name: tuple(values[i] for i in kept) for name, values in encoded.columns.items()},
    )


def _cut(encoded: EncodedPrompts, reference: LanguageModel, width: int) -> EncodedPrompts:
    """The text of a prompt that is cut is that of the tokens that are left."""
    prompts, texts, ids = list(encoded.prompts), list(encoded.texts), [row[-width:] for row in encoded.ids]
    long = [i for i, row in enumerate(encoded.ids) if len(row) > width]
    for i, text in zip(long, reference.decode_batch([ids[i] for i in long]), strict=True):
        prompts[i] = texts[i] = text
    return EncodedPrompts(tuple(prompts), texts, ids, encoded.columns)


def _check_prompt(text: str, ids: list[int], width: int, where: str = "") -> None:
    if not 1 <= len(ids) <= width:
        rule = f"{where}a prompt must have 1 to max_prompt_tokens ({width}) tokens"
        remedy = "Raise max_prompt_tokens, or set long_prompts='drop' to leave such prompts out or 'cut' to cut them"
        shown = repr(text) if len(text) <= SHOWN else f"{text[:SHOWN] + '…'!r}"
        raise ValueError(f"{rule}, got {len(ids)} in {shown}. {remedy if ids else 'Drop the prompt'}.")


def chosen_prompt(
    task: Task, rng: np.random.Generator, options: dict[str, Any] | None
) -> tuple[int, Any, str, list[int]]:
    """``(number in the prompt set or −1, prompt as given, its text, its tokens)``."""
    options = options or {}
    unknown = options.keys() - {"prompt", "prompt_id"}
    if unknown or len(options) > 1:
        raise ValueError(f"reset options must be 'prompt' or 'prompt_id', got {sorted(options)}. Give one of the two.")
    if "prompt" in options:
        prompt = options["prompt"]
        text, ids = task.reference.prompt_text(prompt), task.reference.encode_prompt(prompt)
        _check_prompt(text, ids, task.prompt_width)
        return -1, prompt, text, ids
    count = len(task.prompts.ids)
    index = int(options["prompt_id"]) if "prompt_id" in options else int(rng.integers(count))
    if not 0 <= index < count:
        raise ValueError(f"prompt_id must lie in [0, {count}), got {index}. Name a prompt of the set.")
    return index, task.prompts.prompts[index], task.prompts.texts[index], task.prompts.ids[index]


def token_rule(
    reference: LanguageModel, *, temperature: float = 1.0, min_new_tokens: int = 0, stop_tokens: Sequence[str] = ()
) -> TokenRule:
    """How the tokens of a model are drawn under the options of a task."""
    stop_ids = (*reference.ending_ids, *(_token_id(token, reference) for token in stop_tokens))
    return TokenRule(temperature=temperature, min_new_tokens=min_new_tokens, stop_ids=stop_ids)


def _token_id(token: str, reference: LanguageModel) -> int:
    ids = reference.encode_response(token, eos=False)
    if len(ids) != 1 or (ids[0] == reference.tokenizer.unk_token_id and token != reference.tokenizer.unk_token):
        words = reference.tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"a stop token must be one token of the reference, got {token!r} → {words}. Choose another.")
    return ids[0]
