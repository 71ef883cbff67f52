"""Several processes equal one: the same steps on the same batch, whoever plays and computes which part of it."""

import os
import signal

import numpy as np
import pytest
import torch
from packaging.version import Version

from agents import GRPO, PPO, RLOO, OnlineDPO, Reinforce
from agents.logs.figures import MEASURED
from tests.agents.core.test_checkpoint import assert_same, lines
from tests.processes import in_processes, results
from textenv.training.memory.sharding import Whole
from textenv.training.processes import any_process, is_main, link, on_main, own_generator, own_share, together
from textenv.vector import make_vec

SHARED = {
    "batch_size": 16,
    "learning_rate": 2e-3,
    "max_grad_norm": 0.2,
    "kl_target": 0.2,
    "kl_horizon": 50.0,
    "seed": 3,
}
SETTINGS = {
    "ppo": (PPO, {"epochs": 2, "minibatches": 3, "micro_batch_size": 3, "entropy_coef": 0.05}),
    "ppo, stopped early": (PPO, {"epochs": 3, "minibatches": 2, "target_kl": 1e-3, "value_function": "trunk"}),
    "ppo, warmed up": (PPO, {"critic_warmup": 1, "scale_rewards": True, "weight_decay": 0.3}),
    "rloo": (RLOO, {"epochs": 2, "minibatches": 3, "group_size": 2}),
    "grpo": (GRPO, {"epochs": 2, "minibatches": 3, "group_size": 4, "max_tokens_per_pass": 20}),
    "reinforce": (Reinforce, {}),
    "online dpo": (OnlineDPO, {"epochs": 2, "minibatches": 3, "group_size": 4}),
}


def learner(name, slots):
    """A learner in float64."""
    kind, settings = SETTINGS[name]
    agent = kind(make_vec("textenv/Micro-v0", slots), kind.config_type(**SHARED, **settings))
    if isinstance(agent.shards, Whole):
        agent.actor.double()
    return agent


def in_float64(rollout):
    return type(rollout)(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in rollout))


def weights_of(agent):
    return torch.cat([weight.detach().flatten() for weight in agent.actor.parameters()])


def three_updates(name, batches=None):
    """``(weights, history, kl_coef, batches)``; a batch is a rollout and the state of the generator after it."""
    agent = learner(name, 8 // link().num_processes)
    played = []

    def collect():
        if batches is None:
            rollout = in_float64(type(agent).collect(agent))
        else:
            rollout, state = batches[len(played)]
            agent.generator.set_state(state)
        played.append((rollout, agent.generator.get_state()))
        return rollout

    agent.collect = collect
    agent.learn(48)
    split = {*MEASURED, "padding_share"}  # passes of other rows have other padding
    history = [{key: value for key, value in log.items() if key not in split} for log in agent.history]
    return (
        torch.cat([weight.detach().flatten() for weight in agent.actor.parameters()]),
        history,
        agent.env.kl_coef,
        played,
    )


SAME = 1e-6 if Version(torch.__version__) >= Version("2.13") else 2e-5
"""How near in float64: older versions of PyTorch round more."""


def assert_they_equal_one(name, outcomes):
    """What two processes have learned is what one learns from the batches that they have played; returns these."""
    first, second = outcomes
    assert torch.equal(first[0], second[0])
    assert first[1:3] == second[1:3]
    weights, history, kl_coef, batches = first
    one = three_updates(name, batches)
    torch.testing.assert_close(weights, one[0], rtol=0, atol=SAME)
    assert (weights - weights_of(learner(name, 8))).abs().max() > 1e-3
    assert kl_coef == pytest.approx(one[2], abs=1e-9)
    for log, expected in zip(history, one[1], strict=True):
        assert log == pytest.approx(expected, rel=SAME, abs=SAME)
        assert log["first_ratio_deviation"] < SAME  # what was played is what the policy says
    return batches


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_that_play_and_learn_equal_one_that_learns_from_what_they_played(name):
    batches = assert_they_equal_one(name, results(lambda: three_updates(name)))
    halves = [rollout.tokens.response_lengths.view(2, -1, 4).sum((1, 2)) for rollout, _ in batches]
    assert any(tokens[0] != tokens[1] for tokens in halves)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_processes_play_the_prompts_that_one_would_play_in_its_order(name):
    _, _, _, batches = results(lambda: three_updates(name))[0]
    agent = learner(name, 8)
    for rollout, _ in batches:
        assert rollout.prompt_indices.tolist() == agent.collect().prompt_indices.tolist()


def test_each_process_computes_a_share_of_the_rows_and_about_as_many_tokens():
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 100, 50))
    index = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:41]
    shares = results(lambda: own_share(index, lengths), count=3)
    assert sorted(torch.cat(shares).tolist()) == sorted(index.tolist())
    tokens = [int(lengths[share].sum()) for share in shares]
    assert len(set(tokens)) == 3
    assert max(tokens) - min(tokens) < 200  # two or three long rows of 41
    assert torch.equal(own_share(index, lengths), index)


