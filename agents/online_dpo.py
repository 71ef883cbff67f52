"""Online direct preference optimisation: pairs of the policy's own responses, judged by the environment.

Objective: that of PPO, ``max_π E[r(x, y)] − β KL(π ‖ π_ref)``, without a value function. With the log-ratio
``h(y) = log π(y|x) − log π_ref(y|x)``, every pair of responses to a prompt has the loss of a Bradley–Terry model whose
scores are the implicit rewards β h,

    − p log σ(β (h(y₁) − h(y₂))) − (1 − p) log σ(β (h(y₂) − h(y₁))),    p = P(y₁ is better than y₂).

β is the environment's ``kl_coef``, for this reason: ``soft_labels`` (the default) take the score r before the KL as the
log-odds, ``p = σ(r(y₁) − r(y₂))``. Then the loss of *every* pair is least where ``β (h₁ − h₂) = r₁ − r₂``, so its only
optimum is ``π ∝ π_ref exp(r/β)``, the optimum of the objective, whichever policy with all responses drew the pairs.
Where differences are small the gradient is RLOO's for two responses, ``β/4 · (R₁ − R₂) ∇(log π₁ − log π₂)`` with the
returns R = r − β h; larger ones count for less. Labels drawn from p would have the same mean gradient and more noise.

How this differs from the paper:

1. Hard labels (``soft_labels=False``: p is 1, or ½ for equal scores), as an annotator gives them in the paper, have no
   such optimum: each pair's loss falls for ever as its gap grows, so β limits the speed and not the distance from the
   reference (Azar et al. 2024). Such a run must be stopped in time.
2. The judge is the reward model of the environment. A score of another scale is another Bradley–Terry model.
3. With more than two responses to a prompt all their pairs count; a prompt's loss is the mean over them.
4. The reference's log-probabilities are those of the environment's KL, so no pass over the reference is added. The
   gradient is ``Σ ∂loss/∂h(y) ∇log π(y)``: a pass without gradient first tells all h, so that micro-batches may split
   pairs. One step per batch does without, since h is then known from the episodes.

References: Guo et al. 2024 (online DPO); Rafailov et al. 2023 (DPO); Azar et al. 2024 (IPO).

Command: ``textenv online-dpo --env-id textenv/Assistant-v0``.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from agents.core.actor import Evaluated
from agents.core.checkpoint import CheckpointedLearner
from agents.core.group import GroupConfig, on_every_token
from agents.core.learner import MicroBatch
from agents.core.losses import Loss
from agents.core.returns import Advantages
from agents.core.rollout import Rollout
from textenv.lm import LanguageModel, response_logprobs
from textenv.training.processes import together
from textenv.vector import TextVectorEnv


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(GroupConfig):
    """Settings of online DPO. β is the environment's ``kl_coef``, which must be above 0."""

    soft_labels: bool = True
    """The chance that a response is better is σ(difference of scores). False: the higher score is always better, which
    pushes gaps apart without end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = self.batch_size // self.group_size
        if self.minibatches > groups:
            rule = f"minibatches must be batch_size / group_size ({groups}) or less"
            raise ValueError(f"{rule}, got {self.minibatches}. Each needs the responses to one prompt.")


class Pairs(NamedTuple):
    """All pairs of responses to the same prompt: G prompts, C pairs each."""

    gaps: Float[Tensor, "G C"]
    """Implicit reward of the first response minus that of the second, β (h₁ − h₂)."""
    labels: Float[Tensor, "G C"]
    """Chance that the first is better."""

    @property
    def losses(self) -> Float[Tensor, " G"]:
        """Mean over each prompt's pairs of the negative log-likelihood, nats."""
        return binary_cross_entropy_with_logits(self.gaps, self.labels, reduction="none").mean(1)

    @property
    def accuracy(self) -> Float[Tensor, ""]:
        """Share of the pairs that the implicit reward orders as the labels do; a tie counts one half."""
        return (1 + (self.gaps * (self.labels - 0.5)).sign()).mean() / 2

    @property
    def margin(self) -> Float[Tensor, ""]:
        """Mean gap in favour of the better response."""
        return (self.gaps * (self.labels - 0.5).sign()).mean()


def pairs_of(
    log_ratios: Float[Tensor, " B"], scores: Float[Tensor, " B"], group_size: int, *, beta: float, soft_labels: bool
) -> Pairs:
    """The pairs within groups of consecutive responses. Scores that differ by their rounding alone are equal."""
    first, second = torch.triu_indices(group_size, group_size, offset=1)
    ratios, groups = log_ratios.view(-1, group_size), scores.view(-1, group_size)
    one, other = groups[:, first], groups[:, second]
    difference = torch.where(torch.isclose(one, other, rtol=1e-5, atol=1e-5), 0.0, one - other)
    labels = torch.sigmoid(difference) if soft_labels else (1 + difference.sign()) / 2
    return Pairs(beta * (ratios[:, first] - ratios[:, second]), labels)


