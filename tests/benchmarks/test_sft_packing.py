"""The benchmark of packing: its sides learn the same, and its lengths are as mixed as it says."""

import pytest

from benchmarks.sft_packing import __main__ as sft_packing

TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 256}


@pytest.mark.parametrize("similar", [True, False])
def test_three_sides_that_learn_the_same_from_lengths_of_a_third(similar, monkeypatch):
    monkeypatch.setitem(sft_packing.SIZES, "gpt2", TINY)
    monkeypatch.setattr(sft_packing, "VOCABULARY", 32)
    found = sft_packing.measure("gpt2", similar=similar, steps=2, size=16, seed=0)  # asserts that losses agree
    assert found["mean_share_of_longest"] == pytest.approx(1 / 3, abs=0.03)
    assert found["greatest_loss_difference"] > 0
    assert (found["padding_share"] < 0.1) is similar
    assert found["tokens_per_second"].keys() == {"packed", "padded", "transformers"}