def test_a_minibatch_smaller_than_the_processes_leaves_one_of_them_without_work():
    """Steps of one pair: three processes for its two responses."""

    def learn(batches=None):
        config = OnlineDPO.config_type(batch_size=6, group_size=2, epochs=2, minibatches=3, learning_rate=1e-2)
        agent = OnlineDPO(make_vec("textenv/Micro-v0", 6 // link().num_processes), config)
        agent.actor.double()
        rollout, state = batches or (in_float64(agent.collect()), agent.generator.get_state())
        agent.generator.set_state(state)
        log = agent.update(rollout)
        return weights_of(agent), log, (rollout, state)

    weights, log, batch = results(learn, count=3)[0]
    one = learn(batch)
    torch.testing.assert_close(weights, one[0], rtol=0, atol=1e-6)
    assert log["grad_norm"] == pytest.approx(one[1]["grad_norm"], abs=1e-9)


def test_processes_draw_different_tokens_from_generators_that_stay_the_same():
    """Even if one of them has drawn from the shared generator by itself."""

    def draw():
        shared = torch.Generator().manual_seed(1)
        if not is_main():
            torch.rand(3, generator=shared)
        own = own_generator(shared)
        return torch.rand(4, generator=own).tolist(), torch.rand(4, generator=shared).tolist()

    (mine, same), (yours, alike) = results(draw)
    assert not set(mine) & set(yours)
    assert same == alike
    alone = torch.Generator()
    assert own_generator(alone) is alone


def test_the_learners_of_all_processes_start_with_the_weights_of_the_first():

    def start():
        policy = saving_learner().policy
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight.add_(float(not is_main()))
        return next(PPO(saving_learner().env, None, policy).actor.parameters())

    first, second = results(start)
    assert torch.equal(first, second)


def test_what_the_main_process_refuses_all_refuse_and_it_alone_works():
    def work():
        done = []
        assert on_main(lambda: done.append(1) or 7) == 7
        assert any_process(not is_main())
        assert not any_process(False)
        with pytest.raises(ValueError, match="no room"):
            on_main(lambda: int("no room"))
        return done

    assert results(work) == [[1], []]


def saving_learner(slots=8, **changed):
    options = {"batch_size": 16, "epochs": 1, "minibatches": 2, "learning_rate": 3e-3, "kl_target": 0.5, **changed}
    return PPO(make_vec("textenv/Micro-v0", slots // link().num_processes), PPO.config_type(**options))


def run(folder, episodes, advance=None):
    """Train until so many episodes, from the checkpoint in the folder if there is one."""
    agent = PPO.resume(folder, saving_learner().env, saving_learner().config)
    reports = []
    report = advance or (lambda done, total, figures: reports.append(done))
    agent.learn_with_checkpoints(episodes, folder, every=2, sample_every=2, advance=report)
    return reports


@pytest.mark.parametrize("target", [0, 1])
def test_a_signal_to_one_process_stops_all_with_one_checkpoint_and_a_resumed_run_equals_one_that_never_stopped(
    tmp_path, target
):
    def interrupted():
        pids = together(os.getpid())
        stop = lambda done, total, figures: os.kill(pids[target], signal.SIGTERM) if done == 3 else None  # noqa: E731
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "half", 80, stop)

    reports = results(lambda: run(tmp_path / "whole", 80))
    assert reports == [[1, 2, 3, 4, 5], []]
    results(interrupted)
    assert len(PPO.load(tmp_path / "half", saving_learner().env).history) in (3, 4)
    results(lambda: run(tmp_path / "half", 80))
    whole, resumed = (PPO.load(tmp_path / name, saving_learner().env) for name in ("whole", "half"))
    assert_same(whole, resumed)
    for name in ("whole", "half"):
        assert [line["episodes"] for line in lines(tmp_path / name / "curves.jsonl")] == [16, 32, 48, 64, 80]
        assert [line["update"] for line in lines(tmp_path / name / "samples.jsonl")] == [1] * 4 + [2] * 4 + [4] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "half"}


def test_a_run_of_two_processes_goes_on_in_one_or_four_with_the_prompts_it_would_have_played(tmp_path):
    results(lambda: run(tmp_path / "run", 32))
    four = results(lambda: PPO.load(tmp_path / "run", saving_learner().env).collect(), count=4)
    one, two = (PPO.load(tmp_path / "run", saving_learner().env) for _ in range(2))
    prompts = one.collect().prompt_indices.tolist()
    assert all(rollout.prompt_indices.tolist() == prompts for rollout in four)
    two.learn(32)
    assert two.episodes == 64
    _, errors = in_processes(lambda: PPO.load(tmp_path / "run", saving_learner(16).env))
    assert all("num_envs must be that of the checkpoint, 8, got 16. Use 8." in error for error in errors)


def test_what_the_processes_cannot_share_is_refused_by_name():
    def refused(work, message):
        _, errors = in_processes(work)
        assert all(message in error for error in errors), errors

    refused(
        lambda: saving_learner(batch_size=12).collect(), "num_envs, got 12 and 4 in each of 2 processes. Change one."
    )
    grouped = {"batch_size": 16, "group_size": 4}
    env = lambda: make_vec("textenv/Micro-v0", 6)  # noqa: E731
    refused(lambda: RLOO(env(), RLOO.config_type(**grouped)), "num_envs must be a multiple of group_size, got 6 and 4")


def test_deepspeed_is_refused_with_what_works(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    link.cache_clear()
    with pytest.raises(ValueError, match=r"as DDP or FSDP2, got DeepSpeed\. .* launch with examples/accelerate/fsdp2"):
        saving_learner()


def test_a_process_that_dies_ends_the_others():
    def work():
        agent = saving_learner()
        agent.learn(16)
        if not is_main():
            os.kill(os.getpid(), signal.SIGKILL)
        agent.learn(32)

    _, errors = in_processes(work, seconds=30)
    assert errors[1] == "killed"
    assert "RuntimeError" in errors[0]
