"""What the tests of PPO share: a small agent, its weights, and reward models of other shapes."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents.ppo import PPO, PPOConfig
from reward_models.scorers.transformer import TransformerRewardModel
from tests.conftest import WORDS, tiny_model
from textenv.lm.load import word_level_tokenizer, wrap_language_model

CONFIG = {"batch_size": 32, "epochs": 2, "minibatches": 2, "learning_rate": 3e-3, "seed": 0}


@pytest.fixture
def agent(make_vector):
    def make(policy=None, num_envs=16, env_options=(), **config):
        env = make_vector(num_envs, **dict(env_options)).unwrapped
        return PPO(env, PPOConfig(**{**CONFIG, **config}), policy)

    return make


def weights(agent):
    return {name: tensor.clone() for name, tensor in agent.actor.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def short_reward_model(words=WORDS):
    """A random reward model that reads 4 tokens, over ``words``."""
    model = TransformerRewardModel.from_language_model(tiny_model())
    torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(0))
    model.model.config.n_positions = 4
    model.tokenizer = word_level_tokenizer(words)
    return model


def wide_reward_model(seed=3, words=WORDS):
    """A random reward model with hidden states twice as wide as those of the policy, with a padding token besides."""
    lm = tiny_model("llama", seed)
    config = copy.deepcopy(lm.model.config)
    config.hidden_size, config.head_dim = 64, 16
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wide = wrap_language_model(AutoModelForCausalLM.from_config(config), word_level_tokenizer(words))
    model = TransformerRewardModel.from_language_model(wide)
    torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(0))
    return model
