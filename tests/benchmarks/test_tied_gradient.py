"""The benchmark of the tied gradient: both sides have one loss, and one of them has no link."""

import torch

from benchmarks.ppo_speed import tied_gradient
from textenv.lm.kernels import tied

SMALL = {"hidden_size": 12, "intermediate_size": 8, "num_attention_heads": 3, "vocab_size": 300}


def test_both_sides_are_timed_on_one_loss_and_only_ours_is_linked(monkeypatch):
    linked = []
    monkeypatch.setattr(tied.Link, "take", lambda link, take=tied.Link.take: linked.append(take(link)) or linked[-1])
    model = tied_gradient.tied_model(1, **SMALL)
    for dtype in (torch.float32, torch.bfloat16):
        found = tied_gradient.measure(model, dtype, runs=2)
        assert found["seconds"].keys() == {"pytorch", "ours"}
        assert found["ratio"] > 0
    assert len(linked) == 2 * 3  # ours alone: once a pass, the uncounted one too
    assert all(left is not None and left.shape == (300, 12) for left in linked)
