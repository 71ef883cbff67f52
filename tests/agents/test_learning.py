"""Learning, against what is exactly known: PPO's regret and the frontier on the exact world, SFT against an entropy."""

import gymnasium
import numpy as np
import pytest

from agents.ppo import PPO, PPOConfig
from textenv.tasks.exact import exact_world

pytestmark = pytest.mark.slow

MICRO = {"batch_size": 256, "learning_rate": 3e-3, "lr_decay_episodes": 200 * 256}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_comes_within_five_percent_of_the_optimum_of_the_exact_world(seed):
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=256).unwrapped
    world = exact_world(env)
    agent = PPO(env, PPOConfig(seed=seed, **MICRO))
    points = []
    for _ in range(8):
        agent.learn(25 * 256)
        points.append(world.measure(agent.policy.model))
    assert points[-1].regret_ratio <= 0.05
    assert points[-1].kl == pytest.approx(world.optimum.kl, rel=0.1)
    for point in points:  # measured exactly, so there is no sampling error to allow for
        assert point.expected_reward <= world.frontier_reward_at(point.kl) + 1e-6
    logged = [(log["kl"], log["rm_score"]) for log in agent.history[::10]]
    spread = 3 * 0.6 / np.sqrt(256)  # 3 SE of a mean of 256 scores, whose standard deviation stays under 0.6
    for kl, reward in logged:
        assert reward <= world.frontier_reward_at(max(kl, 0.0) + 3 * 1.2 / np.sqrt(256)) + spread
