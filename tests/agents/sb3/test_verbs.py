"""Our agents speak Stable-Baselines3's verbs: its own ``evaluate_policy`` runs them unchanged."""

import gymnasium
import numpy as np
import pytest
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.evaluation import evaluate_policy

from agents.baselines import RandomAgent, ReferenceAgent
from agents.best_of_n import BestOfN
from agents.ppo import PPO, PPOConfig
from agents.sb3 import CausalLMPolicy, make_vec_env
from textenv.evaluation import Agent, evaluate


def agents_of(options):
    learner_env = gymnasium.make_vec("textenv/Text-v0", num_envs=4, **options).unwrapped
    task = learner_env.task
    reference = ReferenceAgent(task)
    return {
        "ppo": PPO(learner_env, PPOConfig(batch_size=4)),
        "reference": reference,
        "random": RandomAgent(task),
        "best-of-3": BestOfN(task, reference.policy, 3),
    }


@pytest.mark.parametrize("obs_mode", ["dict", "tokens"])
@pytest.mark.parametrize("name", ["ppo", "reference", "random", "best-of-3"])
def test_evaluate_policy_runs_our_agents(text_options, name, obs_mode):
    options = {**text_options, "obs_mode": obs_mode, "kl_coef": 0.0}
    agent = agents_of(options)[name]
    env = make_vec_env("textenv/Text-v0", 3, seed=0, **options)
    returns, lengths = evaluate_policy(agent, env, n_eval_episodes=7, return_episode_rewards=True)
    assert len(returns) == 7
    assert np.isfinite(returns).all()
    assert min(lengths) >= 1
    assert max(lengths) <= text_options["max_new_tokens"]


def test_best_of_n_steps_through_the_response_that_it_chose(text_options):
    options = {**text_options, "kl_coef": 0.0}
    env = gymnasium.make("textenv/Text-v0", **options).unwrapped
    stepper, whole = (BestOfN(env.task, ReferenceAgent(env.task).policy, 4, seed=5) for _ in range(2))
    observation, _ = env.reset(seed=1)
    batched = {key: value[None] for key, value in observation.items()}
    chosen = whole.respond(batched)
    state, ended, played = None, False, []
    while not ended:
        action, state = stepper.predict(observation, state=state)
        played.append(int(action))
        observation, _, ended, _, _ = env.step(action)
    assert played == chosen.response_ids[0, : int(chosen.response_lengths[0])].tolist()


def test_best_of_n_refuses_to_go_on_without_its_state(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    agent = BestOfN(env.task, ReferenceAgent(env.task).policy, 2)
    env.reset(seed=0)
    observation, *_ = env.step(3)
    with pytest.raises(ValueError, match="Pass state"):
        agent.predict(observation)


def test_our_agents_and_sb3s_models_are_agents_and_a_callable_is_none(text_options):
    ours = agents_of({**text_options, "kl_coef": 0.0})
    model = SB3PPO(CausalLMPolicy, make_vec_env("textenv/Text-v0", 2, **text_options), n_steps=2, batch_size=4)
    assert all(isinstance(agent, Agent) for agent in (*ours.values(), model))
    assert not isinstance(lambda observation: 0, Agent)
    assert len(evaluate(model, "textenv/Text-v0", num_envs=2, **text_options).responses) == 4
