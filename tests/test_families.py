"""Each family of models that the README names: a tiny random member passes through everything that trains it.

The oracle is plain transformers (or peft) on one row without padding, in a softmax of float64.
"""

import gymnasium
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import textenv
from agents.ppo import PPO, PPOConfig
from agents.sft import SFTConfig, train_sft
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import EVERY_FAMILY, tiny_model
from tests.oracles import alone, hidden_alone
from textenv.lm import (
    Responses,
    ScalarHead,
    TokenRule,
    gather_predictions,
    load_language_model,
    packing,
    pad_left,
    pad_right,
    response_logprobs,
    response_outputs,
    response_scores,
    sample_responses,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RULE = TokenRule(temperature=0.8, min_new_tokens=1, stop_ids=(0,))
HALF = TokenRule(temperature=0.8, min_new_tokens=1, stop_ids=(0, 1, 2, 3, 4, 5))
"""With several ending tokens, so that rows end at different lengths."""
PROMPTS = [[1, 2, 3], [4], [0, 5, 0, 6, 7], [8, 9], [2, 2, 2, 2], [10], [3, 0], [7, 6, 5, 4, 3, 2]]
RESPONSES = [[4, 5, 0], [6, 0], [1, 2, 3, 4, 5, 0], [9, 9, 9, 9, 9, 9], [3, 0], [1, 1, 0], [2, 0], [5]]
"""Token 0 ends a response, pads it, and stands in prompts."""


@pytest.fixture(scope="module", params=list(EVERY_FAMILY))
def family(request):
    textenv.register_language_model(f"family-{request.param}", lambda: tiny_model(request.param))
    return request.param


@pytest.fixture(scope="module")
def lm(family):
    return tiny_model(family)


@pytest.fixture(scope="module")
def expected(lm):
    return [alone(lm.model, *row, RULE) for row in zip(PROMPTS, RESPONSES, strict=True)]


def batch_of(indices, left=0, right=0, fill=0):
    """A batch with extra padding columns that hold ``fill``."""
    prompts, responses = [PROMPTS[i] for i in indices], [RESPONSES[i] for i in indices]
    width, length = max(map(len, prompts)) + left, max(map(len, responses)) + right
    return Responses(*pad_left(prompts, fill, width), *pad_right(responses, fill, length))


def random_head(size):
    head = ScalarHead(size)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    return head


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_logprobs_are_those_of_a_row_alone_whatever_padding_and_batch(lm, expected, size, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(packing, "can_pack", lambda model: False)
    for left, right, fill in [(0, 0, 0), (1, 0, 0), (3, 2, 11), (7, 5, 0), (0, 9, 5)]:
        got = response_logprobs(lm.model, batch_of(range(8), left, right, fill), RULE, batch_size=size)
        for row, own in enumerate(expected):
            torch.testing.assert_close(got[row, : len(own)], own, atol=1e-5, rtol=0)
            assert (got[row, len(own) :] == 0).all()


def test_logprobs_do_not_depend_on_who_else_is_in_the_batch(lm, expected):
    for indices in ([3], [7, 3], [3, 0, 1, 2]):
        part = response_logprobs(lm.model, batch_of(indices), RULE)
        for row, index in enumerate(indices):
            torch.testing.assert_close(part[row, : len(expected[index])], expected[index], atol=1e-5, rtol=0)


def test_values_are_those_of_a_row_alone_in_decoding_with_a_cache_and_in_teacher_forcing(lm):
    """Left padding, the cache and rows leaving the batch change nothing that is reported."""
    prompts, lengths = pad_left(PROMPTS * 6, 0, 9)
    head = random_head(lm.hidden_size)
    draw = {"max_new_tokens": 12, "rule": HALF, "pad_id": 0, "generator": torch.Generator().manual_seed(0)}
    sampled = sample_responses(lm.model, prompts, lengths, value_head=head, **draw)
    assert len(set(sampled.response_lengths.tolist())) > 3
    batch = Responses(prompts, lengths, sampled.response_ids, sampled.response_lengths)
    with torch.no_grad():
        _, hidden = response_outputs(lm.model, batch, HALF)
        values = gather_predictions(head(hidden), batch)
    torch.testing.assert_close(sampled.values, values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sampled.logprobs, response_logprobs(lm.model, batch, HALF), atol=1e-5, rtol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        response = sampled.response_ids[row, : sampled.response_lengths[row]].tolist()
        own = head(hidden_alone(lm.model, prompt, response)).detach()
        torch.testing.assert_close(sampled.values[row, : len(response)], own, atol=1e-5, rtol=1e-5)
        own = alone(lm.model, prompt, response, HALF)
        torch.testing.assert_close(sampled.logprobs[row, : len(response)], own, atol=1e-5, rtol=1e-5)


def test_packed_rows_have_the_gradients_of_padded_ones(lm, monkeypatch):
    packed = gradients(lm.model)
    assert packing.can_pack(lm.model)
    monkeypatch.setattr(packing, "can_pack", lambda model: False)
    padded = gradients(lm.model)
    assert sum(float(grad.abs().max()) > 1e-3 for grad in padded) > 5
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def gradients(model):
    model.zero_grad()
    scores = response_scores(model, batch_of(range(8)), RULE, entropy=True)
    assert scores.entropy is not None
    weights = torch.linspace(-1, 1, len(scores.logprobs))
    ((scores.logprobs + scores.entropy) @ weights + 0.1 * scores.hidden.square().sum()).backward()
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return found


RECORDS = [
    {"prompt": "what is the sky ?", "completion": "blue"},
    {"prompt": "is <eos> the grass red ?", "completion": "not red the grass is green"},
    {"prompt": "the", "completion": "sky sky sky sky sky sky sky is blue"},
    {"prompt": "red green", "completion": ""},  # EOS alone
]


def test_the_first_loss_of_sft_is_the_nll_by_hand_and_the_folder_is_a_plain_model(lm, tmp_path):
    terms = []
    for record in RECORDS:
        prompt, completion = (lm.tokenizer(record[part]).input_ids for part in ("prompt", "completion"))
        terms += alone(lm.model, prompt, [*completion, 0], TokenRule()).tolist()
    config = SFTConfig(learning_rate=1e-2, epochs=2, batch_size=4, logging_steps=1)
    result = train_sft(lm, RECORDS, config, tmp_path / "sft")
    losses = [entry["loss"] for entry in result.history]
    assert losses[0] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)
    assert losses[-1] < losses[0]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ours = alone(result.model.model, prompt, response, RULE)
        torch.testing.assert_close(alone(plain, prompt, response, RULE), ours, atol=1e-5, rtol=0)
        assert not torch.allclose(ours, alone(lm.model, prompt, response, RULE), atol=1e-4)


RANKINGS = [
    {"prompt": "what is the sky ?", "responses": ["blue", "not red", "the grass"], "ranking": [0, 1, 2]},
    {"prompt": "grass", "chosen": "green", "rejected": "red red is the sky"},
    {"prompt": "is <eos> the grass", "responses": ["", "not"], "ranking": [0, 1]},
]


def test_scores_are_those_of_plain_transformers_on_one_text_whatever_the_batch(lm, tmp_path):
    config = RewardConfig(learning_rate=1e-2, epochs=3, batch_size=2)
    model = train_reward_model(lm, RANKINGS, config, tmp_path / "rm").model
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    prompts = [ranking["prompt"] for ranking in RANKINGS] * 2
    texts = ["blue", "green", "not red the grass is green", "", "sky sky", "is"]
    own = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([lm.tokenizer(prompt).input_ids + lm.tokenizer(text).input_ids + [0]])
        with torch.no_grad():
            own.append(plain(ids).logits.item())
    assert np.ptp(own) > 0.1
    for size in (1, 4, 64):
        model.batch_size = size
        assert model(prompts, texts) == pytest.approx(own, abs=1e-5)
    assert model(prompts[:1], texts[:1]) == pytest.approx(own[:1], abs=1e-5)


def learner(family, text_options, **config):
    env = gymnasium.make_vec("textenv/Text-v0", num_envs=16, **text_options | {"reference": f"family-{family}"})
    settings = {"batch_size": 16, "epochs": 1, "minibatches": 1, "learning_rate": 1e-2, "seed": 0}
    return PPO(env.unwrapped, PPOConfig(**settings, **config))


@pytest.mark.parametrize("rank", [0, 2])
def test_an_update_of_ppo_starts_at_ratio_one_leaves_the_reference_and_saves_a_plain_policy(
    family, text_options, rank, tmp_path
):
    peft = pytest.importorskip("peft")
    agent = learner(family, text_options, lora_rank=rank)
    rollout = agent.collect()
    with torch.no_grad():
        new = agent.actor.evaluate(rollout.tokens, agent.task)
    torch.testing.assert_close(new.logprobs, rollout.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(new.values, rollout.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.kl_per_token, torch.zeros_like(rollout.kl_per_token), atol=1e-5, rtol=0)
    agent.learn(16)
    policy, reference = agent.policy.model, agent.task.reference.model
    for weight, before in zip(reference.parameters(), tiny_model(family).model.parameters(), strict=True):
        assert torch.equal(weight, before)
    agent.save(tmp_path / "run")
    agent.save_merged(tmp_path / "merged")
    folder = tmp_path / "run" / "policy"
    if rank:
        plain = peft.PeftModel.from_pretrained(tiny_model(family).model, folder).eval()
        assert not (folder / "model.safetensors").exists()
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ours = alone(policy, prompt, response, RULE)
        assert not torch.allclose(ours, alone(reference, prompt, response, RULE), atol=1e-4)
        for saved in (plain, merged):
            torch.testing.assert_close(alone(saved, prompt, response, RULE), ours, atol=1e-5, rtol=0)


def test_saving_and_loading_keeps_the_function(lm, tmp_path):
    lm.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = load_language_model(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (0, 0, 12)
    assert loaded.encode_prompt("the sky is blue") == lm.encode_prompt("the sky is blue") == [7, 4, 6, 3]
    want = response_logprobs(lm.model, batch_of(range(8)), RULE)
    assert torch.equal(response_logprobs(loaded.model, batch_of(range(8)), RULE), want)
