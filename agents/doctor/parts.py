"""The parts of a set-up, as checks take them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from textenv.conformance.subject import Skipped
from textenv.lm import LanguageModel, Responses, Sampled, TokenRule, response_logprobs, sample_responses
from textenv.lm.adapters import adapter_base
from textenv.lm.chat import chat_text
from textenv.lm.load import is_gguf

LARGE = 20_000_000
"""Parameters from which fewer tokens are drawn."""


class Text(NamedTuple):
    """A prompt with a response to it."""

    prompt: Any
    response: str


def refusal(lm: LanguageModel, prompt: Any) -> str:
    """Why the chat template cannot write a prompt, alone and with an answer; empty where it can."""
    if isinstance(prompt, str):
        return ""
    if lm.tokenizer.chat_template is None:
        return "the tokenizer has no chat template"
    try:
        lm.prompt_text(prompt)
        chat_text(lm.tokenizer, [*prompt, {"role": "assistant", "content": "ANSWER"}])
    except Exception as error:  # whatever a template raises
        return str(error)
    return ""


def has_system_turn(prompt: Any) -> bool:
    return not isinstance(prompt, str) and any(message.get("role") == "system" for message in prompt)


def refuses_system_turn(lm: LanguageModel) -> bool:
    """False without a template, which refuses every chat."""
    if lm.tokenizer.chat_template is None:
        return False
    return bool(refusal(lm, [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "QUESTION"}]))


class ModelPart:
    """A language model, with texts of the set-up to try it on."""

    def __init__(self, lm: LanguageModel, source: str | None = None, texts: Sequence[Text] = ()) -> None:
        """``source``: the folder or hub id that it was loaded from; None for one that exists in memory alone."""
        self.lm, self.source, self.texts = lm, source, list(texts)

    @property
    def files(self) -> str | None:
        """What transformers can load again: a folder or hub id with a whole model."""
        whole = self.source is not None and not is_gguf(self.source) and adapter_base(self.source) is None
        return self.source if whole else None

    @property
    def folder(self) -> Path | None:
        return Path(self.source) if self.source is not None and Path(self.source).is_dir() else None

    @property
    def rule(self) -> TokenRule:
        """The model's own distribution, until a turn ends."""
        return TokenRule(stop_ids=self.lm.ending_ids)

    @property
    def tolerance(self) -> float:
        """Of a log-probability, in nats: computed in another order, float32 stays far below."""
        return 1e-3 if self.lm.model.dtype.itemsize >= 4 else 0.1

    @property
    def room(self) -> tuple[int, int]:
        """Tokens of the longest prompt and response to try, within the context."""
        context = self.lm.max_tokens or 64
        width = max(1, min(7, context // 3))
        return width, max(1, min(16, context - width))

    def prompts(self, count: int, seed: int) -> tuple[Int[Tensor, "B P"], Int[Tensor, " B"]]:
        """Random tokens of several lengths."""
        generator = torch.Generator().manual_seed(seed)
        known = min(self.lm.vocab_size, len(self.lm.tokenizer))
        ids = torch.randint(known, (count, self.room[0]), generator=generator)
        return ids, torch.arange(count) % self.room[0] + 1

    @functools.cached_property
    def broken(self) -> str:
        """What is not finite; empty where all numbers are."""
        weights = self.lm.model.named_parameters()
        names = [name for name, weight in weights if not bool(weight.isfinite().all())]
        if names:
            return f"{len(names)} weights have NaN or infinite entries, the first {names[0]}"
        finite = bool(self._logprobs().isfinite().all())
        return "" if finite else "log-probabilities of random tokens are NaN or infinite"

    def need_finite(self) -> None:
        """Raises :class:`Skipped` where numbers are not finite: another check says which."""
        if self.broken:
            raise Skipped("weights or log-probabilities are not finite")

    @functools.cached_property
    def drawn(self) -> tuple[Responses, Sampled]:
        """Responses to random prompts of several lengths, sampled in one batch."""
        self.need_finite()
        large = sum(weight.numel() for weight in self.lm.model.parameters()) > LARGE
        ids, lengths = self.prompts(16 if large else 128, seed=0)
        budget = min(self.room[1], 8 if large else 16)
        options: dict[str, Any] = {"max_new_tokens": budget, "rule": self.rule, "pad_id": self.lm.pad_id}
        generator = torch.Generator().manual_seed(0)
        try:
            sampled = sample_responses(self.lm.model, ids, lengths, generator=generator, **options)
        except (RuntimeError, ValueError) as error:
            raise Skipped(f"the model cannot be sampled from: {error}") from None
        return Responses(ids, lengths, sampled.response_ids, sampled.response_lengths), sampled

    @functools.cached_property
    def few(self) -> Responses:
        """Eight prompts with responses, all of them random tokens of unlike lengths."""
        responses, _ = self.prompts(8, seed=1)
        lengths = torch.arange(8).flip(0) % self.room[0] + 1
        return Responses(*self.prompts(8, seed=0), responses, lengths.clamp(max=self.room[1]))

    @functools.cached_property
    def own(self) -> Float[Tensor, "8 T"]:
        """What the model's plain pass over each row of ``few`` says of its response: no batch, padding or cache."""
        self.need_finite()
        return torch.cat([self.plain_logprobs(self.few.select(torch.tensor([row]))) for row in range(8)])

    def scored(self, batch_size: int = 64) -> Float[Tensor, "8 T"]:
        """The same as it is scored in training."""
        self.need_finite()
        return self._logprobs(batch_size)

    def _logprobs(self, batch_size: int = 64) -> Float[Tensor, "8 T"]:
        return response_logprobs(self.lm.model, self.few, self.rule, batch_size=batch_size)

    @torch.no_grad()
    def plain_logprobs(self, row: Responses, left: int = 0) -> Float[Tensor, "1 T"]:
        """Log-probabilities of one response, with ``left`` columns of masked padding before it."""
        prompt, count = int(row.prompt_lengths), int(row.response_lengths)
        real = torch.cat([row.prompt_ids[0, row.prompt_ids.shape[1] - prompt :], row.response_ids[0, :count]])
        ids = torch.cat([real.new_full((left,), self.lm.pad_id), real])[None].to(self.lm.device)
        mask = torch.ones_like(ids)
        mask[:, :left] = 0
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if left:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.lm.model(**inputs).logits[0, left + prompt - 1 : -1].double().cpu()
        chosen = torch.log_softmax(logits, -1).gather(1, row.response_ids[0, :count, None]).squeeze(1)
        out = torch.zeros(1, self.few.response_ids.shape[1])
        out[0, :count] = chosen.float()
        return out
