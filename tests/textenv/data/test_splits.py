"""Folders of data files: which of them are read, and when a folder is refused."""

import json

import pytest

from textenv.data.datasets import read_records


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a folder of files, each of which holds its own name as its only record."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def make(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = f"prompt\n{name}\n" if path.suffix == ".csv" else json.dumps({"prompt": name})
            path.write_text(f"[{text}]" if path.suffix == ".json" else text)
        return tmp_path / "data"

    return make


def read(folder, split=None):
    return [record["prompt"] for record in read_records(folder, split=split).values()]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train.jsonl", "test.jsonl"), ["train.jsonl"]),
        (("train.csv", "dev.csv"), ["train.csv"]),
        (("training.json", "eval.json"), ["training.json"]),
        (
            ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "valid.jsonl"),
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ),
        (("my_train.jsonl", "my_evaluation.jsonl"), ["my_train.jsonl"]),  # a separator, then the word
        (("test.jsonl",), ["test.jsonl"]),  # the only split
        (("b.jsonl", "a.jsonl"), ["a.jsonl", "b.jsonl"]),
        (("contest.jsonl", "trainer.jsonl"), ["contest.jsonl", "trainer.jsonl"]),  # the words stand inside others
        (("train.jsonl", "README.md", "config.json", ".notes.csv"), ["train.jsonl"]),
        (("train/a.jsonl", "test/a.jsonl"), ["train/a.jsonl"]),
    ],
    ids=str,
)
def test_a_folder_whose_names_are_splits_gives_the_train_part_and_another_all(folder, names, expected):
    assert read(folder(*names)) == expected


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("training.csv", "my_dev.csv"), ("eval.jsonl",)])
def test_the_part_that_is_read_is_that_of_the_datasets_package(folder, names):
    import datasets

    parts = datasets.load_dataset(str(folder(*names)))
    part = parts["train"] if "train" in parts else next(iter(parts.values()))
    assert read(folder()) == part["prompt"]


def test_another_split_of_a_folder_is_read_by_its_name(folder):
    assert read(folder("train.jsonl", "dev.jsonl"), "validation") == ["dev.jsonl"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jsonl", "b.csv"), r"files of one kind, got 'a.jsonl' beside 'b.csv' in .*Name one of the files, or keep"),
        (("train.csv", "data/test.tsv"), r"got 'data/test.tsv' beside 'train.csv'"),
        (("a.jsonl", "b.jsonl", "c.json", "d.parquet"), r"got 'a.jsonl' beside 'c.json' beside 'd.parquet'"),
        (("train.jsonl", "more.jsonl"), r"split, or none, got 'more.jsonl' beside 'train.jsonl'.*or rename them"),
        (("val.jsonl", "test.jsonl"), r"a split must be one of validation, test .*got 'train'. Name another split"),
    ],
    ids=str,
)
def test_a_folder_of_which_a_part_would_be_lost_in_silence_is_refused(folder, names, message):
    with pytest.raises(ValueError, match=message):
        read(folder(*names))


def test_a_folder_of_several_kinds_is_refused_with_a_split_too(folder):
    with pytest.raises(ValueError, match="files of one kind"):
        read(folder("train.jsonl", "test.jsonl", "more.csv"), "train")


def test_the_card_of_a_folder_says_what_its_splits_are_made_of(folder):
    files = "- split: train\n    path: first.jsonl\n  - split: test\n    path: second.jsonl"
    made = folder("first.jsonl", "second.jsonl", "third.csv")
    (made / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n  {files}\n---\n")
    assert read(made) == ["first.jsonl"]
