"""Pure losses of reward models: scores in, one number a prompt out. Axes: B prompts, K responses, best first."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def ranking_nll(
    scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], margin: Float[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """Mean over all pairs ``i`` before ``j`` of a prompt of ``−log σ(s_i − s_j − margin)``, in nats.

    ``scores`` stand from best to worst; ``mask`` is True on real responses, of which each prompt has two or more. With
    K = 2 this is the Bradley–Terry negative log-likelihood. All C(K, 2) pairs of a prompt are one item, since they
    share its responses (Ouyang et al. 2022, § 3.5).
    """
    gaps, pairs = _pairs(scores, mask)
    if margin is not None:
        gaps = gaps - margin[:, None, None]
    nll = -functional.logsigmoid(gaps).masked_fill(~pairs, 0.0)
    return nll.sum((1, 2)) / pairs.sum((1, 2))


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


def ranking_loss(
    scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], margin: Float[Tensor, " B"] | None = None
) -> Float[Tensor, ""]:
    """:func:`ranking_nll` averaged over prompts, each of equal weight however many responses it has."""
    return ranking_nll(scores, mask, margin).mean()


def ranking_accuracy(scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Share of the pairs of each prompt that the scores order right; a tie counts one half."""
    gaps, pairs = _pairs(scores, mask)
    right = (gaps > 0).to(scores.dtype) + 0.5 * (gaps == 0).to(scores.dtype)
    return right.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2))


def _pairs(
    scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> tuple[Float[Tensor, "B K K"], Bool[Tensor, "B K K"]]:
    """``s_i − s_j`` (exactly 0 where padded) and which ``(i, j)`` are pairs: i better than j, both real."""
    scores = scores.masked_fill(~mask, 0.0)
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(diagonal=1)
    return scores[:, :, None] - scores[:, None, :], pairs
