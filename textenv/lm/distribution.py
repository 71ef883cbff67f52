"""The one next-token distribution: what is sampled is what is scored."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from textenv.settings import Count, Positive, check_settings


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """How logits become a distribution over the next token, for policy and reference alike.

    ``π(a | s) ∝ exp(logits_a / temperature)`` over the allowed tokens. Top-k, top-p and repetition penalties are
    left out on purpose: they would make the sampled distribution differ from the scored one.
    """

    temperature: Annotated[Positive, "Use deterministic prediction for greedy decoding."] = 1.0
    """Divides the logits. Higher is more random."""
    min_new_tokens: Count = 0
    """Ending tokens are forbidden before this many response tokens."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a response (EOS first)."""

    def __post_init__(self) -> None:
        check_settings(self)

    def allowed(self, steps: Int[Tensor, " n"], vocabulary: int) -> Bool[Tensor, "n V"] | None:
        """Which tokens may be chosen as response token number ``steps`` (from 0); None if there is no restriction."""
        if self.min_new_tokens == 0 or not self.stop_ids:
            return None
        allowed = torch.ones(len(steps), vocabulary, dtype=torch.bool, device=steps.device)
        early = steps < self.min_new_tokens
        for stop in self.stop_ids:
            allowed[:, stop] = ~early
        return allowed

    def logprobs(self, logits: Float[Tensor, "n V"], steps: Int[Tensor, " n"]) -> Float[Tensor, "n V"]:
        """Log-probabilities of every token as response token number ``steps``; −inf where forbidden."""
        if self.temperature != 1.0:
            logits = logits / self.temperature
        allowed = self.allowed(steps, logits.shape[-1])
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        return torch.log_softmax(logits, dim=-1)
