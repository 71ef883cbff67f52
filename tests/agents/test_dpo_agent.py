"""Offline DPO on an environment: rankings by their probabilities, training as on the same rankings in a file, runs that
continue."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

import textenv
from agents import DPO, DPOConfig, train_dpo
from agents.algorithms import check_plan
from agents.core.job import Job
from agents.dpo.agent import plackett_luce
from agents.experiments.run import Cell, run_experiment
from reward_models.preferences import Ranking
from tests.processes import results
from textenv.evaluation import evaluate
from textenv.lm import load_language_model
from textenv.registry.experiment import AgentPlan
from textenv.tasks.exact import exact_world
from textenv.vector import make_vec


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def settings(**options):
    return DPOConfig(**{"beta": 0.3, "learning_rate": 1e-3, "batch_size": 8, "seed": 3, **options})


def test_a_ranking_is_as_likely_as_its_choices_one_after_another():
    """Weights e^s = 1, 2, 4: the order (4, 2, 1) has probability 4/7 · 2/3 = 8/21, (1, 2, 4) has 1/7 · 1/3 = 1/21."""
    count = 42_000
    scores = np.tile(np.log([1.0, 2.0, 4.0]), count)
    rankings = plackett_luce(scores, 3, seed=0) - 3 * np.arange(count)[:, None]
    found = Counter(map(tuple, rankings.tolist()))
    chances = {(2, 1, 0): 8 / 21, (2, 0, 1): 4 / 21, (1, 2, 0): 8 / 35, (1, 0, 2): 2 / 35, (0, 2, 1): 2 / 21}
    chances[0, 1, 2] = 1 / 21
    assert sum(chances.values()) == pytest.approx(1)
    for order, chance in chances.items():
        assert found[order] / count == pytest.approx(chance, abs=4 * math.sqrt(chance / count))


def test_a_group_is_ranked_among_itself():
    """Scores so far apart that noise decides nothing; the second group's numbers go on after the first's."""
    assert plackett_luce([0.0, 1e3, 2e3, 1e3, 0.0, 2e3], 3, seed=1).tolist() == [[2, 1, 0], [5, 3, 4]]


def test_it_learns_what_the_same_rankings_in_a_file_teach():
    """Micro's words are its tokens, so rankings of texts say the same."""
    env = make_vec("textenv/Micro-v0", 16)
    agent = DPO(env, settings(), group_size=4)
    seen = []
    draw = agent.task.respond

    def respond(model, batch, **options):
        sampled = draw(model, batch, **options)
        ids, lengths = sampled.response_ids.numpy(), sampled.response_lengths.numpy()
        copy = make_vec("textenv/Micro-v0", 16)
        prompts = [row[-n:].tolist() for row, n in zip(batch.prompt_ids, batch.prompt_lengths.tolist(), strict=True)]
        copy.reset(options={"prompt_id": [env.task.prompts.ids.index(prompt) for prompt in prompts]})
        infos = copy.play(ids, lengths, sampled.logprobs)[4]["final_info"]
        seen.extend(zip(infos["prompt"], infos["response"], infos["finish_reason"], infos["rm_score"], strict=True))
        return sampled

    agent.task.respond = respond
    agent.learn(64)
    assert len(seen) == 64
    order = plackett_luce([score for *_, score in seen], 4, seed=3)
    rankings = []
    for group in order:
        prompts, texts, reasons, _ = zip(*(seen[i] for i in group), strict=True)
        assert len(set(prompts)) == 1
        rankings.append(Ranking(prompts[0], texts, finish_reasons=reasons))
    expected = train_dpo("micro-reference", rankings, settings())
    assert [h["loss"] for h in agent.history] == pytest.approx([h["loss"] for h in expected.history], rel=1e-5)
    assert torch.allclose(weights(agent.policy.model), weights(expected.model.model), atol=1e-6)


