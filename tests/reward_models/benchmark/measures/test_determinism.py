"""A text must score the same whatever it is batched with."""

import math

import numpy as np
import pytest
import torch

from reward_models.benchmark import run_benchmark
from reward_models.scorers.transformer import TransformerRewardModel
from tests.conftest import tiny_model
from tests.reward_models.benchmark.models import CONFIG, length


def batch_dependent(prompts, completions, **columns):
    """Scores against the mean of the batch, as some normalising wrappers do."""
    values = np.array([float(len(text)) for text in completions])
    return (values - values.mean()).tolist()


def order_dependent(prompts, completions, **columns):
    return [len(text) + 0.1 * place for place, text in enumerate(completions)]


def test_scores_that_depend_on_the_batch_or_the_order_are_caught(suite):
    small = suite._replace(pool=None)
    for broken, varied in ((batch_dependent, "batches of 8"), (order_dependent, "shuffled")):
        report = run_benchmark(broken, small, CONFIG)
        assert report.determinism.changes[varied] > 1e-2
        assert not report.determinism.passed
        assert any("depend on more than their text" in flag for flag in report.flags)
    calls = iter(range(10**6))
    report = run_benchmark(lambda p, c, **k: [len(text) + 1e-2 * next(calls) for text in c], small, CONFIG)
    assert report.determinism.changes["asked again"] > 0
    assert run_benchmark(length, small, CONFIG).determinism.worst == 0.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_transformer_is_padded_on_the_left_too_and_scores_the_same(family):
    model = TransformerRewardModel.from_language_model(tiny_model(family))
    model.model.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    records = [
        {"prompt": "what is the sky ?" * (1 + i % 3), "chosen": "blue " * (1 + i % 7), "rejected": "red"}
        for i in range(40)
    ]
    report = run_benchmark(model, records, CONFIG)
    assert report.determinism.changes["left padding"] < 1e-4
    assert report.determinism.passed
    assert report.throughput.token_unit == "tokens"
    assert "EOS only" in report.probes
    # Of a plain callable nobody can ask for padding.
    assert "left padding" not in run_benchmark(lambda p, c, **k: model(p, c), records, CONFIG).determinism.changes


def test_the_largest_change_is_reported_in_deviations_within_a_prompt():
    # Deviations within a prompt √2, whatever lies between prompts; each time asked, one text gains 0.01 more.
    records = [{"prompt": "x" * (1 + i), "chosen": f"aa{i}", "rejected": f"{i}"} for i in range(9)]
    calls = iter(range(10**6))

    def drifting(prompts, completions, **columns):
        drift = 0.01 * next(calls)
        return [
            100.0 * len(prompt) + len(text) + drift * (text == "aa4")
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    found = run_benchmark(drifting, records, CONFIG).determinism
    assert found.changes["asked again"] == pytest.approx(0.01 / math.sqrt(2))
