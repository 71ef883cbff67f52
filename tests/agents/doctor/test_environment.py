"""Faults of environments: of their rewards, their reference and their settings."""

import dataclasses

import gymnasium
import pytest
import torch
from torch import nn

import textenv
from agents.doctor import diagnose
from agents.doctor.checks.environment import EnvironmentPart
from tests.agents.doctor.helpers import GOOD, chat_part, levels, seen
from tests.conftest import tiny_model, word_tokenizer
from textenv import scoring
from textenv.conformance.subject import Skipped

CHECKS = ("contract", "reward", "KL of the reference", "whole response", "EOS rate", "spread", "temperature", "β")
CHECKS += ("sampler", "first update")


@pytest.fixture
def part(text_options):
    def part(held_out=None, **options):
        return EnvironmentPart("textenv/Text-v0", {**text_options, **options}, held_out)

    return part


def test_a_healthy_environment_is_silent(part):
    healthy = part(["a new prompt"], kl_coef=0.5)
    found = {name: levels(f"environment: {name}", healthy) for name in (*CHECKS, "leakage", "repeated prompts")}
    assert found == {name: ["note"] if name == "β" else [] for name in found}


@pytest.mark.parametrize(
    ("kl", "hidden"),
    [(lambda logprobs, ref: 2 * (logprobs - ref) + 0.5, False), (lambda logprobs, ref: ref - logprobs, True)],
)
def test_a_wrong_kl_in_the_reward_is_found(part, monkeypatch, kl, hidden):
    """A flipped sign is hidden where the KL is 0."""
    monkeypatch.setattr(scoring, "kl_k1", kl)
    broken = part()
    assert levels("environment: KL of the reference", broken) == ([] if hidden else ["error"])
    assert levels("environment: reward", broken) == ["error"]
    found = seen("environment: contract", broken)
    assert [what.partition(":")[0] for _, what in found] == ["KL"]


def test_a_reward_model_that_depends_on_the_batch_breaks_the_contract(part):
    textenv.register_reward_model("doctor-batchy", lambda prompts, completions: [float(len(prompts))] * len(prompts))
    found = seen("environment: contract", part(reward_model="doctor-batchy"))
    assert [what.partition(":")[0] for _, what in found] == ["play"]


def hooked(hook):
    """A tiny model whose trunk's output goes through ``hook(output)``."""

    def load():
        lm = tiny_model("llama")

        def change(module, args, output):
            hook(output)
            return output

        lm.model.base_model.register_forward_hook(change)
        return lm

    return load


def test_a_sampler_that_differs_from_the_scorer_shows_as_a_kl(part):
    def sharpen(output):
        if output.last_hidden_state.shape[1] == 1 and len(output.last_hidden_state) > 8:
            output.last_hidden_state = 2 * output.last_hidden_state

    textenv.register_language_model("doctor-sharp", hooked(sharpen))
    broken = part(reference="doctor-sharp")
    assert levels("environment: KL of the reference", broken) == ["error"]


def test_the_kl_is_known_to_be_0_where_temperature_is_not_1(part):
    warm = part(temperature=0.5, min_new_tokens=2, missing_eos_penalty=1.0)
    assert levels("environment: KL of the reference", warm) == []
    assert levels("environment: reward", warm) == []
    assert levels("environment: temperature", warm) == ["note"]


def test_a_temperature_that_the_scorer_does_not_know_is_found(part):
    warm = part(temperature=0.3, min_new_tokens=2)
    assert not seen("environment: sampler", warm)
    warm.vector.task.rule = dataclasses.replace(warm.vector.task.rule, temperature=1.0)
    [(level, what)] = seen("environment: sampler", warm)
    assert level == "error"
    assert what.startswith("χ² of ")


def test_a_policy_that_is_another_one_in_training_is_found(part):
    """Like dropout: what a pass says depends on whether it has a gradient."""

    def grow(output):
        if torch.is_grad_enabled():
            output.last_hidden_state = 1.1 * output.last_hidden_state

    textenv.register_language_model("doctor-gradient", hooked(grow))
    broken = part(reference="doctor-gradient")
    assert not seen("environment: KL of the reference", broken)
    [(level, what)] = seen("environment: first update", broken)
    assert level == "error"
    assert "a ratio is off by 0." in what


