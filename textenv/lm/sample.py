"""Batched decoding: tokens, log-probabilities, values and lengths in one pass."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from textenv.lm.decoding import decoding
from textenv.lm.distribution import TokenRule


class Sampled(NamedTuple):
    """Responses drawn from a policy, with all that a learner needs to know about the draw."""

    response_ids: Int[Tensor, "B T"]
    """Right-padded; the ending token included."""
    response_lengths: Int[Tensor, " B"]
    logprobs: Float[Tensor, "B T"]
    """Log-probabilities of the chosen tokens under the distribution they were drawn from; zeros on padding."""
    values: Float[Tensor, "B T"]
    """Value of the state *before* each token; zeros on padding and without a value head."""


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompt_ids: Int[Tensor, "B P"],
    prompt_lengths: Int[Tensor, " B"],
    *,
    max_new_tokens: int,
    rule: TokenRule,
    pad_id: int,
    generator: torch.Generator | None = None,
    greedy: bool = False,
    value_head: nn.Module | None = None,
) -> Sampled:
    """Draw one response per prompt until a stop token of ``rule`` or ``max_new_tokens``.

    ``generator`` lives on the CPU (a seed draws the same tokens whatever else runs); None with ``greedy=True`` takes
    the most likely allowed token. Rows that have ended leave the batch once they are half of it.
    """
    device = model.device
    width = int(prompt_lengths.max())
    prompt_ids = prompt_ids[:, prompt_ids.shape[1] - width :].to(device)
    size = len(prompt_ids)

    response_ids = torch.full((size, max_new_tokens), pad_id, dtype=torch.int64)
    lengths = torch.full((size,), max_new_tokens, dtype=torch.int64)
    logprobs = torch.zeros(size, max_new_tokens, dtype=torch.promote_types(model.dtype, torch.float32))
    values = torch.zeros_like(logprobs)
    stop = torch.tensor(rule.stop_ids, dtype=torch.int64)

    row = torch.arange(size)  # which row of the result each row of the running batch fills
    running = torch.ones(size, dtype=torch.bool)
    decoder = decoding(model, prompt_ids, prompt_lengths.to(device))
    for step in range(max_new_tokens):
        logits, hidden = decoder.outputs()
        distribution = rule.logprobs(logits, torch.full((len(row),), step, device=device))
        chosen = distribution.argmax(-1).cpu() if greedy else _draw(distribution, generator)
        live = row[running]
        response_ids[live, step] = chosen[running]
        logprobs[live, step] = distribution.cpu().gather(1, chosen[:, None]).squeeze(1)[running]
        if value_head is not None:
            values[live, step] = value_head(hidden).cpu()[running].to(values.dtype)

        ended = running & torch.isin(chosen, stop)
        lengths[row[ended]] = step + 1
        running = running & ~ended
        count = int(running.sum())
        if count == 0 or step + 1 == max_new_tokens:
            break
        decoder.append(chosen.to(device))
        if count <= len(row) // 2:
            keep = running.nonzero().squeeze(1)
            decoder.keep(keep.to(device))
            row, running = row[keep], running[keep]
    return Sampled(response_ids, lengths, logprobs, values)


def _draw(logprobs: Float[Tensor, "B V"], generator: torch.Generator | None) -> Int[Tensor, " B"]:
    """One token per row, drawn on the CPU."""
    return torch.multinomial(logprobs.exp().cpu(), 1, generator=generator).squeeze(1)
