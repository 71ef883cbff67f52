"""Token buffers of running episodes, and the rules that end them."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from textenv.lm import Responses
from textenv.scoring import Finished
from textenv.task import Task, chosen_prompt

FINISH_REASONS = ("eos", "stop", "length")


def whole_numbers(name: str, values: Any) -> Int[np.ndarray, "..."]:
    """``values`` as int64.

    Raises:
        ValueError: they are not whole numbers. NumPy alone would truncate 1.7 to 1 and read True as 1.
    """
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers (token ids), got {values!r}. Convert them to integers first.")
    return array.astype(np.int64)


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
        index, prompt, text, ids = chosen_prompt(task, rng, options)
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
            rule = "reported log-probabilities must be 0 or less and not NaN"
            raise ValueError(f"{rule}, got {logprobs}. Report those of the chosen tokens.")
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
            rule = f"an action must be a token of the vocabulary [0, {vocabulary})"
            raise ValueError(f"{rule}, got {tokens[outside][0]}. Policy and environment must share one vocabulary.")
        early = np.isin(tokens, self._stop) & (steps < self.task.rule.min_new_tokens)
        if early.any():
            rule = f"an ending token is masked before min_new_tokens ({self.task.rule.min_new_tokens})"
            raise ValueError(f"{rule}, got action {tokens[early][0]}. Use action_masks().")

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
        parts = (self.tokens[slots, :width], self.prompt_lengths[slots], responses, lengths)
        tokens = Responses(*map(torch.from_numpy, parts))
        texts = [self.texts[slot] for slot in slots], task.reference.response_texts(lists)
        return Finished(tokens, *texts, columns, self._reported_logprobs(slots, lengths))

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


def as_batch(observation: Any) -> tuple[Any, bool]:
    """An observation as a batch, and whether it was single."""
    if isinstance(observation, dict):
        single = np.ndim(observation["input_ids"]) == 1
        return {key: np.asarray(value)[None] for key, value in observation.items()} if single else observation, single
    single = np.ndim(observation) == 1
    return np.asarray(observation)[None] if single else observation, single
