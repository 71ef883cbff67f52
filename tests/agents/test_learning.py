"""Learning, against what is exactly known: PPO's regret and the frontier on the exact world, SFT against an entropy."""

import math

import gymnasium
import numpy as np
import pytest

from agents.demo.run import new_base_model
from agents.ppo import PPO, PPOConfig
from agents.presets import preset
from agents.sft import SFTConfig, train_sft
from tests.agents.test_sft import completion_nll
from textenv.tasks import assistant
from textenv.tasks.exact import exact_world

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("seed", "updates", "regret"), [(0, 150, 0.05), (1, 80, 0.08), (2, 80, 0.08)])
def test_ppo_comes_near_the_optimum_of_the_exact_world(seed, updates, regret):
    """Within 5 % in 150 updates; on all three seeds in benchmarks/results/ppo_speed_regret.json."""
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=256).unwrapped
    world = exact_world(env)
    agent = PPO(env, PPOConfig(seed=seed, **preset("micro", "ppo", total_episodes=updates * 256)))
    points = []
    for _ in range(5):
        agent.learn(updates // 5 * 256)
        points.append(world.measure(agent.policy.model))
    assert points[-1].regret_ratio <= regret
    assert points[-1].kl == pytest.approx(world.kl(world.optimum().logprobs), rel=0.1)
    for point in points:  # measured exactly, so there is no sampling error to allow for
        assert point.expected_reward <= world.frontier_reward_at(point.kl) + 1e-6
    # What is logged is a mean of 256 samples: allow three standard errors of score (sd < 0.6) and of k1 (sd < 1.2).
    for log in agent.history[::10]:
        kl = max(log["kl"], 0.0) + 3 * 1.2 / np.sqrt(256)
        assert log["rm_score"] <= world.frontier_reward_at(kl) + 3 * 0.6 / np.sqrt(256)


def test_adapters_of_half_the_width_learn_the_exact_world_like_all_weights_do():
    """With a learning rate of their own, in so few updates that neither is at the optimum (in 150, 5 % from it on the
    mean of three seeds: benchmarks/results/ppo_speed_regret.json)."""
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=256).unwrapped
    settings = preset("micro", "ppo", total_episodes=50 * 256) | {"learning_rate": 2e-3, "lora_rank": 32}
    agent = PPO(env, PPOConfig(**settings)).learn(50 * 256)
    assert exact_world(env).measure(agent.policy.model).regret_ratio <= 0.12


def test_sft_on_the_embedded_world_stays_above_its_conditional_entropy_and_comes_near_it():
    """No model can beat the entropy; one that has seen 48,000 answers comes within 10 % of it."""
    rng = np.random.default_rng(9)

    def answered(prompts):
        return [{"prompt": p.text, "completion": assistant.sample_answer(p, "demonstrations", rng)} for p in prompts]

    def facts(count, seed):  # one kind of prompt, so that little training does
        return [prompt for prompt in assistant.sample_prompts("train", count, seed) if prompt.kind == "fact"]

    config = SFTConfig(learning_rate=4e-3, epochs=1, batch_size=32)
    model = train_sft(new_base_model(0), answered(facts(240_000, 7)), config).model
    prompts = facts(5_000, 8)
    held_out = answered(prompts)
    floor = assistant.conditional_entropy(prompts, "demonstrations").per_token
    measured = completion_nll(model, held_out)
    logprobs = [
        math.log(assistant.answer_distribution(prompt, "demonstrations")[record["completion"]])
        for prompt, record in zip(prompts, held_out, strict=True)
    ]
    tokens = sum(len(record["completion"].split()) + 1 for record in held_out)
    sampled_floor = -sum(logprobs) / tokens  # of these very answers: the sampling noise of the entropy is not ours
    assert sampled_floor == pytest.approx(floor, rel=0.05)
    assert sampled_floor <= measured <= 1.10 * sampled_floor