def test_the_distribution_that_was_sampled_is_the_one_that_learns():
    """At the start every log-ratio is 0, so a pair costs log 2, at another temperature too; the gradient knows it."""
    norms = []
    for temperature in (1.0, 0.5):
        env = make_vec("textenv/Micro-v0", 8, temperature=temperature)
        agent = DPO(env, settings(max_grad_norm=None), group_size=2)
        agent.learn(16)
        assert agent.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        norms.append(agent.history[0]["grad_norm"])
    assert norms[1] > 1.2 * norms[0]


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tmp_path, at):
    env = make_vec("textenv/Micro-v0", 16)
    whole = DPO(env, settings(epochs=2), group_size=4).learn(64, tmp_path / "whole")

    def interrupt_there(done, total, figures=None):
        if done == at:
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        DPO(make_vec("textenv/Micro-v0", 16), settings(epochs=2), group_size=4).learn(
            64, tmp_path / "cut", advance=interrupt_there
        )
    resumed = DPO(make_vec("textenv/Micro-v0", 16), settings(epochs=2), group_size=4).learn(64, tmp_path / "cut")
    assert torch.equal(weights(resumed.policy.model), weights(whole.policy.model))
    assert resumed.history == whole.history
    with pytest.raises(KeyboardInterrupt):
        DPO(env, settings(epochs=2), group_size=4).learn(64, tmp_path / "other", advance=interrupt_there)
    with pytest.raises(ValueError, match="a run must be resumed with the config"):
        DPO(env, settings(epochs=1), group_size=4).learn(64, tmp_path / "other")


def test_two_processes_learn_the_same_from_responses_of_their_own():
    """To one prompt, so that nothing but their random numbers tells them apart."""
    prompt = make_vec("textenv/Micro-v0", 1).task.prompts.texts[:1]

    def work():
        drawn = []
        agent = DPO(make_vec("textenv/Micro-v0", 8, prompts=prompt), settings(), group_size=4)
        respond = agent.task.respond
        agent.task.respond = lambda *args, **options: (drawn.append(respond(*args, **options)), drawn[-1])[1]
        agent.learn(32)
        return weights(agent.policy.model), [sampled.response_ids.tolist() for sampled in drawn], agent.history

    first, second = results(work)
    assert torch.equal(first[0], second[0])
    assert first[2] == second[2]
    assert len(first[1]) == len(second[1]) == 2
    assert all(mine != yours for mine, yours in zip(first[1], second[1], strict=True))


def test_it_speaks_the_verbs_of_other_agents(tmp_path):
    env = make_vec("textenv/Micro-v0", 16)
    agent = DPO(env, settings()).learn(32)
    observation, _ = env.reset(seed=0)
    tokens, _ = agent.predict(observation, deterministic=True)
    assert tokens.shape == (16,)
    agent.save(tmp_path / "dpo")
    again = DPO.load(tmp_path / "dpo", env)
    assert np.array_equal(again.predict(observation, deterministic=True)[0], tokens)
    plain = load_language_model(tmp_path / "dpo")
    assert torch.equal(weights(plain.model), weights(agent.policy.model))
    assert len(evaluate(again, env).rewards) == len(env.task.prompts.ids)
    free = DPO.load(tmp_path / "dpo", make_vec("textenv/Micro-v0", 16, kl_coef=0), group_size=2)
    assert free.group_size == 2


