"""What a reward model reads: its own chat template, pairs of an encoder, and the right end of a prompt too long."""

import logging

import gymnasium
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_models.preferences import Ranking
from reward_models.scorers.heads import score_rows, score_rows_in_buckets
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import ENCODERS, encoder_folder, tiny_model, word_tokenizer
from textenv.lm import length_buckets
from textenv.lm.load import wrap_language_model

WORDS = ["green", "grass", "sky"]
POLICY_TEMPLATE = "{% for m in messages %}green {{ m['content'] }} {% endfor %}"
TEMPLATES = {
    # Each role has its word, the assistant's turn opens with "the"; what follows its message differs.
    "nothing after": "",
    "an end of turn": " grass",
    "an end of turn and EOS and more": " grass <eos> not",
}
CHAT = [{"role": "user", "content": "what is the sky ?"}]
LONG_CHAT = [*CHAT, {"role": "assistant", "content": "blue"}, {"role": "user", "content": "not red ?"}]


def template(after):
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}is {{ m['content'] }} {% else %}"
        "the {{ m['content'] }}" + after + " {% endif %}{% endfor %}{% if add_generation_prompt %}the {% endif %}"
    )


def randomised(model):
    """Weights so large that every token shows in the score; a new head is all zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def decoder():
    return randomised(TransformerRewardModel.from_language_model(tiny_model()))


def encoder(kind, folder):
    return randomised(TransformerRewardModel.from_encoder(encoder_folder(kind, folder)))


def logit(model, text):
    """The score of one whole text, read at its last token by plain transformers."""
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.model(input_ids=ids).logits[0, 0].item()


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_reads_as_the_models_own_template_would_render_the_whole_conversation(kind):
    model = decoder()
    model.tokenizer.chat_template = template(TEMPLATES[kind])
    for chat in (CHAT, LONG_CHAT):
        whole = [*chat, {"role": "assistant", "content": "red sky"}]
        text = model.tokenizer.apply_chat_template(whole, tokenize=False)
        text += "" if TEMPLATES[kind] else " <eos>"  # where the template puts nothing, EOS is the place
        expected = pytest.approx(logit(model, text), abs=1e-5)
        assert model([chat], ["red sky"])[0] == expected
        # What another model's template made of the chat plays no part beside its messages.
        assert model(["green what is"], ["red sky"], chat=[chat])[0] == expected
    # A prompt that is no chat ends in EOS, in the company of chats too.
    mixed = model(["the grass", "green"], ["is red", "red sky"], chat=[None, CHAT])
    assert mixed == pytest.approx([logit(model, "the grass is red <eos>"), model([CHAT], ["red sky"])[0]], abs=1e-5)


def test_a_tokenizer_that_starts_texts_with_a_token_puts_none_into_a_chat():
    model = decoder()
    model.tokenizer.chat_template = template(" grass not")
    expected = model([CHAT], ["red sky"])
    bos = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 11)])
    model.tokenizer.backend_tokenizer.post_processor = bos
    assert model([CHAT], ["red sky"]) == expected
    assert model(["green"], ["red"])[0] == pytest.approx(logit(model, "<unk> green red <eos>"), abs=1e-5)


def test_a_model_without_a_template_reads_what_the_policys_template_rendered():
    model = decoder()
    expected = logit(model, "green what is the sky ? red <eos>")
    assert model(["green what is the sky ?"], ["red"], chat=[CHAT])[0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="needs a chat template"):
        model([CHAT], ["red"])


@pytest.mark.parametrize("own", [True, False])
def test_an_environment_hands_chats_to_the_reward_model_in_its_own_template(own, tmp_path, text_options):
    lm = tiny_model()
    lm.tokenizer.chat_template = POLICY_TEMPLATE
    lm.save_pretrained(tmp_path / "policy")
    model = decoder()
    model.tokenizer.chat_template = template(" grass not") if own else None
    model.save_pretrained(tmp_path / "rm")
    options = {"prompts": [{"prompt": LONG_CHAT}], "reference": str(tmp_path / "policy"), "max_prompt_tokens": 20}
    plain, summed = str(tmp_path / "rm"), {"weighted": {"rm": {"model": str(tmp_path / "rm"), "weight": 2.0}}}
    cached = {"cache": str(tmp_path / "scores.sqlite"), "of": plain}
    ensemble = {"ensemble": [plain, plain]}
    text = "is what is the sky ? the blue grass not is not red ? the blue sky grass not"
    if not own:
        text = "green what is the sky ? green blue green not red ? blue sky <eos>"
    for reward_model, scale in ((plain, 1.0), (summed, 2.0), (cached, 1.0), (ensemble, 1.0)):
        env = gymnasium.make("textenv/Text-v0", **{**text_options, **options, "reward_model": reward_model})
        env.reset(seed=0)
        for action in (3, 4, 0):  # blue sky <eos>
            *_, info = env.step(action)
        assert info["rm_score"] == pytest.approx(scale * logit(model, text), abs=1e-5)


def test_an_encoder_reads_a_chat_by_its_own_template_as_the_first_of_the_pair(tmp_path):
    model = encoder("bert", tmp_path)
    model.tokenizer.chat_template = template(" grass")
    expected = model(["is what is the sky ? the"], ["red"])
    assert model(["green what"], ["red"], chat=[CHAT]) == pytest.approx(expected, abs=1e-6)
    assert model([CHAT], ["red"]) == pytest.approx(expected, abs=1e-6)


PROMPTS = ["what is the sky ?", "red", "is the <eos> not green", "the grass is not the sky is it"]
TEXTS = ["blue", "green grass is not blue", "", "red"]


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_saved_encoder_scores_alike_in_plain_transformers_padded_or_alone(kind, tmp_path):
    model = encoder(kind, tmp_path / "start")
    rankings = [Ranking(prompt, (text, "is sky")) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    model.normalize(rankings)
    expected = model(PROMPTS, TEXTS)
    assert max(expected) - min(expected) > 0.1
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    together = tokenizer(PROMPTS, TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert plain(**together).logits[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
        for prompt, text, score in zip(PROMPTS, TEXTS, expected, strict=True):
            alone = tokenizer([prompt], [text], return_tensors="pt")  # lists, or an empty text would be no pair
            assert plain(**alone).logits.item() == pytest.approx(score, abs=1e-5)
    loaded = load_reward_model(tmp_path / "saved")
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.model.state_dict().items())
    assert loaded(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-5)


SEGMENTED = ["input_ids", "token_type_ids", "attention_mask"]
"""What the tokenizer of a published BERT returns."""


def test_segments_tell_the_prompt_from_the_response_also_where_the_prompt_was_cut(tmp_path):
    model = encoder("bert", tmp_path)
    model.tokenizer.model_input_names = SEGMENTED
    # The first two have the same tokens. Of the last prompt 64 − 2 − 3 tokens are kept.
    prompts, texts = ["red", "red <sep> blue", "green " * 80 + "sky"], ["blue <sep>", "", "grass is"]
    expected = []
    for prompt, text in zip([*prompts[:2], "green " * 58 + "sky"], texts, strict=True):
        parts = [["<cls>", *prompt.split(), "<sep>"], [*text.split(), "<sep>"]]
        ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(parts[0] + parts[1])])
        types = torch.tensor([[0] * len(parts[0]) + [1] * len(parts[1])])
        with torch.no_grad():
            expected.append(model.model(input_ids=ids, token_type_ids=types).logits.item())
    assert model(prompts, texts) == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_prompts_too_long_are_cut_on_the_left_counted_in_the_metrics_and_said_once(kind, tmp_path, caplog):
    start = decoder() if kind == "gpt2" else encoder("bert", tmp_path)
    long = "red " * 70 + "what is the"
    # 64 positions: "green", "grass not" and what ends or separates them leave room for this many tokens of the prompt.
    room = {"gpt2": (62, 61), "bert": (60, 59)}[kind]
    texts = ("green", "grass not")
    rankings = [Ranking(long, texts), Ranking("the sky", ("blue", "red"))]
    with caplog.at_level(logging.WARNING, "reward_models"):
        result = train_reward_model(start, rankings, RewardConfig(batch_size=2), eval_rankings=rankings)
    # The long prompt counts once, whatever the number of its texts, to train on and once more held out.
    assert result.metrics["truncated_prompts"] == 2
    said = [record.getMessage() for record in caplog.records if record.name.startswith("reward_models")]
    assert said == [f"Reward model {start.name} (≤ 64 tokens): 1 prompt cut on the left."]
    assert start.truncated_prompts == 0  # the model that was given did not read anything
    kept = [" ".join(long.split()[-tokens:]) for tokens in room]
    assert start([long, long], texts) == pytest.approx(start(kept, texts), abs=1e-5)
    assert start.truncated_prompts == 1  # and those that fit just so are not cut
    start([long, "green " * 70], ["green", "green"])
    assert start.truncated_prompts == 3
    # The response is whole: its first word and its last one matter.
    scores = start([long] * 3, ["grass not", "blue not", "grass red"])
    assert len({round(score, 4) for score in scores}) == 3


def test_the_longest_response_leaves_a_decoder_no_prompt_and_an_encoder_a_token_of_it(tmp_path):
    model = decoder()
    assert model(["red"], ["blue " * 63])[0] == pytest.approx(logit(model, "blue " * 63 + "<eos>"), abs=1e-5)
    model = encoder("bert", tmp_path)
    assert model(["green red"], ["blue " * 60]) == pytest.approx(model(["red"], ["blue " * 60]), abs=1e-6)
    assert model(["green red"], ["blue " * 61]) == pytest.approx(model(["red"], ["blue " * 60]), abs=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_response_longer_than_the_context_is_cut_at_its_end_counted_and_said_once(kind, tmp_path, caplog):
    model = decoder() if kind == "gpt2" else encoder(kind, tmp_path)
    long, fits = "blue " * 60 + "green red not " * 9, "blue " * 60 + ("green red not" if kind == "gpt2" else "")
    with caplog.at_level(logging.WARNING, "reward_models"):
        cut = model(["sky", "sky"], [long, "blue"])
        model(["sky"], [long])
    assert cut == pytest.approx([*model(["sky"], [fits]), *model(["sky"], ["blue"])], abs=1e-5)
    assert model.truncated_responses == 2
    assert [r.getMessage() for r in caplog.records if "at the end" in r.getMessage()] == [
        f"Reward model {model.name} (≤ 64 tokens): 1 response cut at the end. The score is that of the rest."
    ]


def test_a_tokenizer_that_cuts_on_the_right_is_left_as_it_was(tmp_path):
    model = encoder("bert", tmp_path)
    model.tokenizer.truncation_side = "right"
    model(["red " * 70], ["blue"])
    assert model.tokenizer.truncation_side == "right"


def test_a_decoders_tokenizer_must_have_an_eos_token():
    model = decoder()
    words = word_tokenizer()
    words.eos_token = None
    with pytest.raises(ValueError, match="must have an EOS token"):
        TransformerRewardModel(model.model, words)
    with pytest.raises(ValueError, match="must have an EOS token"):
        wrap_language_model(tiny_model().model, words)


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    """transformers would read it with a tokenizer that knows no word, and score every text the same."""
    randomised(TransformerRewardModel.from_language_model(tiny_model())).save_pretrained(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="a folder must hold its tokenizer"):
        load_reward_model(tmp_path)


def counted_rows(model):
    """Shapes ``[rows, width]`` of all that passes the trunk from now on."""
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda table, given: seen.append(tuple(given[0].shape)))
    return seen


def test_rows_of_similar_length_are_padded_by_less_than_a_tenth():
    """Lengths like those of dialogues: a long tail (log-normal, median 120, from 5 to some 1,500 tokens)."""
    lengths = torch.exp(torch.randn(1_200, generator=torch.Generator().manual_seed(0)) * 0.7 + 4.8).long() + 5
    chunks = list(length_buckets(lengths, 64, max_padding=0.1))
    assert sorted(torch.cat(chunks).tolist()) == list(range(1_200))
    assert max(map(len, chunks)) == 64
    assert 1 - int(lengths.sum()) / sum(len(index) * int(lengths[index].max()) for index in chunks) < 0.1
    assert len(chunks) < 1.7 * 1_200 / 64
    model = decoder()
    rows = counted_rows(model.model)
    responses = ["blue " * (5 + 7 * i % 50) for i in range(1_200)]
    model(["red"] * 1_200, responses)
    assert sum(count for count, _ in rows) == 1_200, "each response passes the trunk once"
    real = sum(len(text.split()) + 2 for text in responses)
    assert 1 - real / sum(count * width for count, width in rows) < 0.1


def test_training_passes_every_response_once_and_pads_less_than_a_tenth():
    """Lengths differ within every prompt, so that no order of the prompts could do it."""
    lengths = [[3 + 7 * i % 50, 3 + 11 * i % 50, 3 + (13 * i + 1) % 50] for i in range(200)]
    rankings = [
        Ranking("red", tuple("blue " * n + word for n, word in zip(row, WORDS, strict=True))) for row in lengths
    ]
    model = decoder()
    passes = counted_rows(model.model)  # a copy, which training makes, keeps the hook
    train_reward_model(model, rankings, RewardConfig(batch_size=100, epochs=1, normalize=False))
    assert sum(count for count, _ in passes) == 600
    real = sum(n + 3 for row in lengths for n in row)
    assert 1 - real / sum(count * width for count, width in passes) < 0.1


@pytest.mark.parametrize("kind", ["decoder", *ENCODERS])
def test_scores_in_buckets_have_the_values_and_gradients_of_one_pass(kind, tmp_path):
    model = decoder() if kind == "decoder" else encoder(kind, tmp_path)
    texts = model.encode(["red is"] * 90, ["blue " * (1 + 17 * i % 40) + WORDS[i % 3] for i in range(90)])
    batch = texts.batch(torch.arange(90))
    weight = torch.linspace(-1, 1, 90)
    passes = counted_rows(model.model)
    found = []
    for read in (score_rows, score_rows_in_buckets):
        scores = read(model.model, **batch)
        used = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad((weight * scores).sum(), used, allow_unused=True)
        found.append((scores, torch.cat([g.flatten() for g in gradients if g is not None])))
    assert len(passes) > 2, "one pass, then several"
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5 * float(one.detach().abs().max()))
