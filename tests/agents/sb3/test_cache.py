"""The KV cache of the policy for Stable-Baselines3: what it costs, and when it is dropped."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from tests.agents.conftest import Recorder, first_observation, small


def test_a_rollout_costs_one_token_a_step_and_a_prompt_an_episode(vec_env):
    env = vec_env(4)
    seen = {}
    for use_cache in (True, False):
        agent = small(PPO, env, policy_kwargs={"model": "gpt2-b", "use_cache": use_cache})
        agent.predict(env.reset())  # whatever is measured once a model
        counted = []
        agent.policy.model.base_model.register_forward_pre_hook(
            lambda _, __, kwargs, counted=counted: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        recorder = Recorder()
        agent.learn(1, callback=recorder)
        seen[use_cache] = sum(counted[:-8])  # training adds 2 epochs of 4 minibatches
        if use_cache:
            # 13 steps and the last values, 4 slots, and at most 6 prompt tokens for each episode begun.
            assert seen[True] <= 4 * 14 + 6 * (len(recorder.finished) + 4)
    assert seen[False] > 2.5 * seen[True]


def perturb_by_adam(policy, **options):
    policy.optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, **options)
    step(policy)


def step(policy):
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    policy.optimizer.step()


CHANGES = {
    "its own optimiser": step,
    "its own optimiser, fused": step,
    "a foreach optimiser": lambda policy: perturb_by_adam(policy, foreach=True),
    "load_state_dict": lambda policy: policy.load_state_dict({k: v + 0.1 for k, v in policy.state_dict().items()}),
    "load_from_vector": lambda policy: policy.load_from_vector(policy.parameters_to_vector() * 1.1),
    "training": lambda policy: (policy.set_training_mode(True), [p.data.mul_(1.1) for p in policy.parameters()]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_cache_is_dropped_when_the_weights_change(vec_env, change):
    env = vec_env(3)
    kwargs = {"model": "gpt2-b", "optimizer_kwargs": {"fused": "fused" in change}}
    agent = small(PPO, env, learning_rate=0.1, policy_kwargs=kwargs)
    observation = first_observation(env)
    tensors = lambda: {key: torch.from_numpy(value) for key, value in observation.items()}  # noqa: E731
    with torch.no_grad():
        for _ in range(3):
            observation, *_ = env.step(agent.policy(tensors())[0].numpy() % 11 + 1)
        before = agent.policy.get_distribution(tensors()).distribution.logits
        observation, *_ = env.step(np.ones(3, dtype=int))
    CHANGES[change](agent.policy)
    with torch.no_grad():
        cached = agent.policy.get_distribution(tensors()).distribution.logits
    uncached = agent.policy.get_distribution(tensors()).distribution.logits
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=0)
    assert not torch.allclose(before, cached, atol=1e-2)


def test_an_interrupted_forward_pass_leaves_no_half_filled_cache(vec_env):
    env = vec_env(3)
    agent = small(PPO, env)
    observation = first_observation(env)
    agent.predict(observation)
    observation, *_ = env.step(np.ones(3, dtype=int))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = agent.policy.model.transformer.h[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        agent.predict(observation)
    hook.remove()
    tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    with torch.no_grad():
        cached = agent.policy.get_distribution(tensors).distribution.logits
    torch.testing.assert_close(cached, agent.policy.get_distribution(tensors).distribution.logits, atol=1e-5, rtol=0)
