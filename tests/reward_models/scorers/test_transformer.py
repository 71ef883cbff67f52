"""The learned reward model: a score depends on its own text alone, and survives saving."""

import logging
import random

import gymnasium
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
)

import textenv
from reward_models.preferences import Ranking
from reward_models.scorers.heads import score_head
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from reward_models.training.trainer import evaluate_reward_model
from tests.conftest import FAMILIES, encoder_folder, tiny_model
from textenv.lm.load import wrap_language_model

PROMPTS = ["what is the sky ?", "red", "is <eos> the grass not green ?", "the the the", "what <eos>"]
COMPLETIONS = ["blue", "the sky is not red the sky is blue", "", "green <eos> red", "grass"]

RANKINGS = [
    Ranking("what is the sky ?", ("blue", "the sky is blue", "grass", "")),
    Ranking("red", ("green", "blue blue blue")),
    Ranking("the grass is", ("green", "red", "not red")),
]


SAVED = ["gpt2", "llama"]
"""Not Qwen2: whatever tokenizer its folder holds, transformers' AutoTokenizer reads it as Qwen's own."""


def scorer(family="gpt2", **options):
    """A reward model with a random head (a new one is all zeros)."""
    model = TransformerRewardModel.from_language_model(tiny_model(family), **options)
    with torch.no_grad():
        model.model.score.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(params=list(FAMILIES))
def model(request):
    return scorer(request.param)


def by_hand(model, prompt, completion):
    """One text alone, without padding, through the trunk and the head."""
    ids = model.tokenizer(prompt).input_ids + model.tokenizer(completion).input_ids + [0]
    with torch.no_grad():
        hidden = model.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return (hidden @ model.model.score.weight[0]).item()


