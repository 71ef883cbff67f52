"""Data that the doctor examines."""

import pytest

from agents.doctor.data import read_data
from tests.conftest import tiny_model
from textenv.data.records import write_jsonl
from textenv.lm import LanguageModel


@pytest.fixture
def read(tmp_path):
    """Data as it is read from a file, with a tiny model of 64 tokens beside it."""

    def read(records, held_out=None, lm: LanguageModel | None = None):
        write_jsonl(tmp_path / "data.jsonl", records)
        return read_data(tmp_path / "data.jsonl", lm or tiny_model(), held_out)

    return read
