"""Conversations: drawn as the library draws, told piece by piece, and measured as an environment measures."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.agents.conftest import plain_logprobs
from tests.conftest import tiny_model
from textenv.chat.conversation import Conversation, Judge
from textenv.chat.stream import TextStream, token_texts
from textenv.lm import TokenRule, sample_responses
from textenv.task import token_rule

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"


def talker(model=None, seed=0, rule=None, **options):
    model = model or tiny_model()
    return Conversation(model, rule or token_rule(model), seed=seed, **{"max_new_tokens": 12, **options})


@pytest.fixture
def chat_model():
    model = tiny_model()
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "min_new_tokens": 3, "stop_tokens": ("green",)}])
def test_an_answer_is_the_one_that_the_library_draws(options):
    model = tiny_model()
    rule = token_rule(model, **options)
    speaker, endings = talker(model, 7, rule), set()
    drawn = torch.Generator().manual_seed(7)
    for _ in range(12):
        told = []
        answer = speaker.ask("what is the sky ?", told.append)
        ids = torch.tensor([model.encode_prompt("what is the sky ?")])
        own = sample_responses(
            model.model, ids, torch.tensor([5]), max_new_tokens=12, rule=rule, pad_id=0, generator=drawn
        )
        expected = own.response_ids[0, : own.response_lengths[0]].tolist()
        assert answer.response_ids == expected
        assert "".join(told) == answer.text == model.response_texts([expected])[0]
        last = expected[-1]
        assert answer.ending == ("eos" if last == 0 else "stop" if last in rule.stop_ids else "length")
        endings.add(answer.ending)
    assert len(endings) > 1


def test_rows_are_told_of_their_tokens_in_their_order():
    model, told = tiny_model(), {}
    ids, lengths = torch.tensor([[3, 4], [4, 5], [1, 2], [7, 8], [6, 6]]), torch.full((5,), 2)

    def tell(rows, tokens):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            told.setdefault(row, []).append(token)

    options = {"max_new_tokens": 6, "rule": TokenRule(stop_ids=(0,)), "pad_id": 0, "slots": 2}
    found = sample_responses(model.model, ids, lengths, **options, on_tokens=tell)
    assert told == {i: row[:n].tolist() for i, (row, n) in enumerate(zip(found.response_ids, found.response_lengths))}


def test_a_chat_model_hears_all_that_was_said_and_another_one_only_the_line(chat_model):
    speaker = talker(chat_model)
    first = speaker.ask("red").text
    second = speaker.ask("is the sky blue ?")
    assert second.prompt_ids == chat_model.tokenizer(f"red {first} is the sky blue ? the").input_ids
    assert [message["role"] for message in speaker.messages] == ["user", "assistant"] * 2
    plain = talker()
    plain.ask("red")
    assert plain.ask("is the sky").prompt_ids == plain.model.encode_prompt("is the sky")
    wrapped = talker(chat_model, template="the {} is {}")  # rather than the chat template
    assert wrapped.ask("sky").prompt == "the sky is sky"


def test_another_answer_takes_the_place_of_the_last_and_reset_forgets_all(chat_model):
    speaker = talker(chat_model)
    first = speaker.ask("red")
    other = speaker.again()
    assert other.prompt_ids == first.prompt_ids
    assert other.response_ids != first.response_ids
    assert [message["content"] for message in speaker.messages] == ["red", other.text]
    assert speaker.last is other
    speaker.reset()
    assert (speaker.messages, speaker.last) == ([], None)
    with pytest.raises(ValueError, match="must be an answer to draw again"):
        speaker.again()


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupt_ends_the_answer_and_keeps_what_was_shown(chat_model, after):
    speaker, shown = talker(chat_model, rule=TokenRule(min_new_tokens=9, stop_ids=(0,))), []

    def show(piece):
        if len(shown) == after and piece:
            raise KeyboardInterrupt
        shown.append(piece)

    answer = speaker.ask("red", show)
    assert answer.ending == "interrupted"
    assert len(answer.response_ids) == after + 1
    assert answer.text == chat_model.decode(answer.response_ids)
    assert speaker.messages[-1] == {"role": "assistant", "content": answer.text}


def test_an_interrupt_before_the_first_token_says_nothing(chat_model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("textenv.chat.conversation.sample_responses", interrupted)
    speaker = talker(chat_model)
    assert speaker.ask("red").ending == "interrupted"
    assert (speaker.messages, speaker.last) == ([], None)


def test_what_has_no_room_was_not_said(chat_model):
    speaker = talker(chat_model)
    speaker.ask("red")
    before = list(speaker.messages)
    for words in ("red " * 64, "red " * (63 - len(speaker.last.response_ids))):
        with pytest.raises(ValueError, match=r"leave room for an answer, got \d+ tokens where 64"):
            speaker.ask(words)
    assert speaker.messages == before
    assert len(talker().ask("red " * 62).response_ids) <= 2  # the budget is cut to what has room
    with pytest.raises(ValueError, match="must have a token"):
        talker(template="{}").ask("")
    with pytest.raises(ValueError, match="template must say where the words go, got 'user:'"):
        talker(template="user:")


def test_without_a_seed_conversations_differ():
    texts = {tuple(talker(seed=None).ask("what is").response_ids) for _ in range(8)}
    assert len(texts) > 1


def test_an_answer_is_measured_as_an_environment_would(chat_model):
    heard = []

    def reward_model(prompts, completions, finish_reason, chat=None):
        heard.append((prompts, completions, finish_reason, chat))
        return [len(text) for text in completions]

    judge = Judge(tiny_model(seed=5), reward_model)
    rule = token_rule(chat_model, temperature=0.7)
    speaker = talker(chat_model, rule=rule)
    answer = speaker.ask("red is")
    assert judge.score(chat_model, answer) == len(answer.text)
    messages = [{"role": "user", "content": "red is"}]
    assert heard[-1] == (["red is the"], [answer.text], [answer.ending], [messages])
    ids = answer.response_ids
    own, theirs = (plain_logprobs(m.model, "red is the", ids, 0.7) for m in (chat_model, judge.reference))
    assert judge.kl(chat_model, answer, rule).tolist() == pytest.approx((own - theirs).tolist(), abs=1e-4)
    plain = talker()
    answer = plain.ask("red is")
    judge.score(plain.model, answer)
    assert heard[-1][0] == ["red is"]
    assert heard[-1][3] is None
    nothing = Judge(None, None)
    assert (nothing.score(plain.model, answer), nothing.kl(plain.model, answer, rule)) == (None, None)


def test_a_reference_of_other_tokens_is_refused():
    other = tiny_model()
    other.tokenizer.add_tokens(["purple"])
    with pytest.raises(ValueError, match="must have the tokens of the model"):
        Judge(other, None).check(tiny_model())
    Judge(None, None).check(other)
    Judge(tiny_model(seed=3), None).check(tiny_model())


@pytest.fixture
def bytes_tokenizer():
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab={**alphabet, "<eos>": 256}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_a_character_of_several_tokens_comes_with_its_last_one(bytes_tokenizer):
    ids = bytes_tokenizer("aé😀").input_ids
    assert len(ids) == 7
    stream = TextStream(bytes_tokenizer)
    assert [stream.add(token) for token in ids] == ["a", "", "é", "", "", "", "😀"]
    assert stream.rest() == ""
    cut = TextStream(bytes_tokenizer)
    assert [cut.add(token) for token in ids[:5]] == ["a", "", "é", "", ""]
    assert (cut.rest(), cut.rest()) == ("\ufffd", "")
    assert token_texts(bytes_tokenizer, [ids[0], 256]) == ["a", "<eos>"]


@pytest.mark.parametrize(
    ("drawn", "ending_ids", "text", "ending"),
    [("é😀", (256,), "é\ufffd", "length"), ("bab", (ord("a"),), "b", "eos")],
)
def test_a_cut_character_is_shown_and_an_ending_that_is_a_word_is_not(
    bytes_tokenizer, monkeypatch, drawn, ending_ids, text, ending
):
    ids = bytes_tokenizer(drawn).input_ids
    if ending == "eos":
        ending_ids, ids = (ids[1],), ids[:2]

    def sampled(*args, on_tokens, **kwargs):
        for token in ids[:4]:
            on_tokens(torch.tensor([0]), torch.tensor([token]))

    monkeypatch.setattr("textenv.chat.conversation.sample_responses", sampled)
    model = dataclasses.replace(tiny_model(), tokenizer=bytes_tokenizer, ending_ids=ending_ids)
    model.model.resize_token_embeddings(257)
    told = []
    answer = Conversation(model, TokenRule(stop_ids=ending_ids)).ask("a", told.append)
    assert ("".join(told), answer.text, answer.ending) == (text, text, ending)