def test_a_policy_of_a_bfloat16_environment_is_trained_in_float32():
    env = make_vec("textenv/Micro-v0", 8, dtype="bfloat16")
    agent = DPO(env, settings(learning_rate=1e-5)).learn(16)
    assert {weight.dtype for weight in agent.policy.model.parameters()} == {torch.float32}
    assert agent.history[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    moved = weights(agent.policy.model) != weights(DPO(env, settings()).policy.model)
    assert moved.float().mean() > 0.9  # at this rate bfloat16 would lose most steps


def test_rankings_are_by_the_score_alone():
    """Where the reward pays β log π_ref it is no score."""
    with pytest.raises(ValueError, match=r"kl_source must not be 'reference' for DPO.*Leave kl_source out\."):
        DPO(make_vec("textenv/Micro-v0", 8, kl_source="reference"))


def test_who_learns_on_draws_from_the_reference_again():
    """The KL is still that from the environment's reference, however far the policy has gone."""
    env = make_vec("textenv/Micro-v0", 16)
    agent = DPO(env, settings(learning_rate=3e-2)).learn(64)
    assert agent.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    models = []
    draw = env.task.respond
    env.task.respond = lambda model, *args, **options: (models.append(model), draw(model, *args, **options))[1]
    agent.learn(64)
    assert set(models) == {env.task.reference.model}
    assert agent.history[0]["loss"] != pytest.approx(math.log(2), abs=1e-2)


def test_nothing_is_judged_twice_and_a_finished_model_is_not_replaced(tmp_path):
    """A judge need not say the same again."""
    rng = np.random.default_rng(0)
    asked = []

    def judge(prompts, completions):
        asked.append(len(prompts))
        return rng.normal(size=len(prompts)).tolist()

    textenv.register_reward_model("dpo-moody", judge)

    def agent(**options):
        return DPO(make_vec("textenv/Micro-v0", 16, reward_model="dpo-moody"), settings(epochs=2, **options))

    def stop(done, total, figures):
        if done == 2:
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        agent().learn(64, tmp_path / "run", advance=stop)
    assert sum(asked) == 64
    with pytest.raises(ValueError, match="resumed with the seed it started with, 3, got 4"):
        agent(seed=4).learn(64, tmp_path / "run")
    with pytest.raises(ValueError, match="resumed with the total_episodes it started with, 64, got 80"):
        agent().learn(65, tmp_path / "run")
    resumed = agent().learn(64, tmp_path / "run")
    assert sum(asked) == 64
    assert resumed.tokens > 64
    with pytest.raises(ValueError, match=r"must hold no finished model, got .*Load it, or name another folder"):
        agent().learn(64, tmp_path / "run")
    (tmp_path / "run-responses.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        agent().learn(64, tmp_path / "other", advance=stop)
    (tmp_path / "other-responses.safetensors").unlink()
    with pytest.raises(ValueError, match="must lie beside its folder, got no"):
        agent().learn(64, tmp_path / "other")


def test_beta_is_the_kl_coef_of_the_environment_unless_it_is_given(tmp_path):
    env = make_vec("textenv/Micro-v0", 16, kl_coef=0.7)
    assert DPO(env).config.beta == 0.7
    free = make_vec("textenv/Micro-v0", 16, kl_coef=0)
    with pytest.raises(ValueError, match=r"kl_coef must be above 0 for DPO, whose β it is, got 0\. Raise it, or give"):
        DPO(free)
    DPO(free, DPOConfig(beta=0.1))
    with pytest.raises(ValueError, match="max_length must be None in an environment"):
        DPO(env, DPOConfig(max_length=9))
    with pytest.raises(ValueError, match="group_size must be 2 or more, got 1"):
        DPO(env, group_size=1)


def interrupt(*args):
    raise KeyboardInterrupt


def test_an_experiment_trains_it_once_even_if_its_measurement_was_interrupted(tmp_path, monkeypatch):
    plan = AgentPlan(name="offline", algorithm="dpo", options={"num_envs": 16, "batch_size": 8})
    cell = Cell("textenv/Micro-v0", plan, 1, 64, {})
    (result,) = run_experiment([cell], tmp_path / "first")
    assert result["figures"]["regret_ratio"] > 0
    assert result["figures"]["tokens"] >= 64
    with monkeypatch.context() as patched:
        patched.setattr("agents.experiments.run.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_experiment([cell], tmp_path / "second")
    monkeypatch.setattr(DPO, "learn", lambda *args, **kwargs: pytest.fail("trained twice"))
    (again,) = run_experiment([cell], tmp_path / "second")
    for name in ("regret_ratio", "tokens"):
        assert again["figures"][name] == result["figures"][name]


def test_a_wrong_option_is_refused_before_anything_runs():
    for options, message in (
        ({"beta": 0}, "beta must be above 0"),
        ({"max_length": 5}, "an option must be one that dpo has, got 'max_length'"),
        ({"group_size": 1}, "group_size must be 2 or more"),
        ({"preset": "mine"}, "preset must be one of"),
        ({"num_envs": 0}, "num_envs must be 1 or more"),
        ({"num_envs": 6}, "num_envs must be a multiple of group_size, got 6 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            check_plan(AgentPlan(name="mine", algorithm="dpo", options=options))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_covers_most_of_the_way_to_the_optimum_of_the_exact_world(tmp_path, seed):
    """With labels as noisy as an annotator's, from the reference's responses alone."""
    trained = DPO.train(Job("textenv/Micro-v0", {}, seed, 51_200, tmp_path / "out"))
    assert exact_world(make_vec("textenv/Micro-v0", 4)).measure(trained.model).regret_ratio < 0.4
