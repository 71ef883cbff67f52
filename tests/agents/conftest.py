"""What the tests of Stable-Baselines3 agents share."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

import textenv
from agents.sb3 import CausalLMPolicy, make_vec_env
from tests.conftest import FAMILIES, tiny_model, word_tokenizer

RULED = {"temperature": 0.7, "min_new_tokens": 2, "stop_tokens": ("?",)}


@pytest.fixture
def vec_env(text_options):
    def make(num_envs=5, **options):
        for family in FAMILIES:
            textenv.register_language_model(f"{family}-a", lambda family=family: tiny_model(family, seed=0))
            textenv.register_language_model(f"{family}-b", lambda family=family: tiny_model(family, seed=5))
        return make_vec_env("textenv/Text-v0", num_envs, **{**text_options, **options})

    return make


class Recorder(BaseCallback):
    """Keeps, for every finished episode, what was chosen and stored on the way, and how it ended."""

    def _on_training_start(self):
        self.running = [[] for _ in range(self.training_env.num_envs)]
        self.prompts = [info["prompt"] for info in self.training_env.unwrapped.reset_infos]
        self.finished = []

    def _on_step(self):
        step = self.locals
        for slot, episode in enumerate(self.running):
            episode.append((int(step["actions"][slot]), float(step["log_probs"][slot]), float(step["rewards"][slot])))
            if step["dones"][slot]:
                self.finished.append((self.prompts[slot], episode, step["infos"][slot]))
                self.running[slot] = []
                self.prompts[slot] = self.training_env.unwrapped.reset_infos[slot]["prompt"]
        return True


@torch.no_grad()
def plain_logprobs(model, prompt, tokens, temperature=1.0, early=0, stops=(0,)):
    """One row, no padding, no cache, float64: log p of each token; ``stops`` are impossible for ``early`` tokens."""
    ids = torch.tensor([word_tokenizer()(prompt).input_ids + tokens])
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double() / temperature
    out = []
    for t, token in enumerate(tokens):
        row = logits[ids.shape[1] - len(tokens) + t - 1].clone()
        if t < early:
            row[list(stops)] = -torch.inf
        out.append(float(row.log_softmax(0)[token]))
    return np.array(out)


def small(algorithm, env, policy=CausalLMPolicy, **options):
    """An agent whose policy is far from the reference, so that every KL differs from 0."""
    options = {"seed": 0, "device": "cpu", "policy_kwargs": {"model": "gpt2-b"}, **options}
    if algorithm is PPO:
        options = {"n_steps": 13, "batch_size": 13, "n_epochs": 2, **options}
    return algorithm(policy, env, **options)


def first_observation(env):
    env.seed(3)
    return env.reset()
