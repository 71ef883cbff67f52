"""Where a turn ends: what the generation config names, and what the chat template writes."""

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from agents.ppo import PPO, PPOConfig
from agents.sft import SFTConfig, load_demonstrations, tokenise
from reward_models.scorers.texts import encode_for_decoder
from tests.conftest import WORDS, tiny_model, word_tokenizer
from textenv.lm.endings import ending_ids, template_ending, turn_end_id
from textenv.lm.load import load_language_model, wrap_language_model

EOS, GREEN, STOP = WORDS.index("<eos>"), WORDS.index("green"), WORDS.index("?")
CHATML = (
    "{% for m in messages %}{{ '<start> ' + m.role + ' ' + m.content + ' <end> \n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start> assistant ' }}{% endif %}"
)


def chat_tokenizer(template: str):
    words = word_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    words.chat_template = template
    return words


def chat_model(eos_token_id=0):
    model = tiny_model().model
    model.resize_token_embeddings(len(WORDS) + 2, mean_resizing=False)
    model.generation_config.eos_token_id = eos_token_id
    return wrap_language_model(model, chat_tokenizer(CHATML), name="chat")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (0, (0,)),
        ([1, 3], (0, 1, 3)),
        ([3, 0, 3], (0, 3)),
        (None, (0,)),
        ([0, 900], (0,)),  # a row that the LM head does not have is never drawn
    ],
)
def test_every_eos_of_the_generation_config_ends_a_turn(named, expected):
    model = tiny_model().model
    model.generation_config.eos_token_id = named
    assert ending_ids(model, word_tokenizer()) == expected


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<end>"),
        ("{% for m in messages %}{{ m.content + ' <eos> ' }}{% endfor %}", "<eos>"),
        (
            "{% for m in messages %}{{ m.role + ' ' + m.content + ' \n ' }}{% endfor %}",
            "<eos>",
        ),  # nothing but a line break
        ("{% for m in messages %}{{ m.content + ' not ' }}{% endfor %}", "<eos>"),  # a word that answers use too
        ("{% for m in messages %}{{ m.content + ' not <end> ' }}{% endfor %}", "<end>"),
    ],
)
def test_a_chat_ends_with_the_token_of_its_template(template, token):
    tokenizer = chat_tokenizer(template)
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)


def test_a_tokenizer_without_template_closes_with_eos():
    assert template_ending(word_tokenizer()) == []
    assert turn_end_id(word_tokenizer()) == EOS


def test_the_ending_tokens_survive_saving_and_loading(tmp_path):
    saved = chat_model([0, 3])
    saved.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path)
    assert loaded.ending_ids == saved.ending_ids == (0, 3, 13)
    assert loaded.turn_end_id == 13


def test_sft_learns_the_token_that_closes_the_turn():
    lm = chat_model()
    records = [
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "the sky"}]},
        {"prompt": "red", "completion": "the sky"},
    ]
    padded, lengths = tokenise(lm, load_demonstrations(records), SFTConfig()).responses.padded(torch.arange(2))
    the, sky = WORDS.index("the"), WORDS.index("sky")
    assert lengths.tolist() == [3, 3]
    assert padded.tolist() == [[the, sky, 13], [the, sky, EOS]]


def test_a_reward_model_reads_the_answer_as_the_template_closes_it():
    lm = chat_model()
    encoded = encode_for_decoder(lm.tokenizer, [[{"role": "user", "content": "red"}], "red"], ["sky", "sky"], 64)
    padded, lengths = encoded.texts.padded(torch.arange(2))
    ends = [row[length - 2 : length].tolist() for row, length in zip(padded, lengths, strict=True)]
    assert ends == [[WORDS.index("sky"), 13], [WORDS.index("sky"), EOS]]


def folder_with_two_endings(tmp_path):
    model = tiny_model()
    model.model.generation_config.eos_token_id = [EOS, GREEN]
    model.save_pretrained(tmp_path / "two")
    return str(tmp_path / "two")


def test_an_episode_ends_on_each_of_the_ending_tokens(text_options, tmp_path):
    options = text_options | {"reference": folder_with_two_endings(tmp_path), "stop_tokens": ("?",)}
    env = gymnasium.make("textenv/Text-v0", **options)
    seen = {}
    for last in (EOS, GREEN, STOP):
        env.reset(seed=0)
        env.step(WORDS.index("blue"))
        _, _, terminated, _, info = env.step(last)
        assert terminated
        seen[last] = info["finish_reason"], info["response"]
    # An ending token is no word of the response, even if the tokenizer does not call it special; a stop token is.
    assert seen == {EOS: ("eos", "blue"), GREEN: ("eos", "blue"), STOP: ("stop", "blue ?")}


def test_ending_tokens_are_masked_before_the_least_length(text_options, tmp_path):
    options = text_options | {"reference": folder_with_two_endings(tmp_path), "min_new_tokens": 1}
    env = gymnasium.make("textenv/Text-v0", **options)
    env.reset(seed=0)
    assert np.flatnonzero(~env.unwrapped.action_masks()).tolist() == [EOS, GREEN]


def test_ppo_ends_turns_on_either_token_and_counts_both(text_options, tmp_path):
    textenv.register_reward_model("even", lambda prompts, completions: [0.0] * len(prompts))
    options = text_options | {"reference": folder_with_two_endings(tmp_path), "reward_model": "even"}
    env = gymnasium.make_vec("textenv/Text-v0", num_envs=64, **options)
    agent = PPO(env, PPOConfig(batch_size=64, seed=0))
    agent.learn(64)
    rollout = agent.collect()
    last = rollout.tokens.response_ids.gather(1, rollout.tokens.response_lengths[:, None] - 1).squeeze(1).numpy()
    assert {EOS, GREEN} <= set(last.tolist())
    by_hand = np.isin(last, [EOS, GREEN])
    assert rollout.ended.tolist() == by_hand.tolist()
