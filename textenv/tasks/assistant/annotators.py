"""Simulated annotators: they rank answers by gold score plus Gumbel noise, which is the Plackett–Luce model.

P(ranking) = Π_k exp(g_k / τ) / Σ_{j ≥ k} exp(g_j / τ), so the chance that answer a is ranked above answer b is
σ((g_a − g_b) / τ), whatever the other answers are. Source: R. D. Luce (1959); R. L. Plackett (1975).
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from textenv.settings import Positive, check_value
from textenv.tasks.assistant.gold import gold_scores

ANNOTATOR_TEMPERATURE = 0.75
"""τ, in units of gold. Larger is noisier; at this value, pairs of SFT answers have a Bayes accuracy near 0.77."""


def rank(gold: Sequence[float], rng: np.random.Generator, temperature: float = ANNOTATOR_TEMPERATURE) -> list[int]:
    """One annotator's ranking: indices into ``gold``, best first."""
    check_value("temperature", temperature, Annotated[Positive, "Use a small one for no noise."])
    noisy = np.asarray(gold, dtype=np.float64) / temperature + rng.gumbel(size=len(gold))
    return [int(index) for index in np.argsort(-noisy)]


def sample_rankings(
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    seed: int,
    *,
    finish_reasons: Sequence[Sequence[str]] | None = None,
    temperature: float = ANNOTATOR_TEMPERATURE,
) -> list[dict[str, Any]]:
    """Rank the responses to each prompt once: records ``{"prompt", "responses", "ranking"}``."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for row, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
        reasons = None if finish_reasons is None else list(finish_reasons[row])
        gold = gold_scores([prompt] * len(answers), list(answers), finish_reason=reasons)
        records.append({"prompt": prompt, "responses": list(answers), "ranking": rank(gold, rng, temperature)})
    return records
