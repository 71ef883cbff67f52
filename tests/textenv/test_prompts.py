"""The prompts of an environment: drawn, rendered, cut, refused with their place, and what else their records say."""

import json

import gymnasium
import numpy as np
import pytest

import textenv
from tests.conftest import PROMPTS, tiny_model


def test_prompts_are_drawn_evenly(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    env.reset(seed=0)
    counts = np.bincount([env.reset()[1]["prompt_id"] for _ in range(2000)], minlength=len(PROMPTS))
    assert (abs(counts - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75)).all()


def test_chat_prompts_go_through_the_template(text_options, tmp_path):
    model = tiny_model()
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}is{% endif %}"
    )
    model.save_pretrained(tmp_path / "chat")
    chat = [{"role": "user", "content": "the sky"}]
    env = gymnasium.make(
        "textenv/Text-v0", **{**text_options, "reference": str(tmp_path / "chat"), "prompts": [{"prompt": chat}]}
    ).unwrapped
    observation, info = env.reset(seed=0)
    assert info["prompt"] == "the sky is"
    np.testing.assert_array_equal(observation["input_ids"][4:7], [7, 4, 6])


def test_a_prompt_that_cannot_be_used_is_named_by_where_it_stands(text_options, tmp_path):
    """In memory by its number; in a file by its line, blank ones counted; also after longer ones are left out."""
    model = tiny_model()
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ m['content'] }} {% endfor %}"
    )
    model.save_pretrained(tmp_path / "chat")

    def made(prompts, **options):
        all_of_them = {**text_options, "reference": str(tmp_path / "chat"), "prompts": prompts, **options}
        return gymnasium.make("textenv/Text-v0", **all_of_them)

    good = [{"role": "user", "content": "the sky"}]
    refused = [{"role": "system", "content": "red"}, *good]
    says = r"a chat must be one that the model's chat template accepts, got turns of \['system', 'user'\]"
    with pytest.raises(ValueError, match=rf"^record 2: {says}.*no system turns"):
        made([good, refused])
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join([json.dumps({"prompt": good}), "", json.dumps({"prompt": refused})]), "utf-8")
    with pytest.raises(ValueError, match=rf"^{lines}, line 3: {says}"):
        made(str(lines))
    with pytest.raises(ValueError, match=rf"^{lines}, line 3: {says}"):
        made({"dataset": str(lines), "column": "prompt"})
    lines = tmp_path / "strings.jsonl"
    lines.write_text("\n".join(json.dumps({"prompt": words}) for words in ("sky", "sky " * 9, " ")), "utf-8")
    with pytest.raises(ValueError, match=rf"^{lines}, line 2: a prompt must have 1 to max_prompt_tokens \(7\).* got 9"):
        made(str(lines))
    with pytest.raises(ValueError, match=rf"^{lines}, line 3: a prompt must have .* got 0 in ' '\. Drop the prompt"):
        made(str(lines), long_prompts="drop")
    rows = tmp_path / "prompts.csv"
    rows.write_text("question,n\nsky,1\n,2\n", "utf-8")
    with pytest.raises(
        ValueError, match=rf"^{rows}, line 3: a prompt must be a non-empty string .* got {{'n': '2', 'pr"
    ):
        made({"dataset": str(rows), "column": "question"})


def test_prompt_columns_reach_the_reward_model_that_names_them(text_options):
    seen = {}

    def reads_answer(prompts, completions, answer):
        seen["answer"] = answer
        return [0.0] * len(prompts)

    textenv.register_reward_model("reads-answer", reads_answer)
    prompts = [{"prompt": "red", "answer": "blue"}]
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "reward_model": "reads-answer", "prompts": prompts})
    env.reset(seed=0)
    env.step(0)
    assert seen["answer"] == ["blue"]


def test_long_prompts_are_an_error_left_out_or_cut_on_the_left(text_options, caplog):
    options = {
        **text_options,
        "prompts": [{"prompt": "red green blue sky", "n": 1}, {"prompt": "the <eos> grass", "n": 2}],
    }
    options["max_prompt_tokens"] = 3
    with pytest.raises(ValueError, match=r"1 to max_prompt_tokens \(3\) tokens, got 4"):
        gymnasium.make("textenv/Text-v0", **options)
    prompts = gymnasium.make("textenv/Text-v0", **options, long_prompts="drop").unwrapped.task.prompts
    assert (prompts.texts, prompts.ids, prompts.columns) == (["the <eos> grass"], [[7, 0, 5]], {"n": (2,)})
    assert "1 of 2 prompts have more than 3 tokens and are left out" in caplog.text
    prompts = gymnasium.make("textenv/Text-v0", **options, long_prompts="cut").unwrapped.task.prompts
    assert prompts.prompts == ("green blue sky", "the <eos> grass")
    assert (prompts.texts, prompts.ids) == (list(prompts.prompts), [[2, 3, 4], [7, 0, 5]])
    assert prompts.columns == {"n": (1, 2)}
    with pytest.raises(ValueError, match="must hold a prompt of at most max_prompt_tokens"):
        gymnasium.make("textenv/Text-v0", **options | {"max_prompt_tokens": 2}, long_prompts="drop")
    assert tiny_model().encode_prompt("green blue sky") == [2, 3, 4]
