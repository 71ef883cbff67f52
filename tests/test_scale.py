"""The estimates of docs/scale.md follow from its formulas; the launcher reads the files beside it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from agents import PPO
from scripts.scale import METHODS, MODELS, memory, memory_in_shares, sampled_per_second, seconds, tables
from tests.processes import results
from textenv.cli import main
from textenv.vector import make_vec

ROOT = Path(__file__).parents[1]


def test_the_tables_stand_in_the_document():
    written = (ROOT / "docs" / "scale.md").read_text("utf-8").splitlines()
    assert not [line for line in tables() if line not in written]


def test_the_estimates_are_those_of_a_calculation_by_hand():
    """7 B in full: 20 · 7 = 140 GB. A step reads 14 GB and 4 · 32 · 1024 · 768 · 64 = 6.442 GB at 2.01 TB/s, in
    10.17 ms for 64 tokens on each of 8 devices. 512 · 1024 · 4 tokens of 8 · 7e9 FLOPs at 8 · 395.6 TFLOP/s: 37.1 s."""
    model, method = MODELS[0], METHODS[0]
    assert memory(model, method)[:2] == [140e9, 17.5e9]
    # Shares: 16 · 7 / 8 = 14; a block 28 / 32; frozen 28; activations 4 · 16384 · 4096 · 32 = 8.59. Rollout: 28 + 10.5.
    assert memory_in_shares(model) == pytest.approx([51.465e9, 23.465e9, 75.090e9], rel=1e-4)
    assert sampled_per_second(model) == pytest.approx(8 * 64 / 0.01017, rel=1e-3)
    assert seconds(model, method)[2] == pytest.approx(37.1, rel=1e-3)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_files(name, kind):
    for file, processes in ((f"{name}-cpu.yaml", 2), (f"{name}.yaml", 8)):
        config = load_config_from_file(str(ROOT / "examples" / "accelerate" / file))
        assert (config.distributed_type.value, config.num_processes) == (kind, processes)


def launched(arguments, file="ddp-cpu.yaml", **options):
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "examples" / "accelerate" / file), "--main_process_port", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([*launch, *arguments], env=env, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
def test_a_launched_command_of_which_a_process_is_killed_ends_with_an_error_that_names_it(tmp_path):
    small = ["--env-id", "textenv/Micro-v0", "--num-envs", "8", "--batch-size", "8", "--total-episodes", "800000"]
    job = launched(["-m", "agents.ppo", "--output", str(tmp_path / "run"), *small])
    curves, end = tmp_path / "run" / "curves.jsonl", time.monotonic() + 120
    while time.monotonic() < end and not (curves.exists() and curves.stat().st_size):
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    (victim,) = [int(pid) for pid, environ in ranks.items() if b"RANK=1" in environ]
    os.kill(victim, signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0
    assert f"rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: {victim})" in said


IN_SHARES = """
import os, pathlib, sys
from textenv.cli import end, main
from textenv.training.processes import sharded
code = main(sys.argv[1:])
pathlib.Path(__file__).with_name(os.environ["RANK"]).write_text(str(sharded()))
end(code)
"""


@pytest.mark.slow
def test_a_launched_command_in_shares_saves_a_policy_that_one_process_reads(tmp_path):
    small = ["--env-id", "textenv/Micro-v0", "--num-envs", "8", "--batch-size", "16", "--total-episodes", "32"]
    script = tmp_path / "train.py"
    script.write_text(IN_SHARES)
    job = launched([str(script), "ppo", "--output", str(tmp_path / "run"), *small], "fsdp2-cpu.yaml")
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]
    agent = PPO.load(tmp_path / "run", make_vec("textenv/Micro-v0", 8))
    assert agent.episodes == 32
    assert agent.learn(16).history[-1]["first_ratio_deviation"] < 1e-4


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_ends_with_its_code_and_all_that_it_said(processes):
    """One of several does not wait for its threads: this one would sleep for ever."""
    code = "import threading, time; from textenv.cli import end; print('said', end='')\n"
    code += "threading.Thread(target=time.sleep, args=(1e6,)).start()\n" if processes == "2" else ""
    command = [sys.executable, "-c", f"{code}end(3)"]
    own = {**os.environ, "WORLD_SIZE": processes, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=60)
    assert (done.returncode, done.stdout) == (3, "said")


def test_a_command_for_one_process_refuses_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "--model", "x"]) == 2
    assert (
        "evaluate runs in one process, got 2. Start it by itself. In several run sft, reward" in capsys.readouterr().err
    )


def test_a_command_in_several_processes_leaves_the_others_when_it_is_done(tmp_path):
    """One that ended as a member could abort in a thread of its connections."""
    small = ["--env-id", "textenv/Micro-v0", "--num-envs", "8", "--batch-size", "8", "--total-episodes", "8"]

    def work():
        code = main(["ppo", *small, "--output", str(tmp_path / "run"), "--json"])
        return code, torch.distributed.is_initialized()

    assert results(work) == [(0, False), (0, False)]
