"""A server as the sampler of a policy."""

import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor

from textenv.data.http import Endpoint
from textenv.episode import observation_tokens
from textenv.lm import LanguageModel, Responses, Sampled, length_buckets, pad_right
from textenv.served.completion import PATH, Completion, read, request
from textenv.served.weights import update_named
from textenv.task import Task
from textenv.training.processes import on_main

AT_ONCE = 256
"""Requests that wait for their answers at the same time; a server batches them itself."""
ROWS = 64
"""Responses that the policy scores in one pass."""

Score = Callable[[Responses, Task], tuple[Tensor, Tensor] | tuple[Any, ...]]
"""Log-probabilities and values ``[B, T]`` of given responses; what follows them is not read."""


@dataclass(frozen=True)
class Gap:
    """How far a server's log-probabilities are from the policy's: Σ|Δ| and max |Δ| of so many tokens, nats."""

    total: float = 0.0
    most: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Gap") -> "Gap":
        return Gap(self.total + other.total, max(self.most, other.most), self.tokens + other.tokens)

    def log(self) -> dict[str, float]:
        """``sampler_gap`` and ``sampler_gap_max``; nothing without tokens."""
        return {"sampler_gap": self.total / self.tokens, "sampler_gap_max": self.most} if self.tokens else {}


@final
class ServedSampler:
    """Draws responses from a server that holds the weights of a policy."""

    def __init__(
        self,
        url: str,
        *,
        update: str | None = None,
        folder: str | Path | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        backoff: float = 0.5,
        token_variable: str | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: the server, with or without ``/v1``.
            update: how it gets new weights, see :func:`update_named`; None leaves it those that it has.
            folder: where they are written, under a path that the server knows too; None: a temporary folder.
            timeout: seconds in which a request must be answered.
            retries, backoff, token_variable: see :class:`textenv.data.http.Endpoint`.

        Raises:
            ValueError: the URL or ``update`` is impossible.
        """
        how = {"timeout": timeout, "retries": retries, "backoff": backoff, "token_variable": token_variable}
        self.server = Endpoint(url.rstrip("/").removesuffix("/v1"), called="the sampler", **how)
        self._update = None if update is None else update_named(update)
        self._folder = None if folder is None else Path(folder).absolute()
        self._held: Path | None = None
        self.model: str | None = None
        """Name of the model to ask for; None: the server's only one."""
        self.gap = Gap()
        """Of what was drawn since the weights were last brought up to date."""

    def holding(self, policy: LanguageModel) -> Self:
        """The same sampler, its server on the weights of ``policy`` now; the main process alone tells it."""
        self.gap = Gap()
        if self._update is not None:
            self.model = on_main(lambda: self._bring(policy))
        return self

    def _bring(self, policy: LanguageModel) -> str | None:
        assert self._update is not None
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="textenv-sampler-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        folder = self._folder / f"textenv-{uuid.uuid4().hex[:12]}"
        model = self._update(self.server, policy, folder, self.model)
        if self._held is not None:
            shutil.rmtree(self._held, ignore_errors=True)
        self._held = folder
        return model

    def act(
        self,
        observation: Any,
        *,
        task: Task,
        score: Score,
        generator: torch.Generator,
        greedy: bool = False,
        slots: int | None = None,
    ) -> Sampled:
        """Whole responses to the prompts of fresh observations, with what ``score`` says about them; ``slots``: most
        requests at once, None: ``AT_ONCE``.

        Raises:
            ValueError: the server cannot be reached, or an answer is no response under the rule of the task.
        """
        batch = observation_tokens(observation, task.prompt_width)
        drawn = self._draw(batch, task, generator, greedy, slots or AT_ONCE)
        limit, pad_id = task.config.max_new_tokens, task.reference.pad_id
        ids, lengths = pad_right([response.ids for response in drawn], pad_id, limit)
        batch = batch._replace(response_ids=ids, response_lengths=lengths)
        logprobs, values = _scored(batch, task, score)
        theirs = torch.tensor([logprob for response in drawn for logprob in response.logprobs], dtype=torch.float64)
        gaps = (logprobs[batch.response_mask].double() - theirs).abs()
        gaps = gaps[~gaps.isnan()]
        if len(gaps) and not greedy:  # of a most likely token, servers report what they like
            self.gap = self.gap + Gap(float(gaps.sum()), float(gaps.max()), len(gaps))
        return Sampled(ids, lengths, logprobs, values)

    def _draw(
        self, batch: Responses, task: Task, generator: torch.Generator, greedy: bool, at_once: int
    ) -> list[Completion]:
        """One request a response, each with a seed of its own: a seed of several prompts would repeat their draws."""
        limit, size = task.config.max_new_tokens, len(batch.prompt_ids)
        seeds = [None] * size if greedy else torch.randint(2**31, (size,), generator=generator).tolist()

        def one(row: int) -> Completion:
            prompt = batch.prompt_ids[row, -int(batch.prompt_lengths[row]) :].tolist()
            body = request(prompt, task.rule, model=self.model, max_new_tokens=limit, seed=seeds[row], greedy=greedy)
            answer = self.server.post(body, PATH)
            return read(answer, task.rule, max_new_tokens=limit, vocab_size=task.reference.vocab_size)

        pool = ThreadPoolExecutor(min(size, at_once))
        try:
            return list(pool.map(one, range(size)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def _scored(batch: Responses, task: Task, score: Score) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values of responses, on the CPU, in passes over rows of similar length."""
    parts = []
    for index in length_buckets(batch.total_lengths, ROWS):
        logprobs, values, *_ = score(batch.select(index).to(task.config.device), task)
        parts.append((index, logprobs.cpu(), values.cpu()))
    logprobs, values = (torch.zeros(batch.response_ids.shape, dtype=parts[0][1].dtype) for _ in range(2))
    for index, own, value in parts:
        logprobs[index, : own.shape[1]] = own
        values[index, : value.shape[1]] = value.to(values.dtype)
    return logprobs, values
