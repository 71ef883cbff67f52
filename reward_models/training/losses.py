"""Pure losses of reward models: scores in, one number per prompt out. Axes: B prompts, K responses, best first."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


def ranking_nll(
    scores: Float[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    margin: Float[Tensor, " B"] | None = None,
    *,
    ranks: Int[Tensor, "B K"] | None = None,
    label_smoothing: float = 0.0,
    tie_strength: float = 0.0,
) -> Float[Tensor, " B"]:
    """Mean over all pairs ``i`` before ``j`` of a prompt of ``−log P(i ≻ j)``, or ``−log P(i ~ j)`` for a tie, in nats.

    ``scores`` stand from best to worst; ``mask`` is True on real responses, of which each prompt has two or more. With
    g = s_i − s_j − margin:

    * ``P(i ≻ j) = σ(g)``, Bradley–Terry (1952). All C(K, 2) pairs of a prompt are one item, since they share its
      responses (Ouyang et al. 2022, § 3.5).
    * ``label_smoothing`` ε: the annotator is taken to have said the opposite with probability ε; the loss is
      ``−(1 − ε) log σ(g) − ε log σ(−g)``, whose minimum is at log-odds log((1 − ε)/ε) (Mitchell 2023).
    * Pairs of equal ``ranks`` (default: none) are ties. ``tie_strength`` ν > 0 is Davidson's (1970) model,
      ``P(i ≻ j) = 1/(1 + e^−g + ν e^−g/2)`` and ``P(i ~ j) = ν e^−g/2 P(i ≻ j)``, for every pair. Its limit ν → 0, less
      a constant, is ν = 0: a tie is half a win each way, other pairs are Bradley–Terry. Margins play no part in ties.
    """
    gaps, pairs = _pairs(scores, mask)
    tied = pairs & _tied(ranks) if ranks is not None else torch.zeros_like(pairs)
    if margin is not None:
        gaps = torch.where(tied, gaps, gaps - margin[:, None, None])
    if tie_strength > 0:
        odds = torch.stack([torch.zeros_like(gaps), -gaps, math.log(tie_strength) - gaps / 2])
        nll = odds.logsumexp(0) - math.log(tie_strength) * tied
    else:
        nll = -functional.logsigmoid(gaps)
    nll = nll + torch.where(tied, 0.5 * gaps, label_smoothing * gaps)
    return nll.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2))


def plackett_luce_nll(scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """``Σ_i [log Σ_{j ≥ i} exp(s_j) − s_i] / (K − 1)``: minus the log-likelihood of a whole ranking, a choice, in nats.

    The ranking is read as K − 1 choices: the best of all, then the best of the rest. With K = 2 this is
    :func:`ranking_nll`; with more it is the likelihood of annotators who rank by score plus Gumbel noise, where the
    mean over pairs counts one such choice several times (Luce 1959; Plackett 1975).
    """
    hidden = scores.masked_fill(~mask, float("-inf"))
    rest = hidden.flip(1).logcumsumexp(1).flip(1)
    nll = (rest.masked_fill(~mask, 0.0) - scores.masked_fill(~mask, 0.0)).sum(1)
    return nll / (mask.sum(1) - 1)


def centre_penalty(scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Squared mean of each prompt's scores: comparisons leave it free, this draws it to 0 (Eisenstein et al. 2023).

    With K = 2 a quarter of ``(s_i + s_j)²``, the form in which others write it.
    """
    return (scores.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).square()


def _tied(ranks: Int[Tensor, "B K"]) -> Bool[Tensor, "B K K"]:
    return ranks[:, :, None] == ranks[:, None, :]


def _pairs(
    scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> tuple[Float[Tensor, "B K K"], Bool[Tensor, "B K K"]]:
    """``s_i − s_j`` (exactly 0 where padded) and which ``(i, j)`` are pairs: i better than j, both real."""
    scores = scores.masked_fill(~mask, 0.0)
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(diagonal=1)
    return scores[:, :, None] - scores[:, None, :], pairs
