"""Chats as their template writes them: what is learned of them, and where a turn ends."""

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import textenv
from agents.dpo import DPOConfig, encode
from agents.ppo import PPO, PPOConfig
from agents.sft import SFTConfig, load_demonstrations, mean_nll, tokenise
from reward_models.preferences import load_rankings
from reward_models.scorers.texts import encode_for_decoder
from tests.conftest import WORDS, tiny_model, word_tokenizer
from textenv.cli import main
from textenv.lm.chat import ending_ids, template_ending, turn_end_id
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
        ([0, len(WORDS)], (0,)),
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
        ("ANSWER <start> {% for m in messages %}{{ m.content + ' <end> ' }}{% endfor %}", "<end>"),  # the probe's word
    ],
)
def test_a_chat_ends_with_the_token_of_its_template(template, token):
    tokenizer = chat_tokenizer(template)
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)


def test_a_line_break_closes_no_turn_though_it_is_a_token():
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    tokenizer.add_tokens(["\n"])
    assert template_ending(tokenizer) == []


def test_what_closes_a_turn_is_without_the_tokens_that_every_text_gets():
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 12)]
    )
    assert tokenizer("red").input_ids == [12, 1]
    assert template_ending(tokenizer) == [13]


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


CHAT = [
    {"role": "system", "content": "is"},
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "the sky"},
    {"role": "user", "content": "green <eos>"},
    {"role": "assistant", "content": "the grass"},
]
MARKED = (
    "{% for m in messages %}{{ '<start> ' + m.role + ' ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + ' <end>' }}{% endgeneration %}{% else %}{{ m.content + ' <end>' }}{% endif %}"
    "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ '<start> assistant ' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<start> ' }}{% if m.role == 'assistant' and loop.last %}{{ 'not ' }}{% endif %}"
    "{{ m.content + ' <end> \n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start> ' }}{% endif %}"
)
"""An empty thinking part ("not") stands before the last answer alone, like Qwen 3's."""
REWRITING = "{% if not add_generation_prompt %}{{ 'is ' }}{% endif %}" + CHATML


def taught(lm, records, **options):
    """``(prompt tokens, learned tokens)`` of each example."""
    config = SFTConfig(**options)
    examples = tokenise(lm, load_demonstrations(records, turns=config.turns), config)
    sides = [part.flat.split(part.lengths.tolist()) for part in (examples.prompts, examples.responses)]
    return [(prompt.tolist(), learned.tolist()) for prompt, learned in zip(*sides, strict=True)]


def ids(words):
    return chat_tokenizer(CHATML)(words).input_ids


@pytest.mark.parametrize("template", [MARKED, CHATML], ids=["marked", "unmarked"])
def test_what_is_learned_of_a_chat_is_what_transformers_marks_as_the_assistants(template):
    lm = chat_model()
    lm.tokenizer.chat_template = template
    marked = chat_tokenizer(MARKED)
    whole = marked.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    tokens, mask = torch.tensor(whole["input_ids"]), torch.tensor(whole["assistant_masks"]).bool()
    found = taught(lm, [{"messages": CHAT}], turns="all")
    learned = [token for _, turn in found for token in turn]
    assert learned == tokens[mask].tolist() == ids("the sky <end> the grass <end>")
    starts = (mask.long().diff() == 1).nonzero().squeeze(1) + 1
    assert [prompt for prompt, _ in found] == [tokens[:start].tolist() for start in starts]
    assert taught(lm, [{"messages": CHAT}]) == found[1:]  # by default the last turn alone
    # All turns, each an example, have the NLL of one pass over the whole chat.
    logits = lm.model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
    own = -logits[range(len(tokens) - 1), tokens[1:]][mask[1:]].mean().item()
    examples = tokenise(lm, load_demonstrations([{"messages": CHAT}], turns="all"), SFTConfig())
    assert mean_nll(lm.model, examples, 2) == pytest.approx(own, rel=1e-5)


def test_what_the_template_writes_before_an_answer_is_learned_in_sft_and_dpo():
    lm = chat_model()
    lm.tokenizer.chat_template = THINKING
    found = taught(lm, [{"messages": CHAT[1:], "truncated": True}, {"prompt": "red", "completion": "sky"}], turns="all")
    first, history = ids("<start> red <end> <start>"), ids("<start> red <end> <start> the sky <end>")
    assert found == [
        (first, ids("not the sky <end>")),
        ([*history, *ids("<start> green <eos> <end> <start>")], ids("not the grass")),  # cut off: nothing closes it
        (ids("red"), ids("sky <eos>")),
    ]
    rankings = load_rankings([{"prompt": CHAT[1:2], "chosen": "sky", "rejected": "grass"}])
    responses = encode(lm, rankings, DPOConfig()).responses
    assert responses.flat.split(responses.lengths.tolist())[0].tolist() == ids("not sky <end>")


def test_where_the_template_rewrites_the_prompt_the_answer_keeps_its_tokens_and_the_log_says_so(caplog):
    lm = chat_model()
    lm.tokenizer.chat_template = REWRITING
    [(prompt, learned)] = taught(lm, [{"messages": CHAT[1:3]}])
    assert (prompt, learned) == (lm.encode_prompt(CHAT[1:2]), ids("the sky <end>"))
    assert "1 of 1 chats: with an answer, the template writes another prompt" in caplog.text


def test_every_turn_is_read_only_where_it_answers_something():
    lm = chat_model()
    greeting = [{"role": "assistant", "content": "sky"}, *CHAT[1:3]]
    assert [learned for _, learned in taught(lm, [{"messages": greeting}], turns="all")] == [ids("the sky <end>")]
    with pytest.raises(ValueError, match="record 1: 'messages' must be a chat that ends with an assistant turn"):
        load_demonstrations([{"messages": CHAT[:4]}], turns="all")
    with pytest.raises(ValueError, match="turns='all' needs completion_only, got False"):
        SFTConfig(turns="all", completion_only=False)


def test_the_command_learns_the_turns_that_are_asked_for(tmp_path, capsys):
    chat_model().save_pretrained(tmp_path / "start")
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    tokens = []
    for turns in ("last", "all"):
        paths = ["--model", tmp_path / "start", "--data", tmp_path / "data.jsonl", "--output", tmp_path / turns]
        paths += ["--eval-data", tmp_path / "data.jsonl"]
        main(["sft", *map(str, paths), "--turns", turns, "--json"])
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens == [3, 6]


def test_templates_are_applied_in_one_place():
    root = Path(__file__).parents[3]
    files = [file for folder in ("textenv", "reward_models", "agents") for file in (root / folder).rglob("*.py")]
    applying = [file.name for file in files if "apply_chat_template" in file.read_text("utf-8")]
    assert applying == ["chat.py"]


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
