"""Log-probabilities of given responses, by teacher forcing."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from textenv.lm.batch import Responses, length_buckets, rows
from textenv.lm.distribution import TokenRule
from textenv.lm.load import run


def response_outputs(
    model: PreTrainedModel, batch: Responses, rule: TokenRule
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n H"]]:
    """Log-probabilities over the vocabulary, and hidden states, at the ``n`` real response positions.

    The order is that of ``batch.response_mask``: row by row, step by step. The LM head runs on these positions only.
    """
    joined = rows(batch)
    mask = batch.response_mask
    # All ones: the padding lies on the right, where a causal model never looks, and no mask means the fast kernel.
    outputs, _ = run(model, joined.input_ids, attention_mask=torch.ones_like(joined.input_ids), use_cache=False)
    row, step = mask.nonzero(as_tuple=True)
    logits, hidden = outputs.at((row, joined.predictors[row, step]))
    return rule.logprobs(logits, step), hidden


def gather_predictions(flat: Float[Tensor, " n"], batch: Responses) -> Float[Tensor, "B T"]:
    """Put values of the real response positions back into ``[B, T]``; exact zeros on padding."""
    out = flat.new_zeros(batch.response_ids.shape)
    return out.masked_scatter(batch.response_mask, flat)


def token_logprobs(logprobs: Float[Tensor, "n V"], batch: Responses) -> Float[Tensor, " n"]:
    """Pick the log-probability of each real response token."""
    chosen = batch.response_ids[batch.response_mask]
    return logprobs.gather(1, chosen[:, None]).squeeze(1)


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
        logprobs, _ = response_outputs(model, part, rule)
        picked = gather_predictions(token_logprobs(logprobs, part), part)
        out[index, : picked.shape[1]] = picked.cpu()
    return out
