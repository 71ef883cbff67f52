"""Reading records, and what names stand for."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

import textenv
from tests.conftest import colour_score
from textenv import registry
from textenv.data.datasets import read_dataset
from textenv.data.records import atomic_path, jsonl_lines, parse_records, write_json, write_jsonl
from textenv.registry.sources import portable_name


def read_jsonl(path):
    return list(parse_records(jsonl_lines(path)).values())


def test_records_survive_writing_and_reading(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"x": [2, "ü"]}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"x": 1}, {"x": [2, "ü"]}]
    with pytest.raises(ValueError, match="must be a JSONL file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_characters_that_python_takes_for_line_ends_survive_writing_and_reading(tmp_path):
    # JSON need not escape them; published texts hold all three.
    records = [{"x": "one\u2028two\x85three\u2029four\r\nfive"}, {"x": 2}]
    write_jsonl(tmp_path / "a.jsonl", records)
    assert read_jsonl(tmp_path / "a.jsonl") == records
    (tmp_path / "dos.jsonl").write_bytes(b'{"x": 1}\r\n\r\n{"x": 2}\r\n[]\r\n')
    with pytest.raises(ValueError, match=r"dos\.jsonl, line 4: must be a JSON object, got list"):
        read_jsonl(tmp_path / "dos.jsonl")


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
    late = textenv.prompt_set([{"prompt": "a"}, "b", {"prompt": "c", "topic": "y"}, {"prompt": "d"}])
    assert late.columns == {"topic": (None, None, "y", None)}
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
        ({"prompts": ["a", ""]}, "prompt number 1"),
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


RECORDS = {"question": ["red", "green", "blue"], "answer": ["1", "2", "3"]}


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


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Data sets in every local form; returns their folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict(RECORDS)
    named = whole.rename_column("question", "prompt")
    whole.save_to_disk(str(tmp_path / "one"))
    named.save_to_disk(str(tmp_path / "named"))
    datasets.DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "parquet").mkdir()
    whole.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    whole.select([0]).to_parquet(str(tmp_path / "parquet" / "test.parquet"))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "prompts"),
    [
        ({"dataset": "one", "column": "question"}, ("red", "green", "blue")),
        ({"dataset": "one", "column": "question", "split": "train"}, ("red", "green", "blue")),
        ({"dataset": "splits", "column": "question"}, ("red", "green", "blue")),
        ({"dataset": "splits", "column": "question", "split": "test"}, ("blue",)),
        ({"dataset": "parquet", "column": "question"}, ("red", "green", "blue")),
        ({"dataset": "parquet", "column": "question", "split": "train[:2]", "config": None}, ("red", "green")),
    ],
    ids=str,
)
def test_a_data_set_gives_prompts_and_columns_as_an_environment_takes_them(saved, text_options, source, prompts):
    source = {**source, "dataset": str(saved / source["dataset"])}
    found = textenv.prompt_set(source)
    assert found.prompts == prompts
    assert found.columns == {"answer": tuple(dict(zip(*RECORDS.values(), strict=True))[prompt] for prompt in prompts)}
    assert textenv.prompt_set(json.loads(json.dumps(source))) is found
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "prompts": source})
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert env.reset(seed=1)[1] == again.reset(seed=1)[1]


def test_two_splits_of_one_data_set_are_two_prompt_sets(saved):
    source = {"dataset": str(saved / "splits"), "column": "question"}
    found = [textenv.prompt_set({**source, "split": split}).prompts for split in ("train", "test")]
    assert found == [("red", "green", "blue"), ("blue",)]


def test_the_folder_of_a_saved_data_set_is_a_prompt_set_by_itself(saved):
    assert textenv.prompt_set(str(saved / "named")).prompts == ("red", "green", "blue")


def test_json_lines_need_no_package_and_take_a_column_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_jsonl(tmp_path / "p.jsonl", [{"question": "red", "answer": 1}])
    source = {"dataset": str(tmp_path / "p.jsonl"), "column": "question"}
    assert read_dataset(**source) == [{"answer": 1, "prompt": "red"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"dataset": "one", "column": "questoin"},
            r"one of question, answer .*got 'questoin'. Did you mean 'question'",
        ),
        ({"dataset": "one"}, r"got 'prompt'\. Name another column"),
        ({"dataset": "one", "column": "question", "split": "test"}, r"one of train .*got 'test'"),
        ({"dataset": "splits", "column": "question", "split": "val"}, r"one of train, test .*got 'val'"),
        (
            {"dataset": "parquet", "column": "question", "split": "val"},
            r"parquet' \(split 'val', .*Loading it failed",
        ),
        ({"dataset": "nothing"}, r"existing path or a hub id, got"),
        ({"dataset": "empty"}, r"what save_to_disk wrote.*empty'.*Loading it failed"),
    ],
    ids=str,
)
def test_a_data_set_that_cannot_be_read_is_an_error_that_names_the_value(saved, source, message):
    (saved / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        textenv.prompt_set({**source, "dataset": str(saved / source["dataset"])})


def test_without_the_package_a_data_set_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data set 'org/name' needs.*pip install 'textenv\[data\]'"):
        textenv.prompt_set({"dataset": "org/name", "column": "question"})


def test_a_hub_data_set_is_asked_for_with_config_split_and_revision(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        if arguments[0] == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")
        return datasets.Dataset.from_dict(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"dataset": "org/name", "column": "question", "split": "test", "config": "en", "revision": "v1"}
    assert textenv.prompt_set(source).prompts == ("red", "green", "blue")
    assert asked == [(("org/name", "en"), {"split": "test", "revision": "v1"})]
    with pytest.raises(ValueError, match=r"got 'org/none' .*Loading it failed: Dataset 'org/none' doesn't exist"):
        textenv.prompt_set({"dataset": "org/none"})


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = {"p.jsonl": '{"prompt": "red"}\n', "p.json": '[{"prompt": "red"}]', "p.csv": "prompt\nred\n"}[name]
    (tmp_path / name).write_text(text, "utf-8-sig")
    assert textenv.prompt_set(str(tmp_path / name)).prompts == ("red",)


@pytest.mark.parametrize(("name", "text"), [("p.jsonl", ""), ("p.json", "[]"), ("p.csv", ""), ("p.csv", "prompt\n")])
def test_a_file_without_records_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"at least one record, got .*{name}', which is empty. Name another file"):
        read_dataset(str(tmp_path / name))


def test_a_compressed_file_that_is_none_or_cut_off_is_named_with_the_remedy(tmp_path):
    whole = gzip.compress(json.dumps({"prompt": "red" * 50}).encode())
    damaged = whole[:12] + bytes(8) + whole[20:]
    for content in (b'{"prompt": "red"}', whole[:-10], damaged):
        (tmp_path / "p.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"compressed by gzip, got .*p\.jsonl\.gz'.*drop \.gz from its name"):
            read_jsonl(tmp_path / "p.jsonl.gz")


def test_a_binary_file_given_as_json_lines_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"UTF-8 text.*p\.jsonl"):
        read_jsonl(tmp_path / "p.jsonl")