@final
class OnlineDPO(CheckpointedLearner[OnlineDPOConfig]):
    """Direct preference optimisation on pairs of the policy's own responses, judged by the environment's reward."""

    config_type = OnlineDPOConfig

    def __init__(
        self, env: TextVectorEnv, config: OnlineDPOConfig | None = None, policy: LanguageModel | None = None
    ) -> None:
        source = env.task.config.kl_source
        if source not in ("auto", "reported"):
            rule = "kl_source must be 'auto' or 'reported' for online DPO, which reads the reference off the KL"
            raise ValueError(f"{rule}, got {source!r}. Leave kl_source out.")
        if env.kl_coef <= 0:
            rule = "kl_coef must be above 0 for online DPO, whose β it is"
            raise ValueError(f"{rule}, got {env.kl_coef}. Raise it, or use RLOO.")
        super().__init__(env, config, policy)

    def advantages(self, rollout: Rollout) -> Advantages:
        """How strongly each response is pulled up, −∂loss/∂h, by the policy that drew it."""
        return self._pulls(rollout, rollout.kl_per_token)[0]

    def loss(self, new: Evaluated, old: MicroBatch) -> Loss:
        """−Σ pull · log π(y) over prompts: the gradient of the pairs' loss, a response at a time."""
        pulls, logprobs = (torch.where(old.mask, x, 0.0) for x in (old.advantages, new.logprobs))
        return Loss(-(pulls * logprobs).sum() * self.config.group_size / old.episodes, {})

    def minibatches(self, rollout: Rollout) -> list[Int[Tensor, " n"]]:
        """Whole groups: what two responses have in common cancels where both are in the same step."""
        size = self.config.group_size
        groups = torch.randperm(len(rollout.rewards) // size, generator=self.generator)
        rows = groups[:, None] * size + torch.arange(size)
        return [part.flatten() for part in rows.tensor_split(self.config.minibatches)]

    def step(self, rollout: Rollout, targets: Advantages, index: Int[Tensor, " n"]) -> dict[str, float]:
        """One optimiser step on whole groups, with the pulls of the policy as it now is."""
        log_ratios = rollout.kl_per_token
        if self.config.epochs * self.config.minibatches > 1:
            log_ratios = log_ratios + sum(together(self._moved(rollout, index)))
        targets, pairs = self._pulls(rollout, log_ratios)
        chosen = index[:: self.config.group_size] // self.config.group_size
        pairs = Pairs(pairs.gaps[chosen], pairs.labels[chosen])
        figures = {"policy_loss": pairs.losses.mean(), "pair_accuracy": pairs.accuracy, "margin": pairs.margin}
        return {name: figure.item() for name, figure in figures.items()} | super().step(rollout, targets, index)

    def _moved(self, rollout: Rollout, index: Int[Tensor, " n"]) -> Float[Tensor, "B T"]:
        """How the log-probabilities of the share of this process in ``index`` have changed since they were played."""
        moved = torch.zeros_like(rollout.logprobs)
        for chosen, counts in self.shards.passes(index, rollout.tokens.total_lengths, **self.config.limits):
            batch = rollout.tokens.select(chosen), self.task.rule
            score = partial(response_logprobs, self.policy.model, *batch, batch_size=len(chosen))
            with self.task.precision():
                logprobs = self.shards(score)
            if counts:
                moved[chosen, : logprobs.shape[1]] = logprobs - rollout.logprobs[chosen, : logprobs.shape[1]]
        return moved

    def _pulls(self, rollout: Rollout, log_ratios: Float[Tensor, "B T"]) -> tuple[Advantages, Pairs]:
        """``(pulls on every token, pairs)`` where a response has the log-ratios of its tokens."""
        config, mask = self.config, rollout.tokens.response_mask
        h = torch.where(mask, log_ratios, 0.0).sum(1).requires_grad_()
        pairs = pairs_of(h, rollout.scores, config.group_size, beta=rollout.kl_coef, soft_labels=config.soft_labels)
        (slopes,) = torch.autograd.grad(pairs.losses.sum(), h)
        pairs = Pairs(pairs.gaps.detach(), pairs.labels)
        return Advantages(on_every_token(-slopes, mask), torch.zeros_like(log_ratios)), pairs


if __name__ == "__main__":
    from textenv.cli import run_command

    run_command("online-dpo")
