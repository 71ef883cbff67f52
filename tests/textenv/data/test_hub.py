"""Hub ids on a machine that cannot reach the hub: cached files are read, anything else fails at once and says why."""

import logging
import shutil

import pytest
import torch
from huggingface_hub import constants

import textenv
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from reward_models.training.start import start_reward_model
from tests.conftest import tiny_model
from textenv import registry
from textenv.data.datasets import read_dataset

READERS = [
    load_reward_model,
    start_reward_model,
    TransformerRewardModel.from_encoder,
    textenv.reward_model,
    textenv.language_model,
    read_dataset,
]


@pytest.fixture
def never_waits(monkeypatch):
    """Nothing sleeps between attempts, so no retry can pass unseen."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    def sleep(seconds):
        raise AssertionError(f"a retry after {seconds} s")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleep)


@pytest.fixture
def unreachable(monkeypatch, never_waits):
    """A hub at a port where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("read", READERS)
def test_a_hub_id_that_cannot_be_fetched_is_named_at_once_with_the_reason(read, unreachable, caplog):
    if read is read_dataset:
        pytest.importorskip("datasets")
    reason = r"hub \(http://127\.0\.0\.1:9\) cannot be reached \(.*refused\)"
    with (
        caplog.at_level(logging.WARNING, "textenv.data.hub"),
        pytest.raises(ValueError, match=rf"(?s)(got |=)'some-org/nothing'.*{reason}"),
    ):
        read("some-org/nothing")
    assert "'some-org/nothing' among cached files" in caplog.text
    assert constants.HF_HUB_OFFLINE is False  # a hub that comes back is asked again


@pytest.mark.parametrize("read", READERS)
def test_offline_mode_asks_nobody_and_says_so(read, never_waits, monkeypatch):
    if read is read_dataset:
        pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"(?s)(got |=)'some-org/nothing'.*(cached files|Couldn't reach)"):
        read("some-org/nothing")


def test_what_the_cache_holds_is_read_when_the_hub_is_out_of_reach(unreachable, monkeypatch, tmp_path):
    model = TransformerRewardModel.from_language_model(tiny_model())
    with torch.no_grad():
        model.model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    commit = "a" * 40
    stored = tmp_path / "models--some-org--cached"
    model.save_pretrained(stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    registry.clear_cache()
    loaded = load_reward_model("some-org/cached")
    assert loaded(["red"], ["blue"]) == model(["red"], ["blue"])
    shutil.rmtree(stored)
    with pytest.raises(ValueError, match="cannot be reached"):
        load_reward_model("some-org/cached")


def test_a_path_never_asks_for_the_hub(unreachable, model_folder, caplog):
    with caplog.at_level(logging.WARNING, "textenv.data.hub"):
        start_reward_model(str(model_folder))
        for nowhere in ("./nowhere", "/nowhere"):
            with pytest.raises(ValueError, match="nowhere"):
                load_reward_model(nowhere)
    assert not caplog.records
