"""Reading records, and what names stand for."""

import gymnasium
import pytest

import textenv
from textenv.data import atomic_path, read_jsonl, write_json, write_jsonl


def test_records_survive_writing_and_reading_and_a_folder_is_read_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"x": "ü"}])
    write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"x": [2]}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"x": 1}, {"x": [2]}]
    assert read_jsonl(tmp_path) == [{"x": 1}, {"x": [2]}, {"x": "ü"}]
    with pytest.raises(ValueError, match="must be a JSONL file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})

    def interrupted():
        with atomic_path(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_prompt_sets_take_strings_records_and_files(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "topic": "x"}, {"prompt": "b"}])
    loaded = textenv.prompt_set(str(tmp_path / "p.jsonl"))
    assert loaded.prompts == ("a", "b")
    assert loaded.columns == {"topic": ("x", None)}
    assert textenv.prompt_set(["a"]).prompts == ("a",)
    textenv.register_prompts("two", lambda: ["a", "b"])
    assert textenv.prompt_set("two") is textenv.prompt_set("two")


def test_a_registered_id_makes_the_environment_it_describes(text_options):
    textenv.register("test/Colour-v0", description="colours", **text_options)
    env = gymnasium.make("test/Colour-v0")
    assert env.unwrapped.kl_coef == 0.1
    assert textenv.registered_ids()["test/Colour-v0"] == "colours"
    assert gymnasium.make_vec("test/Colour-v0", num_envs=2).unwrapped.task.config.max_new_tokens == 6


def test_models_behind_a_name_are_loaded_once_and_a_fresh_one_is_nobody_elses(model_folder):
    shared = textenv.language_model(str(model_folder))
    assert textenv.language_model(str(model_folder)) is shared
    assert textenv.fresh_language_model(str(model_folder)).model is not shared.model


def test_registering_a_name_again_replaces_what_was_loaded():
    textenv.register_reward_model("again", lambda prompts, completions: [1.0])
    assert textenv.reward_model("again")([""], [""]) == [1.0]
    textenv.register_reward_model("again", lambda prompts, completions: [2.0])
    assert textenv.reward_model("again")([""], [""]) == [2.0]
    with pytest.raises(ValueError, match="without ':'"):
        textenv.register_reward_model("a:b", lambda prompts, completions: [1.0])
