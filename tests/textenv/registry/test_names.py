"""What names stand for: ids, prompt sets and models."""

import hashlib
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

import textenv
from tests.conftest import colour_score
from textenv import registry
from textenv.data.records import write_jsonl
from textenv.registry.sources import portable_name


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


def test_registering_a_name_again_reaches_what_was_composed_of_it():
    doubled = {"weighted": {"part": 2.0}}
    textenv.register_reward_model("twice the part", doubled)
    for score in (1.0, 2.0):
        textenv.register_reward_model("part", lambda prompts, completions, score=score: [score])
        for whole in (doubled, "twice the part"):
            assert textenv.reward_model(whole)([""], [""]) == [2 * score]


def test_a_composed_reward_model_is_loaded_once_for_each_precision():
    composed = {"weighted": {"assistant-rm": 1.0}}
    assert textenv.reward_model(composed) is textenv.reward_model(composed)
    assert textenv.reward_model(composed, dtype="bfloat16") is not textenv.reward_model(composed)


def test_a_folder_is_named_in_files_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    textenv.register_language_model("relative", "model")
    assert portable_name("relative") == portable_name("model") == str(tmp_path / "model")
    assert portable_name("owner/model") == "owner/model"  # a hub id


@pytest.fixture
def temporary_id():
    """An id that no other test sees."""
    yield "test/Temporary-v0"
    gymnasium.registry.pop("test/Temporary-v0", None)
    registry.ids._descriptions.pop("test/Temporary-v0", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 5}, r"got 'max_new_token'.*Did you mean 'max_new_tokens'"),
        ({"autoreset_mode": "SameStep"}, r"got 'autoreset_mode'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"kl_coef": "3e-4"}, "kl_coef must be a finite number"),
        ({"kl_coef": -0.1}, "kl_coef must be 0 or more, got -0.1. Use 0 to switch the KL off"),
        ({"kl_coef": float("nan")}, "kl_coef must be a finite number, got nan"),
        ({"kl_source": "guess"}, "kl_source must be one of"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"stop_tokens": "?"}, "stop_tokens must be a list, each item a string"),
        ({"reward_model": len}, "reward_model must be a string or an object.*register_reward_model"),
        ({"reference": {"name": "x"}}, "reference must be a string"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a", ""]}, "record 2: a prompt"),
        ({"prompts": {"dataset": "org/name", "colum": "question"}}, r"got 'colum'. Did you mean 'column'"),
        ({"prompts": {"column": "question"}}, "a data set must be named"),
        ({"prompts": {"dataset": 3}}, "dataset of a data set must be a string"),
        ({"prompts": len}, r"must be a JSON value.*register_prompts"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_when_the_id_is_registered_and_leaves_nothing(text_options, options, message):
    before = dict(gymnasium.registry), textenv.registered_ids()
    with pytest.raises(ValueError, match=message):
        textenv.register("test/Bad-v0", **{**text_options, **options})
    assert (dict(gymnasium.registry), textenv.registered_ids()) == before


def test_an_id_that_gymnasium_refuses_leaves_the_old_one_in_place(text_options, temporary_id):
    textenv.register(temporary_id, **text_options)
    before = dict(gymnasium.registry)
    with pytest.raises(gymnasium.error.Error, match="Malformed"):
        textenv.register("no spaces allowed", **text_options)
    with pytest.raises(gymnasium.error.RegistrationError, match="unversioned"):
        textenv.register("test/Temporary", **text_options)
    assert dict(gymnasium.registry) == before
    assert "test/Temporary" not in textenv.registered_ids()


def test_an_id_that_gymnasium_has_forgotten_is_not_listed(text_options, temporary_id, recwarn):
    textenv.register(temporary_id, **text_options)
    assert temporary_id in textenv.registered_ids()
    gymnasium.registry.pop(temporary_id)
    assert temporary_id not in textenv.registered_ids()
    textenv.register(temporary_id, **text_options)
    assert temporary_id in textenv.registered_ids()
    assert not recwarn.list  # nothing was replaced


def test_a_replacement_that_fails_leaves_the_old_id_in_place(text_options, temporary_id, monkeypatch):
    textenv.register(temporary_id, **text_options)
    monkeypatch.delattr(gymnasium, "register")
    with pytest.warns(UserWarning, match="replaced"), pytest.raises(AttributeError):
        textenv.register(temporary_id, **{**text_options, "kl_coef": 0.7})
    assert gymnasium.spec(temporary_id).kwargs["kl_coef"] == 0.1


def test_registering_an_id_again_replaces_it_with_one_warning(text_options, temporary_id):
    textenv.register(temporary_id, **text_options)
    with pytest.warns(UserWarning, match="was registered before and is replaced.*new version") as warned:
        textenv.register(temporary_id, **{**text_options, "kl_coef": 0.7})
    assert len(warned) == 1
    assert gymnasium.spec(temporary_id).kwargs["kl_coef"] == 0.7


def test_paths_may_be_path_objects_and_become_json(text_options, temporary_id, tmp_path, model_folder):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "red"}])
    paths = {"prompts": tmp_path / "p.jsonl", "reference": Path(model_folder)}
    textenv.register(temporary_id, **{**text_options, **paths})
    env = gymnasium.make(EnvSpec.from_json(gymnasium.spec(temporary_id).to_json()))
    assert env.reset(seed=0)[1]["prompt"] == "red"


