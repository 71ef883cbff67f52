"""The benchmark of shared lower blocks: both kinds of iteration learn the same, and one runs fewer blocks."""

import torch

from agents.ppo import PPO, PPOConfig
from benchmarks.ppo_speed import frozen_blocks
from textenv.lm.frozen import blocks_of


def test_both_ways_learn_the_same_and_one_runs_fewer_blocks(make_vector):
    weights, counts = [], []
    for shared in (True, False):
        agent = PPO(make_vector(8).unwrapped, PPOConfig(batch_size=8, epochs=2, minibatches=1, train_layers=1))
        count = []
        for model in (agent.policy.model, agent.task.reference.model):
            blocks_of(model)[0].register_forward_pre_hook(lambda module, inputs, count=count: count.append(1))
        assert frozen_blocks.iteration(agent, shared=shared) > 0
        weights.append(torch.cat([weight.detach().flatten() for weight in agent.actor.parameters()]))
        counts.append(len(count))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert counts[0] < counts[1]
    found = frozen_blocks.measure(agent, runs=2)
    assert len(found["ratios"]) == 2
    assert found["seconds"].keys() == {"apart", "together"}
