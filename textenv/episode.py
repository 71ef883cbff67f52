"""What the single and the vector environment share: the task, the token buffers, and the rules that end an episode."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int
from torch import nn
from transformers import PreTrainedModel

from textenv import registry
from textenv.config import OptionError, TaskConfig
from textenv.data.records import PromptSet
from textenv.lm import LanguageModel, Responses, Sampled, TokenRule, sample_responses
from textenv.scoring import Finished, Scored, Scorer

FINISH_REASONS = ("eos", "stop", "length")


class EncodedPrompts(NamedTuple):
    """A prompt set as tokens."""

    prompts: tuple[Any, ...]
    """As given: strings, or chats."""
    texts: list[str]
    ids: list[list[int]]
    columns: dict[str, tuple[Any, ...]]


def whole_numbers(name: str, values: Any) -> Int[np.ndarray, "..."]:
    """``values`` as int64.

    Raises:
        ValueError: they are not whole numbers. NumPy alone would truncate 1.7 to 1 and read True as 1.
    """
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers (token ids), got {values!r}. Convert them to integers first.")
    return array.astype(np.int64)


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
            raise ValueError(
                f"max_prompt_tokens + max_new_tokens must fit the reference's context ({limit}), got {self.width}. "
                "Lower one of them."
            )
        self.prompts = encode_prompts(config.prompts, self.reference, config.max_prompt_tokens)
        self.rule = TokenRule(
            temperature=config.temperature,
            min_new_tokens=config.min_new_tokens,
            stop_ids=(*self.reference.ending_ids, *(_token_id(token, self.reference) for token in config.stop_tokens)),
        )
        self.scorer = Scorer(
            reference=self.reference,
            reward_model=registry.reward_model(config.reward_model, *config.loading),
            rule=self.rule,
            kl_coef=config.kl_coef,
            kl_source=config.kl_source,
            missing_eos_penalty=config.missing_eos_penalty,
            gold=registry.reward_model(config.gold, *config.loading) if config.gold else None,
            batch_size=config.score_batch_size,
        )
        self._check_reward_context(registry.reward_model(config.reward_model, *config.loading))
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
    ) -> Sampled:
        """Sample a whole response of a model to each prompt, under this task's rule and length budget."""
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

    def attach_policy(self, model: PreTrainedModel | None) -> None:
        """Let the environment compute the policy's log-probabilities, by one pass over each finished episode."""
        self.task.scorer.policy = model


