"""Reading and writing records: lines, arrays, tables, folders and data sets."""

import gzip
import json
import sys

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

import textenv
from textenv.data.datasets import read_dataset
from textenv.data.records import atomic_path, jsonl_lines, parse_records, write_json, write_jsonl


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


RECORDS = {"question": ["red", "green", "blue"], "answer": ["1", "2", "3"]}


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
