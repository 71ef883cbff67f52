"""What a pickled environment carries: names and its running episodes, never weights."""

import copy
import pickle

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import RecordEpisodeStatistics
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import WORDS, tiny_model, word_tokenizer
from textenv import registry
from textenv.lm.load import wrap_language_model

LIMIT = 100_000


def play(env, steps):
    """Plain values of random steps, with the reset that follows each ending of a single environment."""
    rng, trace = np.random.default_rng(1), []
    many = hasattr(env.unwrapped, "num_envs")
    for _ in range(steps):
        logprobs = -rng.random(env.unwrapped.num_envs if many else 1)
        env.unwrapped.report_logprobs(logprobs)
        actions = rng.integers(0, 12, len(logprobs))
        observation, reward, terminated, _, info = env.step(actions if many else int(actions[0]))
        trace.append((observation, reward, terminated, info.get("response"), info.get("final_info")))
        if not many and terminated:
            trace.append(env.reset())
    return trace


def same(got, want):
    assert repr(got) == repr(want)


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize("kind", ["single", "wrapped", "vector"])
def test_an_unpickled_environment_goes_on_as_the_original(text_options, make_vector, dumps, kind):
    env = make_vector(3) if kind == "vector" else gymnasium.make("textenv/Text-v0", **text_options)
    env = RecordEpisodeStatistics(env) if kind == "wrapped" else env
    env.reset(seed=3)
    env.unwrapped.kl_coef = 0.7
    play(env, 2)
    pickled = dumps(env.unwrapped if kind == "single" else env)
    twin = pickle.loads(pickled)
    assert len(pickled) < LIMIT
    assert twin.unwrapped.kl_coef == 0.7
    assert twin.unwrapped.reference is env.unwrapped.reference, "models are resolved by name, and shared in a process"
    same(play(twin, 8), play(env.unwrapped if kind == "single" else env, 8))


@pytest.mark.parametrize("env_id", ["textenv/Assistant-v0", "textenv/Micro-v0"])
def test_the_shipped_environments_pickle_small(env_id):
    env = gymnasium.make(env_id)
    env.reset(seed=0)
    assert len(cloudpickle.dumps(env)) < LIMIT
    assert len(cloudpickle.dumps(gymnasium.make_vec(env_id, num_envs=16))) < LIMIT


def test_the_size_does_not_depend_on_the_model(text_options, tmp_path):
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(WORDS), n_embd=512, n_layer=1, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0
    )
    large = wrap_language_model(AutoModelForCausalLM.from_config(config), word_tokenizer())
    assert large.model.num_parameters() * 4 > 10_000_000
    large.save_pretrained(tmp_path)
    sizes = []
    for reference in (text_options["reference"], str(tmp_path)):
        env = gymnasium.make("textenv/Text-v0", **text_options | {"reference": reference})
        env.reset(seed=0)
        sizes.append(len(cloudpickle.dumps(env)))
    assert abs(sizes[1] - sizes[0]) < 200  # two paths of different length


def test_an_attached_policy_is_refused_unless_it_is_the_reference(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options)
    env.reset(seed=0)
    env.unwrapped.attach_policy(tiny_model(seed=1).model)
    with pytest.raises(ValueError, match=r"attach_policy\(None\) first"):
        cloudpickle.dumps(env)
    env.unwrapped.attach_policy(env.unwrapped.reference.model)
    twin = pickle.loads(cloudpickle.dumps(env))
    assert twin.unwrapped.task.scorer.policy is registry.language_model(text_options["reference"]).model


def test_a_deep_copy_shares_the_models(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options)
    env.reset(seed=0)
    assert copy.deepcopy(env).unwrapped.reference.model is env.unwrapped.reference.model


def test_a_name_that_the_other_process_does_not_know_is_an_error(text_options):
    registry.register_reward_model("passing", lambda prompts, completions: [0.0] * len(prompts))
    env = gymnasium.make("textenv/Text-v0", **text_options | {"reward_model": "passing"})
    pickled = cloudpickle.dumps(env)
    registry.sources._sources["reward model"].pop("passing")
    registry.clear_cache()
    with pytest.raises(ValueError, match="passing"):
        pickle.loads(pickled)
