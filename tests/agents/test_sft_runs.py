"""Runs of SFT: interrupted, killed, resumed, in a folder, and in two processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.sft import train_sft
from tests.agents.test_sft import RECORDS, config, weights
from tests.conftest import tiny_model
from textenv.lm import load_language_model


def interrupted(at, how):
    def on_progress(step, total, numbers):
        if step == at:
            how()

    return on_progress


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 3, 4, 7], ids=["early", "end of an epoch", "next epoch", "last epoch"])
def test_resuming_equals_never_having_stopped(tmp_path, at):
    lm = tiny_model()
    options = config(epochs=3, batch_size=1, gradient_accumulation_steps=2)  # 3 steps an epoch
    straight = train_sft(lm, RECORDS, options, eval_records=RECORDS[:2])
    with pytest.raises(KeyboardInterrupt):
        train_sft(lm, RECORDS, options, tmp_path, on_progress=interrupted(at, raise_interrupt))
    assert (tmp_path / f"checkpoint-{at}").is_dir()
    steps = []
    resumed = train_sft(
        lm,
        RECORDS,
        options,
        tmp_path,
        resume=True,
        eval_records=RECORDS[:2],
        on_progress=lambda step, *_: steps.append(step),
    )
    assert steps == list(range(at + 1, 10))
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert torch.equal(weights(load_language_model(tmp_path)), weights(straight.model))
    assert [h["loss"] for h in resumed.history if "loss" in h] == [h["loss"] for h in straight.history if "loss" in h]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_interrupt_after_the_last_step_loses_nothing(tmp_path):
    lm = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        train_sft(lm, RECORDS, config(), tmp_path, on_progress=interrupted(6, raise_interrupt))
    resumed = train_sft(lm, RECORDS, config(), tmp_path, resume=True, eval_records=RECORDS)
    straight = train_sft(lm, RECORDS, config(), eval_records=RECORDS)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert resumed.metrics["eval_nll"] == straight.metrics["eval_nll"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_finishes_the_step_leaves_a_checkpoint_and_raises(tmp_path, number):
    handler = signal.getsignal(number)
    ctrl_c = interrupted(2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        train_sft(tiny_model(), RECORDS, config(), tmp_path, on_progress=ctrl_c)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(number) is handler


def test_periodic_checkpoints_serve_a_run_that_died_without_warning(tmp_path):
    class PowerCutError(Exception):
        pass

    def die():
        raise PowerCutError

    lm, options = tiny_model(), config(save_steps=2)
    with pytest.raises(PowerCutError):
        train_sft(lm, RECORDS, options, tmp_path, on_progress=interrupted(5, die))
    resumed = train_sft(lm, RECORDS, options, tmp_path, resume=True)
    assert torch.equal(weights(resumed.model), weights(train_sft(lm, RECORDS, options).model))


def test_a_checkpoint_is_not_silently_overwritten_nor_continued_with_other_settings_or_data(tmp_path):
    lm = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        train_sft(lm, RECORDS, config(), tmp_path, on_progress=interrupted(2, raise_interrupt))
    with pytest.raises(ValueError, match="checkpoint of an unfinished run"):
        train_sft(lm, RECORDS, config(), tmp_path)
    with pytest.raises(ValueError, match="resumed with the config it started with"):
        train_sft(lm, RECORDS, config(learning_rate=1e-3), tmp_path, resume=True)
    with pytest.raises(ValueError, match="resumed with the data it started with"):
        train_sft(lm, list(reversed(RECORDS)), config(), tmp_path, resume=True)
    (tmp_path / "checkpoint-2" / "trainable.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="checkpoint must be readable"):
        train_sft(lm, RECORDS, config(), tmp_path, resume=True)
    with pytest.raises(ValueError, match="output_dir"):
        train_sft(lm, RECORDS, config(), resume=True)


def test_the_result_is_a_plain_hugging_face_folder_and_models_are_found_by_name(tmp_path, model_folder):
    result = train_sft(str(model_folder), RECORDS, config(), tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, result.model.model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("the sky").input_ids == [7, 4]
    assert plain.config.use_cache == tiny_model().model.config.use_cache
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("writes", range(1, 5))
@pytest.mark.parametrize("act", ["rename", "unlink"])
def test_a_kill_between_any_two_steps_of_a_write_leaves_a_run_that_resumes_exactly(tmp_path, monkeypatch, act, writes):
    """Four writes: checkpoints at steps 2, 4 and 6, and the model; each is killed in the middle."""
    out, lm, settings = tmp_path / "out", tiny_model(), config(save_steps=2)
    original, count = getattr(Path, act), []

    def killed(self, *args, **options):
        if act == "unlink" or self == out:
            count.append(self)
            if len(count) == writes:
                raise KeyboardInterrupt
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, act, killed)
        with contextlib.suppress(KeyboardInterrupt):
            train_sft(lm, RECORDS, settings, out)
    resumed = train_sft(lm, RECORDS, settings, out, resume=True)
    assert torch.equal(weights(resumed.model), weights(train_sft(lm, RECORDS, settings).model))
    assert torch.equal(weights(load_language_model(out)), weights(resumed.model))


def test_files_of_others_are_refused_before_the_training_and_stay(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    seen = []
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        train_sft(tiny_model(), RECORDS, config(), tmp_path, on_progress=lambda *report: seen.append(report))
    assert not seen
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


TWO_PROCESSES = """
import json, os, pathlib, sys
from accelerate import Accelerator
from agents.sft import train_sft
from tests.agents.test_sft import RECORDS, config
from tests.conftest import tiny_model
result = train_sft(tiny_model(), RECORDS[:5], config(gradient_accumulation_steps=2), sys.argv[1])
assert Accelerator().num_processes == 2
if Accelerator().is_main_process:
    pathlib.Path(sys.argv[2]).write_text(json.dumps(result.history))
Accelerator().end_training()
os._exit(0)  # docs/scale.md says why
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Windows of 4 and 1: examples of unequal length on either process, and one process without any."""
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(tmp_path / name) for name in ("train.py", "out", "history.json")]
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, *paths], check=True, env={**os.environ, **own}, timeout=180)
    one = train_sft(tiny_model(), RECORDS[:5], config(gradient_accumulation_steps=2))
    two = json.loads((tmp_path / "history.json").read_text())
    assert len(two) == len(one.history) == 4
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [entry[key] for entry in two] == pytest.approx([entry[key] for entry in one.history], rel=1e-4)
    # Adam makes steps of rounding errors where a gradient is 0: few weights, and by little.
    gap = (weights(load_language_model(tmp_path / "out")) - weights(one.model)).abs()
    assert (gap > 2e-5).float().mean() < 0.01