def test_a_score_is_read_at_the_eos_after_the_completion(model):
    expected = [by_hand(model, prompt, completion) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert model(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_scores_do_not_depend_on_batch_size_order_or_company(model):
    expected = model(PROMPTS, COMPLETIONS)
    for size in (1, 2, 64):
        model.batch_size = size
        assert model(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    order = [3, 0, 4, 1, 2]
    shuffled = model([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert model(PROMPTS[:1], COMPLETIONS[:1], finish_reason=["eos"]) == pytest.approx(expected[:1], abs=1e-5)


@pytest.mark.parametrize("family", SAVED)
def test_saved_and_loaded_scores_are_equal_in_plain_transformers_too(family, tmp_path):
    model = scorer(family)
    expected = model(PROMPTS, COMPLETIONS)
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path)
    after = loaded.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in model.model.state_dict().items())
    # Not bit by bit: where weights lie in memory decides which of its ways a matrix product goes.
    assert loaded(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert plain_scores(tmp_path) == pytest.approx(expected, abs=1e-5)


def plain_scores(folder):
    """What a user of transformers would write: one padded batch, the model's own way to find the last token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [f"{prompt} {completion} <eos>" for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].tolist()


def test_a_trunk_with_a_state_scores_each_text_as_if_alone_or_is_refused_by_name():
    model = scorer("jamba")
    expected = [by_hand(model, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert model(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ValueError, match=r"a sequence classifier for, got MambaForCausalLM\. Start from another"):
        TransformerRewardModel.from_language_model(tiny_model("mamba"))


def test_the_padding_token_is_none_of_the_real_ones_and_the_language_model_stays_as_it_was(family_model):
    before = {key: value.clone() for key, value in family_model.model.state_dict().items()}
    state = torch.get_rng_state(), random.getstate()
    model = TransformerRewardModel.from_language_model(family_model)
    assert (torch.equal(torch.get_rng_state(), state[0]), random.getstate()) == (True, state[1])
    assert family_model.tokenizer.pad_token_id == family_model.eos_id  # as in many published models
    assert model.tokenizer.pad_token == "<pad>"
    assert model.model.config.pad_token_id == model.tokenizer.pad_token_id == 12
    assert model.model.get_input_embeddings().weight.shape[0] == 13
    assert all(torch.equal(value, before[key]) for key, value in family_model.model.state_dict().items())
    assert model(PROMPTS, COMPLETIONS) == [0.0] * 5


def test_a_padding_token_of_its_own_is_kept():
    lm = tiny_model()
    lm.tokenizer.pad_token = "not"
    model = TransformerRewardModel.from_language_model(lm)
    assert (model.tokenizer.pad_token, model.model.config.pad_token_id) == ("not", 10)
    assert model.model.get_input_embeddings().weight.shape[0] == 12


def test_long_prompts_lose_their_left_part_counted_and_logged_once(caplog):
    model = scorer()
    long = "red " * 62 + "what is"  # 64 tokens; "blue" and EOS leave room for 62
    with caplog.at_level(logging.WARNING):
        (score,) = model([long], ["blue"])
        model([long], ["blue"])
    assert score == pytest.approx(by_hand(model, "red " * 60 + "what is", "blue"), abs=1e-5)
    assert model.truncated_prompts == 2
    assert len(caplog.records) == 1


def test_chats_go_through_the_template_and_rendered_chats_get_no_second_bos():
    model = scorer()
    model.tokenizer.add_special_tokens({"bos_token": "<unk>"})
    bos = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 11)])
    model.tokenizer.backend_tokenizer.post_processor = bos
    model.tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = [{"role": "user", "content": "the sky"}]
    scores = model([chat, "<unk> the sky ", "the sky"], ["is blue"] * 3)
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert scores == pytest.approx([by_hand(model, "<unk> the sky", "is blue")] * 3, abs=1e-5)


@pytest.mark.parametrize("family", SAVED)
def test_normalised_scores_have_mean_zero_and_unit_spread_within_a_prompt(family, tmp_path):
    model = scorer(family)
    prompts, completions = zip(*[(r.prompt, text) for r in RANKINGS for text in r.responses], strict=True)
    raw = torch.tensor(model(prompts, completions), dtype=torch.float64).split([4, 2, 3])
    measured = evaluate_reward_model(model, RANKINGS)
    # Pooled within prompts: Σ (s − mean of its prompt)² / (3 + 1 + 2)
    deviation = (sum((part - part.mean()).square().sum() for part in raw) / 6).sqrt()
    mean = sum(part.mean() for part in raw) / 3
    model.normalize(RANKINGS)
    has_bias = model.model.config.model_type == "gpt2"  # a model without one is scaled alone
    expected = ((torch.cat(raw) - has_bias * mean) / deviation).tolist()
    assert model(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert evaluate_reward_model(model, RANKINGS) == pytest.approx(measured, rel=1e-4)

    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert loaded(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert evaluate_reward_model(loaded, RANKINGS) == pytest.approx(measured, rel=1e-4)
    assert plain_scores(tmp_path) == pytest.approx(model(PROMPTS, COMPLETIONS), abs=1e-5)

    with torch.no_grad():
        model.model.score.weight.mul_(3.0)  # what further training may do
    model.normalize(RANKINGS)
    assert model(prompts, completions) == pytest.approx(expected, abs=1e-4)


def opt():
    """A decoder whose final norm is not the last of its modules, so that its bias must not take the shift."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64}
    config = AutoConfig.for_model(
        "opt", vocab_size=12, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, eos_token_id=0, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = wrap_language_model(AutoModelForCausalLM.from_config(config), tiny_model().tokenizer)
        model = TransformerRewardModel.from_language_model(lm)
        model.model.score.weight.data.normal_()
    return model


def bert(folder):
    """An encoder whose head has a bias."""
    model = TransformerRewardModel.from_encoder(encoder_folder("bert", folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.model.classifier.parameters():
            parameter.data.normal_(2.0, 1.0)
    return model


@pytest.mark.parametrize("kind", ["opt", "bert"])
def test_models_that_keep_the_shift_in_the_head_or_not_at_all_are_normalised_again_and_again(kind, tmp_path):
    model = opt() if kind == "opt" else bert(tmp_path / "start")
    prompts, completions = zip(*[(r.prompt, text) for r in RANKINGS for text in r.responses], strict=True)
    raw = torch.tensor(model(prompts, completions), dtype=torch.float64).split([4, 2, 3])
    deviation = (sum((part - part.mean()).square().sum() for part in raw) / 6).sqrt()
    mean = sum(part.mean() for part in raw) / 3
    expected = ((torch.cat(raw) - (mean if kind == "bert" else 0.0)) / deviation).tolist()
    for scale in (1.0, 3.0):
        with torch.no_grad():
            score_head(model.model).weight.mul_(scale)
        model.normalize(RANKINGS)
        assert model(prompts, completions) == pytest.approx(expected, abs=5e-3)
        assert model.score_unit == pytest.approx(scale * deviation.item(), rel=1e-3)  # what the weights meant before
    model.save_pretrained(tmp_path / "saved")
    assert load_reward_model(tmp_path / "saved")(prompts, completions) == pytest.approx(expected, abs=5e-3)


def test_an_encoder_decoder_or_an_encoder_of_two_labels_is_no_reward_model(tmp_path):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    dims = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
    bart = BartForSequenceClassification(BartConfig(vocab_size=13, num_labels=1, **sizes, **dims))
    with pytest.raises(ValueError, match="an encoder whose classifier has one output"):
        score_head(bart)
    encoder = AutoModelForSequenceClassification.from_pretrained(encoder_folder("bert", tmp_path), num_labels=2)
    with pytest.raises(ValueError, match="an encoder whose classifier has one output"):
        score_head(encoder)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [3.0, 3.0], [3.0, 3.0000002], [-30.0, -30.000002]])
def test_scores_that_differ_by_no_more_than_rounding_cannot_be_normalised(scores):
    """Two float32 neighbours of one number are what two equal texts can get in one batch."""
    model = TransformerRewardModel.from_language_model(tiny_model())
    pairs = [Ranking("what is the sky ?", ("red", "blue"))]
    with pytest.raises(ValueError, match="scores must differ within a prompt"):
        model.normalize(pairs, torch.tensor(scores))
    model.normalize(pairs, torch.tensor([3.0, 3.0001]))


def test_what_is_no_reward_model_is_refused_by_name(tmp_path, model_folder):
    with pytest.raises(ValueError, match="a reward model must be a registered name"):
        load_reward_model(tmp_path / "nothing")
    model = scorer()
    model.model.score = torch.nn.Linear(32, 2, bias=False)
    model.model.config.num_labels = 2
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="linear `score` head of one label"):
        load_reward_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="failed"):
        load_reward_model(tmp_path)
    with pytest.raises(ValueError, match="as many"):
        model(["a"], [])


def test_a_folder_is_a_reward_model_of_an_environment(tmp_path, text_options):
    model = scorer("llama")
    model.save_pretrained(tmp_path / "rm")
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "reward_model": str(tmp_path / "rm")})
    env.reset(seed=0)
    for action in (3, 4, 0):
        *_, info = env.step(action)
    assert info["rm_score"] == pytest.approx(model([info["prompt"]], [info["response"]])[0], abs=1e-5)
    assert textenv.reward_model(str(tmp_path / "rm")) is textenv.reward_model(str(tmp_path / "rm"))


def test_a_folder_is_padded_on_the_right_however_the_tokenizer_was_used(tmp_path):
    model = scorer()
    expected = model(PROMPTS, COMPLETIONS)
    model.tokenizer.padding_side = "left"
    model.save_pretrained(tmp_path)
    assert plain_scores(tmp_path) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_reads_no_more_than_its_positions_and_its_tokenizer_allow(tmp_path):
    # RoBERTa counts positions from behind the number of its padding token, here 12: 13 of 64 are never used.
    encoder = TransformerRewardModel.from_encoder(encoder_folder("roberta", tmp_path / "roberta"))
    assert encoder.max_tokens == 51
    with torch.no_grad():
        score_head(encoder.model).weight.normal_(generator=torch.Generator().manual_seed(0))
    # <cls> prompt <sep> blue <sep>
    kept = " ".join(["red"] * 45 + ["what", "is"])
    assert encoder([f"green green {kept}"], ["blue"]) == pytest.approx(encoder([kept], ["blue"]), abs=1e-6)
    assert encoder.truncated_prompts == 1
    encoder.tokenizer.model_max_length = 40
    assert encoder.max_tokens == 40
    bert = TransformerRewardModel.from_encoder(encoder_folder("bert", tmp_path / "bert"))
    assert bert.max_tokens == 64
    decoder = scorer()
    decoder.tokenizer.model_max_length = 8
    assert decoder.max_tokens == 64
