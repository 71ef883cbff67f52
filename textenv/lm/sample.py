"""Batched decoding: tokens, log-probabilities, values and lengths in one pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from textenv.lm.decoding import decoding
from textenv.lm.distribution import TokenRule

FREE = 1 / 8
"""Share of the slots that must be free before waiting prompts are read: one pass for several is cheaper."""


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
    slots: int | None = None,
    on_tokens: Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], object] | None = None,
) -> Sampled:
    """Draw one response per prompt until a stop token of ``rule`` or ``max_new_tokens``.

    ``generator`` lives on the CPU; with ``greedy=True``, the most likely allowed token is taken. The random numbers of
    every row are drawn ahead, so its tokens do not depend on the other rows. Rows that have ended leave the batch. With
    ``slots``, so many are generated at once, and the others wait for a place. ``on_tokens(rows, tokens)`` hears the
    tokens of each step as soon as they are drawn.

    Raises:
        ValueError: the model gives NaN.
    """
    prompt_ids, prompt_lengths = prompt_ids.to(model.device), prompt_lengths.to(model.device)
    size, slots = len(prompt_ids), slots or len(prompt_ids)
    uniforms = None if greedy else torch.rand(size, max_new_tokens, generator=generator).to(model.device)
    stop = torch.tensor(rule.stop_ids, dtype=torch.int64, device=model.device)
    drawn = _empty(size, max_new_tokens, pad_id, model)
    waiting = torch.arange(size, device=model.device)
    while len(waiting):
        row, waiting = waiting[:slots], waiting[slots:]  # the rows of the result that the running batch fills
        step = torch.zeros_like(row)
        decoder = decoding(model, prompt_ids[row], prompt_lengths[row], max_new_tokens)
        while True:
            logits, hidden = decoder.outputs()
            distribution = rule.logprobs(logits, step)
            token = distribution.argmax(-1) if uniforms is None else _draw(distribution, uniforms[row, step])
            drawn.response_ids[row, step] = token
            drawn.logprobs[row, step] = distribution.gather(1, token[:, None]).squeeze(1)
            if value_head is not None:
                drawn.values[row, step] = value_head(hidden).to(drawn.values.dtype)
            if on_tokens is not None:
                on_tokens(row, token)
            step = step + 1
            drawn.response_lengths[row] = step

            going = _closed_up(~torch.isin(token, stop) & (step < max_new_tokens))
            if len(going) == 0:
                break
            if len(going) < len(row):
                decoder.keep(going)
                row, step, token = row[going], step[going], token[going]
            free = slots - len(row)
            if len(waiting) and free >= FREE * slots and decoder.can_join:
                new, waiting = waiting[:free], waiting[free:]
                decoder.join(prompt_ids[new], prompt_lengths[new])
                row, step = torch.cat([row, new]), torch.cat([step, torch.zeros_like(new)])
                token = torch.cat([token, prompt_ids[new, -1]])
            decoder.append(token)
    if bool(drawn.logprobs.isnan().any()):
        broken = "a model must give log-probabilities that are numbers, got NaN"
        raise ValueError(f"{broken}. In training: it diverged, lower the learning rate. Else its weights are damaged.")
    return Sampled(*(field.cpu() for field in drawn))


def _empty(size: int, max_new_tokens: int, pad_id: int, model: PreTrainedModel) -> Sampled:
    """Padding on the model's device, to be filled."""
    ids = torch.full((size, max_new_tokens), pad_id, dtype=torch.int64, device=model.device)
    zeros = ids.new_zeros(ids.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    return Sampled(ids, ids.new_zeros(size), zeros, zeros.clone())


def _draw(logprobs: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token in whose share of the unit interval each row's number falls (inverse transform sampling)."""
    # CPUs add up in double precision and round the sums; elsewhere only doubles make sure that they never fall.
    exact = logprobs.dtype if logprobs.device.type == "cpu" else torch.float64
    cumulated = logprobs.exp().cumsum(-1, dtype=exact)
    token = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logprobs.shape[1] - 1)  # beyond only of a model that gives NaN


def _closed_up(going: Bool[Tensor, " B"]) -> Int[Tensor, " n"]:
    """The rows that go on: those at the end take the places of rows that have ended, the others stay where they are."""
    going_on = going.nonzero().squeeze(1)
    count = len(going_on)
    index = torch.arange(count, device=going.device)
    free = ~going[:count]
    index[free] = going_on[count - int(free.sum()) :]
    return index