def test_what_is_registered_does_not_change_with_the_callers_list(text_options, temporary_id):
    prompts = ["red"]
    textenv.register(temporary_id, **{**text_options, "prompts": prompts})
    prompts.append("green")
    assert gymnasium.spec(temporary_id).kwargs["prompts"] == ["red"]


def test_registrations_in_a_block_that_fails_are_all_taken_back():
    before = {kind: registry.registered_sources(kind) for kind in ("prompts", "reward model", "language model")}

    @registry.all_or_nothing()
    def half():
        textenv.register_prompts("micro", ["x"])
        textenv.register_reward_model("half", lambda prompts, completions: [0.0])
        textenv.register_language_model("half", "./nowhere")
        raise KeyError

    with pytest.raises(KeyError):
        half()
    assert {kind: registry.registered_sources(kind) for kind in before} == before
    assert textenv.prompt_set("micro").prompts[0] == "a"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (textenv.prompt_set, "./prompts", r"prompts must be .* got './prompts'"),
        (textenv.prompt_set, "assistant-trian", "Did you mean 'assistant-train'"),
        (textenv.prompt_set, "org/name", "existing path"),
        (textenv.language_model, "./sft", r"language model must be .* got './sft'"),
        (textenv.reward_model, "/no/such/folder", "existing path"),
        (textenv.reward_model, "no_such_module:f", "importable"),
    ],
)
def test_a_name_that_stands_for_nothing_is_an_error_with_the_nearest_one(kind, name, message):
    with pytest.raises(ValueError, match=message):
        kind(name)


def test_the_vocabulary_is_known_from_a_file_or_a_loaded_model_and_never_guessed(model_folder):
    assert registry.vocabulary_size(str(model_folder)) == 12
    assert registry.vocabulary_size("assistant-sft") == 190
    assert registry.vocabulary_size("org/of-the-hub") is None
    code = "import textenv.registry as r; assert r.vocabulary_size('micro-reference') is None"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert registry.vocabulary_size("micro-reference", load=True) == 8
    assert registry.vocabulary_size("micro-reference") == 8


def test_options_are_described_by_what_their_names_stand_for(tmp_path, monkeypatch):
    """Names inside a JSON object too, and those in that; a rule of the name that it defines is no endless loop."""
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "red"}')
    textenv.register_reward_model("inner", {"rule": "length"})
    textenv.register_reward_model("outer", {"weighted": {"inner": 2.0, "outer": 1.0}})
    textenv.register_reward_model("mine", colour_score)
    textenv.register_prompts("here", tmp_path / "p.jsonl")
    options = {"prompts": "p.jsonl", "reward_model": {"weighted": {"outer": 1, "mine": 1}}, "kl_coef": 0.1}
    assert registry.described(options) == {
        "prompts": str(tmp_path / "p.jsonl"),
        "reward_model": {"weighted": {"outer": 1, "mine": 1}},
        "kl_coef": 0.1,
        "reward model 'outer'": {"weighted": {"inner": 2.0, "outer": 1.0}},
        "reward model 'inner'": {"rule": "length"},
        "reward model 'mine'": f"{colour_score.__module__}:colour_score",
    }
    assert registry.described({"prompts": "here"})["prompts 'here'"] == str(tmp_path / "p.jsonl")
    textenv.register_prompts("listed", ["red", "blue"])
    digest = hashlib.sha256(b'["red", "blue"]').hexdigest()[:16]
    assert registry.described({"prompts": ["red", "blue"]}) == {"prompts": f"2 prompts, SHA-256 {digest}"}
    assert registry.described({"prompts": "listed"})["prompts 'listed'"] == f"2 prompts, SHA-256 {digest}"
    text = registry.described({"reward_model": '{"weighted": {"inner": 1}}'})
    assert text["reward model 'inner'"] == {"rule": "length"}


def test_what_differs_between_two_objects_is_named_down_to_the_part():
    before = {"a": 1, "inside": {"x": 1, "y": 2}, "gone": None}
    assert registry.changed(before, {"a": 1, "inside": {"x": 1, "y": 3}, "new": 0}) == ["inside.y", "new"]
    assert registry.changed(before, {**before, "a": 2, "inside": 3}) == ["a", "inside"]
    assert registry.changed(before, dict(before)) == []
