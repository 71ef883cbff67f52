"""Batched decoding: tokens, log-probabilities, values and lengths in one pass."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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

    ``generator`` lives on the CPU; with ``greedy=True``, the most likely allowed token is taken. The random numbers of
    every row are drawn ahead, so its tokens do not depend on the other rows. Rows that have ended leave the batch.
    """
    device, size = model.device, len(prompt_ids)
    width = int(prompt_lengths.max())
    prompt_ids = prompt_ids[:, prompt_ids.shape[1] - width :].to(device)
    uniforms = None if greedy else torch.rand(size, max_new_tokens, generator=generator).to(device)
    stop = torch.tensor(rule.stop_ids, dtype=torch.int64, device=device)

    response_ids = torch.full((size, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    lengths = torch.zeros(size, dtype=torch.int64, device=device)
    exact = torch.promote_types(model.dtype, torch.float32)
    logprobs = torch.zeros(size, max_new_tokens, dtype=exact, device=device)
    values = torch.zeros_like(logprobs)

    row = torch.arange(size, device=device)  # which row of the result each row of the running batch fills
    decoder = decoding(model, prompt_ids, prompt_lengths.to(device), max_new_tokens)
    for step in range(max_new_tokens):
        logits, hidden = decoder.outputs()
        distribution = rule.logprobs(logits, torch.full_like(row, step))
        chosen = distribution.argmax(-1) if uniforms is None else _draw(distribution, uniforms[row, step])
        response_ids[row, step] = chosen
        logprobs[row, step] = distribution.gather(1, chosen[:, None]).squeeze(1)
        if value_head is not None:
            values[row, step] = value_head(hidden).to(values.dtype)
        lengths[row] = step + 1

        index = _closed_up(~torch.isin(chosen, stop))
        if len(index) == 0 or step + 1 == max_new_tokens:
            break
        if len(index) < len(row):
            decoder.keep(index)
            row, chosen = row[index], chosen[index]
        decoder.append(chosen)
    return Sampled(*(x.cpu() for x in (response_ids, lengths, logprobs, values)))


def _draw(logprobs: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token in whose share of the unit interval each row's number falls (inverse transform sampling)."""
    # CPUs add up in double precision and round the sums; elsewhere only doubles make sure that they never fall.
    exact = logprobs.dtype if logprobs.device.type == "cpu" else torch.float64
    cumulated = logprobs.exp().cumsum(-1, dtype=exact)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True).squeeze(1)


def _closed_up(going: Bool[Tensor, " B"]) -> Int[Tensor, " n"]:
    """The rows that go on: those at the end take the places of rows that have ended, the others stay where they are."""
    going_on = going.nonzero().squeeze(1)
    count = len(going_on)
    index = torch.arange(count, device=going.device)
    free = ~going[:count]
    index[free] = going_on[count - int(free.sum()) :]
    return index
