"""The benchmark of shared lower blocks: both kinds of iteration learn the same, and only one of them shares."""

import torch

from agents.ppo import PPO, PPOConfig
from benchmarks.ppo_speed import frozen_blocks
from textenv.training.memory import sharding


def test_both_ways_learn_the_same_and_one_of_them_shares(make_vector, monkeypatch):
    weights, shared = [], []
    real = frozen_blocks.shared_activations
    monkeypatch.setattr(frozen_blocks, "shared_activations", lambda *models: (shared.append(1), real(*models))[1])
    for together in (True, False):
        agent = PPO(make_vector(8).unwrapped, PPOConfig(batch_size=8, epochs=2, minibatches=1, train_layers=1))
        assert frozen_blocks.iteration(agent, shared=together) > 0
        weights.append(torch.cat([weight.detach().flatten() for weight in agent.actor.parameters()]))
    assert len(shared) == 1
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert sharding.shared_activations is real
    found = frozen_blocks.measure(agent, runs=2)
    assert len(found["ratios"]) == 2
    assert found["seconds"].keys() == {"apart", "together"}
    assert len(shared) == 4
