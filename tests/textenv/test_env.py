"""The environment against hand-made episodes. What holds of every id stands in test_conformance.py."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from tests.conftest import colour_score
from textenv.lm import Responses, response_logprobs
from textenv.scoring import Scorer, note_truncated


def random_episode(env, seed, **reset):
    """Reset and act at random (from a generator of our own) to the end; returns all that was returned."""
    rng = np.random.default_rng(seed)
    trace = [env.reset(seed=seed, **reset)]
    while True:
        trace.append(env.step(int(rng.integers(env.action_space.n))))
        if trace[-1][2]:
            return trace


def test_importing_the_package_loads_no_torch_and_registers_the_ids():
    code = (
        "import sys, textenv, gymnasium as g; "
        "assert not {'torch', 'transformers', 'stable_baselines3'} & set(sys.modules); "
        "assert {'textenv/Micro-v0', 'textenv/Assistant-v0', 'textenv/Text-v0'} <= set(g.registry)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_id_with_its_module_can_be_made_without_importing_it():
    subprocess.run([sys.executable, "-c", "import gymnasium as g; g.make('textenv:textenv/Micro-v0')"], check=True)


def test_the_prompt_is_left_padded_and_the_response_starts_at_its_column(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    observation, info = env.reset(options={"prompt": "the grass"})
    assert info == {"prompt": "the grass", "prompt_id": -1}
    np.testing.assert_array_equal(observation["input_ids"], [0, 0, 0, 0, 0, 7, 5] + [0] * 6)
    np.testing.assert_array_equal(observation["attention_mask"], [0, 0, 0, 0, 0, 1, 1] + [0] * 6)
    observation, reward, terminated, truncated, info = env.step(6)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    np.testing.assert_array_equal(observation["input_ids"], [0, 0, 0, 0, 0, 7, 5, 6, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(observation["attention_mask"], [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    assert observation["prompt_length"] == 2
    assert observation["response_length"] == 1


def test_tokens_mode_marks_padding_by_minus_one_even_beside_real_eos_tokens(text_options):
    env = gymnasium.make("textenv/Text-v0", obs_mode="tokens", **text_options).unwrapped
    observation, _ = env.reset(options={"prompt": "is the <eos> not green"})
    np.testing.assert_array_equal(observation, [-1, -1, 6, 7, 0, 10, 2, -1, -1, -1, -1, -1, -1])


@pytest.mark.parametrize(
    ("actions", "stop_tokens", "reason", "length"),
    [([3, 0], (), "eos", 2), ([3, 9], ("?",), "stop", 2), ([1, 2, 3, 4, 5, 6], (), "length", 6), ([0], (), "eos", 1)],
)
def test_episodes_end_on_eos_a_stop_token_or_the_budget(text_options, actions, stop_tokens, reason, length):
    env = gymnasium.make("textenv/Text-v0", stop_tokens=stop_tokens, **text_options).unwrapped
    env.reset(seed=0)
    for action in actions[:-1]:
        assert not env.step(action)[2]
    *_, terminated, truncated, info = env.step(actions[-1])
    assert terminated
    assert not truncated
    assert (info["finish_reason"], info["response_length"]) == (reason, length)
    with pytest.raises(ValueError, match="Call reset first"):
        env.step(1)


@torch.no_grad()
def sequence_logprob(model, prompt_ids, response_ids):
    """Plain transformers, one row, no padding: Σ and list of log p(token)."""
    ids = torch.tensor([prompt_ids + response_ids])
    logprobs = torch.log_softmax(model(ids, attention_mask=torch.ones_like(ids)).logits[0].double(), -1)
    return [float(logprobs[len(prompt_ids) + t - 1, token]) for t, token in enumerate(response_ids)]


def test_the_reward_is_the_score_minus_beta_times_the_kl_of_reported_logprobs(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    actions, own = [3, 6, 0], [-0.5, -1.25, -2.0]
    env.reset(options={"prompt": "the grass"})
    for action, logprob in zip(actions, own, strict=True):
        env.report_logprobs(logprob)
        _, reward, terminated, _, info = env.step(action)
    assert terminated
    reference = sequence_logprob(env.reference.model, [7, 5], actions)
    kl = np.array(own) - np.array(reference)
    score = colour_score(["the grass"], ["blue is"], finish_reason=["eos"])[0]
    assert info["rm_score"] == pytest.approx(score)
    assert info["kl"] == pytest.approx(kl.sum(), abs=1e-5)
    np.testing.assert_allclose(info["kl_per_token"], [*kl, 0, 0, 0], atol=1e-5)
    assert reward == pytest.approx(score - 0.1 * kl.sum(), abs=1e-5)
    assert info["reward_terms"] == pytest.approx({"reward_model": score, "kl": -0.1 * kl.sum()}, abs=1e-5)
    assert sum(info["reward_terms"].values()) == reward
    assert info["kl_source"] == "reported"
    assert info["response"] == "blue is"


def test_a_report_whose_action_was_never_taken_dies_with_its_episode(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    env.reset(seed=0)
    env.report_logprobs(-9.0)
    env.reset(seed=0)
    assert env.step(0)[4]["kl_source"] == "none"


def test_what_was_reported_of_one_episode_is_forgotten_in_the_next(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    for actions, own in [([3, 6, 0], [-0.5, -1.25, -2.0]), ([4, 0], [-3.0, -1.0])]:
        env.reset(options={"prompt": "the grass"})
        for action, logprob in zip(actions, own, strict=True):
            env.report_logprobs(logprob)
            *_, info = env.step(action)
        assert info["kl"] == pytest.approx(
            sum(own) - sum(sequence_logprob(env.reference.model, [7, 5], actions)), abs=1e-5
        )
    env.reset()
    env.step(3)
    assert env.step(0)[4]["kl_source"] == "none"


def test_an_attached_policy_pays_the_same_kl_as_reporting_it(text_options):
    from tests.conftest import tiny_model

    policy = tiny_model(seed=3)
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    env.attach_policy(policy.model)
    env.reset(options={"prompt": "the grass"})
    for action in (3, 6, 0):
        *_, info = env.step(action)
    own = sequence_logprob(policy.model, [7, 5], [3, 6, 0])
    reference = sequence_logprob(env.reference.model, [7, 5], [3, 6, 0])
    assert info["kl_source"] == "policy"
    assert info["kl"] == pytest.approx(sum(own) - sum(reference), abs=1e-5)


def test_the_kl_of_the_reference_to_itself_is_zero(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    env.attach_policy(env.reference.model)
    assert random_episode(env, 1)[-1][4]["kl"] == 0.0


def test_source_reference_pays_beta_times_the_references_logprob(text_options):
    env = gymnasium.make("textenv/Text-v0", kl_source="reference", **text_options).unwrapped
    env.reset(options={"prompt": "the grass"})
    env.step(3)
    _, reward, _, _, info = env.step(0)
    expected = 0.1 * sum(sequence_logprob(env.reference.model, [7, 5], [3, 0]))
    assert info["reward_terms"]["reference_logprob"] == pytest.approx(expected, abs=1e-5)
    assert reward == pytest.approx(info["rm_score"] + expected, abs=1e-5)
    assert "kl" not in info


def test_unknown_logprobs_count_as_no_kl_with_one_warning_and_a_flag(text_options, caplog, monkeypatch):
    monkeypatch.setattr(Scorer, "warned", False)
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    with caplog.at_level("WARNING", logger="textenv"):
        infos = [random_episode(env, seed)[-1][4] for seed in (1, 2)]
    assert len(caplog.records) == 1
    assert all(info["kl"] == 0.0 and info["kl_source"] == "none" for info in infos)


def test_temperature_divides_the_logits_of_policy_and_reference_alike(text_options):
    from tests.conftest import tiny_model

    policy = tiny_model(seed=3)
    env = gymnasium.make("textenv/Text-v0", temperature=0.5, **text_options).unwrapped
    env.attach_policy(policy.model)
    env.reset(options={"prompt": "red"})
    env.step(4)
    *_, info = env.step(0)

    @torch.no_grad()
    def at_half(model):
        logprobs = torch.log_softmax(model(torch.tensor([[1, 4]])).logits[0].double() / 0.5, -1)
        return float(logprobs[0, 4] + logprobs[1, 0])

    assert info["kl"] == pytest.approx(at_half(policy.model) - at_half(env.reference.model), abs=1e-5)


def test_before_min_new_tokens_ending_is_masked_refused_and_left_out_of_the_distribution(text_options):
    env = gymnasium.make("textenv/Text-v0", min_new_tokens=2, **text_options).unwrapped
    env.attach_policy(env.reference.model)
    env.reset(options={"prompt": "red"})
    assert not env.action_masks()[0]
    assert env.action_masks()[1:].all()
    with pytest.raises(ValueError, match="action_masks"):
        env.step(0)
    env.step(1)
    assert not env.action_masks()[0]
    env.step(1)
    assert env.action_masks().all()
    env.step(0)
    batch = Responses(torch.tensor([[1]]), torch.tensor([1]), torch.tensor([[1, 1, 0]]), torch.tensor([3]))
    got = response_logprobs(env.reference.model, batch, env.task.rule)[0]
    with torch.no_grad():
        logits = env.reference.model(torch.tensor([[1, 1, 1]])).logits[0].double()
    want = [torch.log_softmax(logits[t, 1:], -1)[0] for t in (0, 1)] + [torch.log_softmax(logits[2], -1)[0]]
    torch.testing.assert_close(got.double(), torch.stack(want), atol=1e-5, rtol=0)


def test_a_missing_eos_is_paid_for_as_a_term_of_its_own(text_options):
    env = gymnasium.make("textenv/Text-v0", missing_eos_penalty=2.0, **text_options).unwrapped
    env.reset(options={"prompt": "red"})
    for _ in range(6):
        _, reward, _, _, info = env.step(1)
    assert info["reward_terms"]["missing_eos"] == -2.0
    # six words, a prompt of three letters, cut by the budget: the penalty is no part of the score
    assert info["rm_score"] == info["reward_terms"]["reward_model"] == pytest.approx(-0.3 * 6 + 0.01 * 3 - 0.5)
    assert reward == sum(info["reward_terms"].values()) == pytest.approx(-2.27 - 2.0)
    env.reset()
    assert env.step(0)[4]["reward_terms"]["missing_eos"] == 0.0


def test_gold_is_scored_by_a_model_of_its_own_and_pays_nothing(text_options):
    textenv.register_reward_model("count-words", lambda prompts, completions: [len(c.split()) for c in completions])
    env = gymnasium.make("textenv/Text-v0", gold="count-words", **text_options)
    env.reset(options={"prompt": "red"})
    env.step(1)
    env.step(1)
    _, reward, _, _, info = env.step(0)
    assert info["gold_score"] == 2.0
    assert reward == info["rm_score"] == pytest.approx(-0.3 * 2 + 0.01 * 3)


def test_what_a_reward_model_cuts_is_told_of_its_own_episodes_even_if_it_scores_others_in_between(text_options):
    inner = gymnasium.make("textenv/Text-v0", **text_options)

    def reads_one_word(prompts, completions):
        inner.reset(seed=0)
        assert not inner.step(0)[4]["truncated_response"]
        note_truncated(text for text in completions if len(text.split()) > 1)
        return [0.0] * len(prompts)

    textenv.register_reward_model("reads-one-word", reads_one_word)
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "reward_model": "reads-one-word"})
    for actions, cut in (([1, 0], False), ([1, 2, 0], True)):
        env.reset(seed=0)
        for action in actions:
            *_, info = env.step(action)
        assert info["truncated_response"] == cut


def test_ansi_rendering_shows_prompt_response_and_ending(text_options):
    env = gymnasium.make("textenv/Text-v0", render_mode="ansi", **text_options).unwrapped
    env.reset(options={"prompt": "the grass"})
    env.step(2)
    assert env.render() == "the grass → green"
    env.step(0)
    assert env.render().startswith("the grass → green [eos] reward ")
