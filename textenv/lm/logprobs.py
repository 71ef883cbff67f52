"""Log-probabilities of given responses, by teacher forcing."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from textenv.lm.batch import Responses, length_buckets
from textenv.lm.distribution import TokenRule
from textenv.lm.packing import run_rows, spare_rows

MAX_LOGITS = 2**25
"""Logits of one part of a pass: 128 MiB in float32."""


class TokenScores(NamedTuple):
    """What a model says about given responses, at their ``n`` real positions, in the order of ``response_mask``."""

    logprobs: Float[Tensor, " n"]
    """Log-probability of each response token given what precedes it."""
    hidden: Float[Tensor, "n H"]
    """Hidden state before each token."""
    entropy: Float[Tensor, " n"] | None
    """Entropy of the whole next-token distribution, in nats; None unless asked for."""


def response_scores(model: PreTrainedModel, batch: Responses, rule: TokenRule, *, entropy: bool = False) -> TokenScores:
    """Score given responses by one pass, with gradient.

    The LM head runs on the response positions alone. Where they have more than ``MAX_LOGITS`` logits, it runs on a part
    of them at a time, and again for the gradient, so that the logits of a large vocabulary never exist as a whole.
    """
    outputs, (row, column) = run_rows(model, batch)
    step = batch.response_mask.nonzero()[:, 1]
    count = len(step)
    spare = (0, spare_rows(count, step.device))  # so many more at position 0, dropped again
    rows, columns, steps = (pad(x, spare) for x in (row, column, step))
    tokens = pad(batch.response_ids[batch.response_mask], spare)

    def part(at: slice) -> tuple[Tensor, ...]:
        logits, _ = outputs.at((rows[at], columns[at]))
        logprobs = rule.logprobs(logits, steps[at])
        chosen = logprobs.gather(1, tokens[at, None]).squeeze(1)
        if not entropy:
            return (chosen,)
        finite = torch.where(logprobs.isfinite(), logprobs, 0.0)
        return chosen, -(finite.exp() * finite).sum(-1)

    size = max(1, MAX_LOGITS // model.config.vocab_size)
    parts = [slice(start, start + size) for start in range(0, len(tokens), size)] or [slice(None)]
    if len(parts) > 1 and outputs.hidden.requires_grad:
        done = [checkpoint(part, at, use_reentrant=False, preserve_rng_state=False) for at in parts]
    else:
        done = [part(at) for at in parts]
    figures = [torch.cat(figure)[:count] for figure in zip(*done, strict=True)]
    return TokenScores(figures[0], outputs.hidden[row, column], figures[1] if entropy else None)


def response_outputs(
    model: PreTrainedModel, batch: Responses, rule: TokenRule
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n H"]]:
    """Log-probabilities over the whole vocabulary, and hidden states, at the ``n`` real response positions.

    For vocabularies small enough to be enumerated; :func:`response_scores` holds no table.
    """
    outputs, index = run_rows(model, batch)
    logits, hidden = outputs.at(index)
    return rule.logprobs(logits, batch.response_mask.nonzero()[:, 1]), hidden


def response_hidden(model: PreTrainedModel, batch: Responses) -> Float[Tensor, "n H"]:
    """Hidden states before each of the ``n`` real response tokens."""
    outputs, index = run_rows(model, batch)
    return outputs.hidden[index]


def gather_predictions(flat: Float[Tensor, " n"], batch: Responses) -> Float[Tensor, "B T"]:
    """Put values of the real response positions back into ``[B, T]``; exact zeros on padding."""
    out = flat.new_zeros(batch.response_ids.shape)
    return out.masked_scatter(batch.response_mask, flat)


@torch.no_grad()
def response_logprobs(
    model: PreTrainedModel, batch: Responses, rule: TokenRule, *, batch_size: int = 64
) -> Float[Tensor, "B T"]:
    """Log-probability of every response token given what precedes it; zeros on padding. No gradient.

    ``logprobs[b, t] = log π(y_t | x, y_<t)`` under ``rule``. Rows are scored in chunks of ``batch_size`` of similar
    length; the result does not depend on the chunks (to float rounding).
    """
    out = torch.zeros(batch.response_ids.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    for index in length_buckets(batch.total_lengths, batch_size):
        part = batch.select(index).to(model.device)
        picked = gather_predictions(response_scores(model, part, rule).logprobs, part)
        out[index, : picked.shape[1]] = picked.cpu()
    return out
