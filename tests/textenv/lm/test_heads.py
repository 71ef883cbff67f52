"""The value function's head: drawn with its seed alone, and zero before it has learned."""

import torch

from textenv.lm import ValueHead


def test_a_value_head_is_that_of_its_seed_and_says_zero():
    before = torch.get_rng_state()
    one, same, other = (ValueHead(8, seed).features.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert (one != other).float().mean() > 0.9
    assert not ValueHead(8, 3)(torch.randn(2, 5, 8)).any()
