"""Frozen models out of memory during updates: nothing else changes."""

import copy
import mmap
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from agents.ppo import PPO, PPOConfig
from tests.conftest import tiny_model
from textenv.registry.sharing import share_matrices
from textenv.training.memory import offload
from textenv.training.memory.offload import Offload


def mapped_bytes():
    """Bytes of this process that are resident because a file of ours is mapped."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.rstrip().endswith("(deleted)") and tempfile.gettempdir() in line
        elif ours and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.fixture
def learner(make_vector):
    def make(**config):
        env = make_vector(16).unwrapped
        return PPO(env, PPOConfig(**{"batch_size": 32, "epochs": 2, "learning_rate": 1e-2, **config}))

    return make


def test_a_run_with_its_frozen_models_out_of_memory_is_the_same_run(learner):
    plain, lean = (learner(offload_frozen=on).learn(3 * 32) for on in (False, True))
    for mine, theirs in zip(plain.actor.parameters(), lean.actor.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    timed = [name for name in plain.history[-1] if "second" in name or "memory" in name]
    for mine, theirs in zip(plain.history, lean.history, strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is resident")
def test_the_weights_are_read_for_a_rollout_and_leave_memory_for_an_update():
    model = tiny_model("gpt2").model
    before = copy.deepcopy(model.state_dict())
    size, others = sum(weight.nbytes for weight in model.parameters()), mapped_bytes()
    frozen = Offload([model], keep=torch.nn.Linear(1, 1))
    assert mapped_bytes() >= others + size
    with frozen.away():
        assert mapped_bytes() == others
        model(input_ids=torch.tensor([[1]]))  # a weight that is used meanwhile is read again
        assert mapped_bytes() > others
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is that of glibc")
def test_a_rollout_starts_without_the_memory_of_what_is_freed():
    """The heap of glibc stays as large as its last piece in use."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    pieces = [torch.ones(16_000) for _ in range(3_000)]
    last = pieces[-1]
    del pieces
    before = resident()
    Offload([tiny_model("gpt2").model], keep=torch.nn.Linear(1, 1)).before_a_rollout()
    assert last.sum() == 16_000
    assert resident() < before - 100e6


def test_weights_that_models_share_are_moved_once_and_stay_shared():
    first, second = (tiny_model("gpt2").model for _ in range(2))
    share_matrices(first)
    share_matrices(second)
    Offload([first, second], keep=torch.nn.Linear(1, 1))
    pairs = [(w, other) for w, other in zip(first.parameters(), second.parameters(), strict=True) if w.ndim > 1]
    assert pairs
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


def test_a_view_into_a_larger_piece_of_memory_keeps_its_place():
    model, whole = torch.nn.Linear(3, 2, bias=False), torch.arange(20.0)
    model.weight.data = whole[5:11].view(3, 2).T
    Offload([model], keep=torch.nn.Linear(1, 1))
    assert model.weight.tolist() == [[5.0, 7.0, 9.0], [6.0, 8.0, 10.0]]
    assert model.weight.data_ptr() != whole[5:].data_ptr()


def test_a_gpu_s_weights_go_to_the_cpu_and_come_back(monkeypatch):
    """Without one, the moves of storages between devices stand in for it: from the CPU to the CPU, by copies."""
    model = tiny_model("gpt2").model
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Offload, "_mapped", lambda self: None)
    frozen = Offload([model], keep=torch.nn.Linear(1, 1))
    with pytest.raises(KeyboardInterrupt), frozen.away():
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_adapters_on_the_reference_leave_nothing_to_move(learner):
    with pytest.raises(ValueError, match=r"which the policy does not use, got none\. Leave it out: with lora_rank"):
        learner(lora_rank=2, offload_frozen=True)


def test_a_system_that_cannot_forget_pages_is_named(monkeypatch, learner):
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    with pytest.raises(ValueError, match="needs Linux, macOS or a GPU"):
        learner(offload_frozen=True)


def test_a_full_disk_is_an_error_and_leaves_the_models_as_they_are(monkeypatch, learner):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def write(self, block):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(offload.tempfile, "TemporaryFile", lambda **options: Full())
    with pytest.raises(OSError, match=r"must have 0\.\d\d GB in .*No space left.* TMPDIR"):
        learner(offload_frozen=True)
    assert learner().collect().rewards.isfinite().all()


def test_another_learner_on_the_same_reference_is_not_disturbed(learner):
    lean, plain = learner(offload_frozen=True), learner()
    assert lean.task.reference.model is plain.task.reference.model
    lean.learn(32)
    assert plain.learn(32).history[0]["kl"] == pytest.approx(0, abs=1e-6)
