"""Best-of-n: draw n responses a prompt, keep the one that the reward model likes best.

The chosen response follows no policy that was trained. Its KL to the policy it was drawn from is at most
``log n − (n − 1)/n`` nats, and equals that only when no two responses to a prompt tie; so it is reported as a bound.

References: Stiennon et al. 2020; on the bound, Beirami et al. 2024.
"""

import math

import numpy as np

from textenv.evaluation import Evaluation


def best_of_n(samples: list[Evaluation]) -> Evaluation:
    """Of n evaluations of the same prompts, each prompt's response with the highest ``rm_score`` (first on ties)."""
    if not samples or any((s.prompt_ids != samples[0].prompt_ids).any() for s in samples):
        raise ValueError(f"best_of_n needs n ≥ 1 evaluations of the same prompts, with n (={len(samples)}).")
    best = np.argmax([s.rm_scores for s in samples], axis=0)
    rows = np.arange(len(best))

    def pick(name: str) -> np.ndarray:
        return np.asarray([getattr(s, name) for s in samples])[best, rows]

    return samples[0]._replace(
        responses=list(pick("responses")),
        rewards=pick("rewards"),
        rm_scores=pick("rm_scores"),
        kl=None,
        gold=None if samples[0].gold is None else pick("gold"),
        lengths=pick("lengths"),
        finish_reasons=list(pick("finish_reasons")),
    )


def kl_bound(n: int) -> float:
    """Upper bound of the KL of best-of-n to the policy it draws from, in nats."""
    return math.log(n) - (n - 1) / n