class Episodes:
    """Token buffers of N running episodes."""

    def __init__(self, count: int, task: Task) -> None:
        self.task = task
        self.tokens = np.full((count, task.width), task.reference.pad_id, dtype=np.int64)
        self.prompt_lengths = np.zeros(count, dtype=np.int64)
        self.response_lengths = np.zeros(count, dtype=np.int64)
        self.prompt_index = np.full(count, -1)
        self.prompts: list[Any] = [""] * count
        self.texts = [""] * count
        self.ended = np.ones(count, dtype=bool)
        self._stop = np.array(task.rule.stop_ids)
        self._logprobs = np.zeros((count, task.config.max_new_tokens), dtype=np.float32)
        self._reported = np.zeros(count, dtype=np.int64)
        self._pending: np.ndarray | None = None

    def begin(self, slot: int, rng: np.random.Generator, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start an episode on a prompt drawn from ``rng``, or on the one that ``options`` name; return its info."""
        task = self.task
        index, prompt, text, ids = _chosen_prompt(task, rng, options)
        width = task.prompt_width
        self.tokens[slot] = task.reference.pad_id
        self.tokens[slot, width - len(ids) : width] = ids
        self.prompt_lengths[slot], self.response_lengths[slot] = len(ids), 0
        self.prompt_index[slot], self.prompts[slot], self.texts[slot] = index, prompt, text
        self.ended[slot] = False
        self._reported[slot] = 0
        self._pending = None  # reported for an action that was never taken
        return {"prompt": text, "prompt_id": index}

    def report(self, logprobs: Float[np.ndarray, " N"]) -> None:
        """Keep the policy's log-probabilities of the next actions."""
        if np.isnan(logprobs).any() or (logprobs > 1e-4).any():
            raise ValueError(
                f"reported log-probabilities must be 0 or less and not NaN, got {logprobs}. Report those of "
                "the chosen tokens."
            )
        self._pending = logprobs

    def append(self, active: Bool[np.ndarray, " N"], actions: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Add one token to each active episode; True where that ended it."""
        slots = np.flatnonzero(active)
        if self.ended[slots].any():
            raise ValueError(f"an episode must be running, got {slots[self.ended[slots]].tolist()}. Call reset first.")
        self._check_tokens(actions[slots], self.response_lengths[slots])
        steps = self.response_lengths[slots]
        self.tokens[slots, self.task.prompt_width + steps] = actions[slots]
        if self._pending is not None:
            self._logprobs[slots, steps] = self._pending[slots]
            self._reported[slots] += 1
            self._pending = None
        self.response_lengths[slots] += 1
        over = np.isin(actions[slots], self._stop) | (self.response_lengths[slots] == self.task.config.max_new_tokens)
        self.ended[slots] = over
        return active & self.ended

    def fill(
        self,
        response_ids: Int[np.ndarray, "N T"],
        response_lengths: Int[np.ndarray, " N"],
        logprobs: Float[np.ndarray, "N T"] | None,
    ) -> None:
        """Play whole responses into fresh episodes; each must end exactly where the rules end it."""
        budget = self.task.config.max_new_tokens
        if self.ended.any() or self.response_lengths.any():
            raise ValueError("play needs fresh episodes in every slot. Call reset first, or finish them with step.")
        if response_ids.shape[0] != len(self.tokens) or response_lengths.shape != (len(self.tokens),):
            raise ValueError(
                f"play needs one response per slot ({len(self.tokens)}), got shapes {response_ids.shape} of ids and "
                f"{response_lengths.shape} of lengths. Give one row per slot."
            )
        mask = np.arange(response_ids.shape[1]) < response_lengths[:, None]
        columns = np.broadcast_to(np.arange(response_ids.shape[1]), response_ids.shape)
        stops = np.isin(response_ids, self._stop) & mask
        first_stop = np.where(stops.any(1), stops.argmax(1) + 1, budget)
        wrong = np.flatnonzero((response_lengths != first_stop) | (response_lengths > response_ids.shape[1]))
        if wrong.size:
            slot = wrong[0]
            raise ValueError(
                "a played response must end at its first stop token or at the budget, got length "
                f"{response_lengths[slot]} in slot {slot}, where the rules end it at {first_stop[slot]}. Cut it there."
            )
        self._check_tokens(response_ids[mask], columns[mask])
        width = self.task.prompt_width
        target = self.tokens[:, width : width + response_ids.shape[1]]
        usable = mask[:, :budget]
        target[usable] = response_ids[:, :budget][usable]
        if logprobs is not None:
            self._logprobs[:, : response_ids.shape[1]][usable] = logprobs[:, :budget][usable]
            self._reported[:] = response_lengths
        self.response_lengths[:] = response_lengths
        self.ended[:] = True

    def _check_tokens(self, tokens: Int[np.ndarray, " n"], steps: Int[np.ndarray, " n"]) -> None:
        vocabulary = self.task.reference.vocab_size
        outside = (tokens < 0) | (tokens >= vocabulary)
        if outside.any():
            raise ValueError(
                f"an action must be a token of the vocabulary [0, {vocabulary}), got {tokens[outside][0]}. "
                "Policy and environment must share one vocabulary."
            )
        early = np.isin(tokens, self._stop) & (steps < self.task.rule.min_new_tokens)
        if early.any():
            raise ValueError(
                f"an ending token is masked before min_new_tokens ({self.task.rule.min_new_tokens}), got action "
                f"{tokens[early][0]}. Use action_masks()."
            )

    def finished(self, slots: Int[np.ndarray, " n"]) -> Finished:
        """The ended episodes of ``slots`` as a record for scoring."""
        task, width = self.task, self.task.prompt_width
        lengths = self.response_lengths[slots]
        responses = self.tokens[slots, width:]
        lists = [row[:length] for row, length in zip(responses.tolist(), lengths.tolist(), strict=True)]
        last = responses[np.arange(len(slots)), lengths - 1]
        by_itself, stopped = np.isin(last, task.reference.ending_ids), np.isin(last, self._stop)
        index = np.where(by_itself, 0, np.where(stopped, 1, 2))
        columns: dict[str, list[Any]] = {
            key: [values[i] if i >= 0 else None for i in self.prompt_index[slots]]
            for key, values in task.prompts.columns.items()
        }
        columns["finish_reason"] = [FINISH_REASONS[i] for i in index]
        chats = [None if isinstance(self.prompts[slot], str) else self.prompts[slot] for slot in slots]
        if any(chats):  # a reward model with a template of its own wants the messages, not the policy's rendering
            columns["chat"] = chats
        tokens = Responses(
            torch.from_numpy(self.tokens[slots, :width]),
            torch.from_numpy(self.prompt_lengths[slots]),
            torch.from_numpy(responses),
            torch.from_numpy(lengths),
        )
        return Finished(
            tokens,
            [self.texts[slot] for slot in slots],
            task.reference.response_texts(lists),
            columns,
            self._reported_logprobs(slots, lengths),
        )

    def _reported_logprobs(
        self, slots: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n T"] | None:
        reported = self._reported[slots]
        if not reported.any():
            return None
        if (reported != lengths).any():
            slot = int(np.flatnonzero(reported != lengths)[0])
            raise ValueError(
                "log-probabilities must be reported for every token of an episode or for none, got "
                f"{reported[slot]} for {lengths[slot]} tokens. Call report_logprobs before each step."
            )
        return self._logprobs[slots]

    def observe(self, slots: Int[np.ndarray, " n"] | slice = slice(None)) -> Any:
        """Fresh arrays of the observations of ``slots``, batched."""
        ids = self.tokens[slots].copy()
        prompt, response = self.prompt_lengths[slots], self.response_lengths[slots]
        column = np.arange(self.task.width)
        width = self.task.prompt_width
        mask = (column >= width - prompt[:, None]) & (column < width + response[:, None])
        if self.task.config.obs_mode == "tokens":
            return np.where(mask, ids, -1)
        return {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int8),
            "prompt_length": prompt[:, None].copy(),
            "response_length": response[:, None].copy(),
        }

    def action_masks(self) -> Bool[np.ndarray, "N V"]:
        """True where an action is allowed now."""
        masks = np.ones((len(self.tokens), self.task.reference.vocab_size), dtype=bool)
        early = self.response_lengths < self.task.rule.min_new_tokens
        masks[np.ix_(early, self._stop)] = False
        return masks

    def text(self, slot: int) -> str:
        """Prompt and response so far, for rendering."""
        width = self.task.prompt_width
        response = self.tokens[slot, width : width + self.response_lengths[slot]].tolist()
        return f"{self.texts[slot]} → {self.task.reference.decode(response)}"


def observation_tokens(observation: Any, prompt_width: int) -> Responses:
    """The tokens in a batched observation (arrays or tensors) of either mode."""
    if isinstance(observation, dict):
        columns = (observation[key] for key in ("input_ids", "prompt_length", "response_length"))
        ids, prompt_lengths, response_lengths = map(torch.as_tensor, columns)
        prompt_lengths, response_lengths = prompt_lengths[:, 0], response_lengths[:, 0]
    else:
        ids = torch.as_tensor(observation)
        real = ids >= 0
        prompt_lengths, response_lengths = real[:, :prompt_width].sum(1), real[:, prompt_width:].sum(1)
        ids = ids.clamp(min=0)
    return Responses(ids[:, :prompt_width], prompt_lengths, ids[:, prompt_width:], response_lengths)


@functools.lru_cache(maxsize=16)
def _encode(prompts: PromptSet, reference: LanguageModel) -> EncodedPrompts:
    texts = [reference.prompt_text(prompt) for prompt in prompts.prompts]
    ids = [reference.encode_prompt(prompt) for prompt in prompts.prompts]
    return EncodedPrompts(prompts.prompts, texts, ids, prompts.columns)


def encode_prompts(source: Any, reference: LanguageModel, width: int) -> EncodedPrompts:
    """Tokens of a prompt set whose prompts fit ``width``. A named set is encoded once."""
    encoded = _encode(registry.prompt_set(source), reference)
    for text, ids in zip(encoded.texts, encoded.ids, strict=True):
        _check_prompt(text, ids, width)
    return encoded


def _check_prompt(text: str, ids: list[int], width: int) -> None:
    if not 1 <= len(ids) <= width:
        raise ValueError(
            f"a prompt must have 1 to max_prompt_tokens ({width}) tokens, got {len(ids)} in {text!r}. "
            "Raise max_prompt_tokens or drop the prompt."
        )


def _chosen_prompt(
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


def _token_id(token: str, reference: LanguageModel) -> int:
    ids = reference.encode_response(token, eos=False)
    if len(ids) != 1:
        raise ValueError(f"a stop token must be one token of the reference, got {token!r} → {ids}. Choose another.")
    return ids[0]