class Foreign:
    """A reward model with a tokenizer of its own."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, prompts, completions):
        return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(("knows", "rendered"), [(False, True), (True, True), (False, False)])
def test_control_tokens_that_the_reward_model_does_not_know_are_found(part, knows, rendered):
    lm = chat_part(GOOD).lm
    textenv.register_language_model("doctor-chat", lambda: lm)
    textenv.register_reward_model("doctor-foreign", Foreign(lm.tokenizer if knows else word_tokenizer()))
    messages = [{"role": "user", "content": "question"}]
    prompts = ["the sky", lm.prompt_text(messages) if rendered else messages]
    asked = part(reference="doctor-chat", reward_model="doctor-foreign", prompts=prompts)
    found = seen("environment: control tokens", asked)
    if not rendered or knows:
        assert not found
    else:
        [(level, what)] = found
        assert level == "warning"
        assert what.startswith("1 of 2 prompts hold <end>, plain letters to the reward model: 'user question <end>")


def test_without_a_tokenizer_there_are_no_foreign_tokens(part):
    with pytest.raises(Skipped):
        seen("environment: control tokens", part())


def test_an_attached_policy_is_the_reference_itself(part):
    attached = part(kl_source="policy")
    for name in ("contract", "reward", "KL of the reference", "EOS rate"):
        assert not seen(f"environment: {name}", attached)


def test_where_the_kl_is_not_known_its_checks_are_skipped(part):
    for name in ("KL of the reference", "reward"):
        with pytest.raises(Skipped):
            seen(f"environment: {name}", part(kl_source="reference"))


def test_a_reward_model_that_does_not_read_whole_responses_is_found(part):
    def short(prompts, completions):
        scoring.note_truncated(completions)
        return [0.1 * len(completion) for completion in completions]

    textenv.register_reward_model("doctor-short", short)
    assert levels("environment: whole response", part(reward_model="doctor-short")) == ["error"]


def test_a_reference_that_never_ends_is_found(part):
    def load():
        lm = tiny_model("llama")
        head = lm.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        head.register_forward_hook(lambda module, args, logits: logits - 50 * (torch.arange(12) == 0))
        return lm

    textenv.register_language_model("doctor-endless", load)
    [(level, what)] = seen("environment: EOS rate", part(reference="doctor-endless"))
    assert level == "warning"
    assert "0 of 64 responses end within 6 tokens" in what


def test_scores_without_a_spread_are_found(part):
    textenv.register_reward_model("doctor-same", lambda prompts, completions: [float(len(p)) for p in prompts])
    same = part(reward_model="doctor-same")
    assert levels("environment: spread", same) == ["error"]
    with pytest.raises(Skipped):
        seen("environment: β", same)


@pytest.mark.parametrize(
    ("kl_coef", "level", "word"),
    [
        (0.0, "warning", "nothing keeps"),
        (1e-3, "warning", "too much"),
        (0.5, "note", "pays"),
        (50.0, "warning", "little"),
    ],
)
def test_beta_is_compared_with_the_spread_of_the_scores(part, kl_coef, level, word):
    [(found, what)] = seen("environment: β", part(kl_coef=kl_coef))
    assert found == level
    assert word in what


def test_the_kl_that_pays_is_that_of_a_normal_distribution(part):
    """Scores ±1 within a prompt have variance near 1: σ²/2β² = 1/(2 · 0.25) = 2 nats."""
    textenv.register_reward_model(
        "doctor-coin", lambda prompts, completions: [1.0 if len(c.split()) % 2 else -1.0 for c in completions]
    )
    coin = part(kl_coef=0.5, reward_model="doctor-coin")
    [(_, what)] = seen("environment: β", coin)
    spread = float(what.partition("spread by ")[2].split()[0])
    nats = float(what.partition("about ")[2].split()[0])
    assert nats == pytest.approx(spread**2 / 0.5, rel=0.05)


def test_a_prompt_that_is_held_out_and_trained_on_is_found(part):
    [(level, what)] = seen("environment: leakage", part(["The grass", "other"]))
    assert level == "error"
    assert "1 of 2" in what


def test_prompts_that_repeat_are_noted(part):
    assert levels("environment: repeated prompts", part(prompts=["red", "blue", "red"])) == ["note"]


def test_the_cost_counts_sixteen_bytes_for_each_weight_to_train(part):
    [(level, what)] = seen("environment: cost", part())
    assert level == "note"
    weights = sum(weight.numel() for weight in tiny_model().model.parameters())
    head = 32 * 128 + 128 + 128 + 1  # the value function: a hidden layer of four times 32
    mebibytes = float(what.partition("Adam ")[2].split()[0])
    assert mebibytes == pytest.approx(16 * (weights + head) / 2**20, rel=0.1)


def test_a_context_shorter_than_prompt_and_response_is_a_finding(text_options):
    diagnosis = diagnose(env_id="textenv/Text-v0", options={**text_options, "max_new_tokens": 60})
    [finding] = diagnosis.findings
    assert finding.check == "environment: making"
    assert "must fit the reference's context (64)" in finding.what
    assert not diagnosis.healthy


def test_a_wrong_option_of_an_environment_is_an_error_of_the_caller(text_options):
    with pytest.raises(ValueError, match="kl_coeff"):
        diagnose(env_id="textenv/Text-v0", options={**text_options, "kl_coeff": 1})
    with pytest.raises(ValueError, match="Did you mean"):
        diagnose(env_id="textenv/Micr-v0")
    with pytest.raises(ValueError, match="options must go with an environment"):
        diagnose(model="micro-reference", options={"kl_coef": 1})


@pytest.mark.parametrize("env_id", ["textenv/Micro-v0", "textenv/Assistant-v0"])
def test_the_worlds_included_here_are_healthy(env_id):
    progress = []
    diagnosis = diagnose(env_id=env_id, on_progress=lambda done, total: progress.append((done, total)))
    assert diagnosis.healthy
    assert {finding.level for finding in diagnosis.findings} == {"note"}, diagnosis.findings
    assert {"model: sampler", "reward model: batch", "environment: cost"} <= set(diagnosis.ran)
    assert diagnosis.absent == ("demonstrations", "preferences")
    assert progress[0][0] == 0
    assert progress[-1][0] == progress[-1][1]


def test_an_examination_leaves_the_reference_and_the_ids_as_they_were():
    before = {name: w.clone() for name, w in textenv.language_model("micro-reference").model.named_parameters()}
    ids = set(gymnasium.registry)
    state = torch.get_rng_state()
    diagnose(env_id="textenv/Micro-v0")
    assert torch.equal(torch.get_rng_state(), state)
    assert set(gymnasium.registry) == ids
    for name, weight in textenv.language_model("micro-reference").model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.grad is None
