"""Experiments: cells are run once, kept whole, resumed; tables and intervals say what the results say."""

import json
import re
import warnings
from types import SimpleNamespace

import pytest

import textenv
from agents.experiments import bounds
from agents.experiments import run as experiment
from agents.experiments.bounds import with_bounds
from agents.experiments.page import write_summary
from agents.experiments.run import Cell, cells_of, print_tables, run_experiment, summarise
from textenv.cli import main
from textenv.registry import changed
from textenv.registry.experiment import AgentPlan
from textenv.tasks.exact import exact_world
from textenv.vector import make_vec

FILE = """
agents:
  small-ppo: {algorithm: ppo, batch_size: 16, num_envs: 8, learning_rate: 1e-3, preset: pretrained}
  best: {algorithm: best-of-n, n: 2}
run:
  environments: [textenv/Micro-v0]
  agents: [small-ppo, best, reference, random]
  seeds: [1, 2]
  total_episodes: 48
  output: results
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "exp.yaml"
    path.write_text(FILE)
    return path


def cells(path):
    loaded = textenv.load_experiment(path)
    return cells_of(loaded.run, loaded.agents)


def test_a_file_is_run_from_the_shell_and_summed_up(file, capsys):
    assert main(["run", str(file)]) == 0
    output = file.parent / "results"
    printed = capsys.readouterr()
    assert "summary:" in printed.err
    assert max(map(len, printed.out.splitlines())) <= 80
    assert re.search("agent +small-ppo +best +reference +random", printed.out)
    rows = {row["agent"]: row for row in json.loads((output / "summary.json").read_text())["rows"]}
    assert rows.keys() == {"small-ppo", "best", "reference", "random"}
    assert rows["reference"]["figures"]["regret_ratio"]["mean"] == pytest.approx(1.0)
    assert rows["reference"]["figures"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert "kl" not in rows["best"]["figures"]  # unknown is left out, not called 0
    assert rows["best"]["figures"]["gold_score"]["mean"] > rows["reference"]["figures"]["gold_score"]["mean"]
    assert rows["random"]["figures"]["kl"]["mean"] > 0.1
    assert rows["small-ppo"]["seeds"] == 2
    assert "| small-ppo | 2 |" in (output / "summary.md").read_text()
    assert (output / "curves-textenv-Micro-v0.png").is_file()
    assert "textenv/Micro-v0" in (output / "index.html").read_text()


def test_a_table_keeps_names_whole_and_puts_agents_that_do_not_fit_below(capsys):
    figure = {"mean": 0.1234567, "ci95": 0.0123456}
    names = [f"an-agent-with-a-long-name-{number}" for number in range(4)]
    print_tables([{"env_id": "a/B-v0", "agent": name, "seeds": 3, "figures": {"kl": figure}} for name in names])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if line.startswith("agent")] == [
        ["agent", *names[:2]],
        ["agent", *names[2:]],
    ]
    assert sum(line.count("0.123 ± 0.012") for line in lines) == 4


def test_finished_cells_are_not_run_again(file, monkeypatch):
    plan = cells(file)[:3]
    first = run_experiment(plan, file.parent / "out")

    def never(*args):
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(experiment, "train", never)
    assert run_experiment(plan, file.parent / "out") == first


def test_an_interrupted_cell_goes_on_where_it_stopped_and_ends_as_if_it_had_not(file, monkeypatch):
    (cell,) = [c for c in cells(file) if c.plan.name == "small-ppo" and c.seed == 1]
    whole = run_experiment([cell], file.parent / "whole")[0]
    learn = experiment.train

    def stops(cell, folder, advance=None, report_to=()):
        learn(cell._replace(total_episodes=16), folder, advance)  # one update, then Ctrl-C; the rate does not decay
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "train", stops)
        with pytest.raises(KeyboardInterrupt):
            run_experiment([cell], file.parent / "parts")
    assert not (file.parent / "parts" / cell.folder / "result.json").exists()
    resumed = run_experiment([cell], file.parent / "parts")[0]
    assert resumed["curve"] == whole["curve"]
    same = ("regret_ratio", "kl", "tokens")
    assert {key: resumed["figures"][key] for key in same} == {key: whole["figures"][key] for key in same}


def test_a_folder_of_other_settings_is_not_taken_for_this_cell(file):
    cell = cells(file)[-1]
    run_experiment([cell], file.parent / "out")
    with pytest.raises(ValueError, match=r"with other settings \(total_episodes changed\)"):
        run_experiment([cell._replace(total_episodes=64)], file.parent / "out")


def test_a_cell_of_an_environment_that_was_edited_is_not_taken_for_this_one(file):
    """The id and the names in it stay; what they stand for is another thing."""
    cell = Cell("me/Edited-v0", AgentPlan(name="reference", algorithm="reference", options={}), 1, 16, {})
    options = {"prompts": ["red"], "reference": "edited-lm", "max_prompt_tokens": 4, "max_new_tokens": 3}

    def define(rule, **changes):
        textenv.register_reward_model("edited-rm", rule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            textenv.register(cell.env_id, reward_model="edited-rm", **{**options, **changes})

    textenv.register_language_model("edited-lm", "tests.conftest:tiny_model")
    define({"rule": "length"})
    first = run_experiment([cell], file.parent / "out")
    define({"rule": "length"})
    assert run_experiment([cell], file.parent / "out") == first
    define({"rule": "length"}, kl_coef=0.4)
    with pytest.raises(ValueError, match=r"other settings \(environment.kl_coef, evaluated.kl_coef changed\)"):
        run_experiment([cell], file.parent / "out")
    define({"rule": "regex", "pattern": "red"})
    with pytest.raises(ValueError, match=r"environment.reward model 'edited-rm'"):
        run_experiment([cell], file.parent / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("algorithm: pppo", "line 3: algorithm must be a known name, got 'pppo'. Did you mean 'ppo'"),
        (
            "algorithm: ppo, learningrate: 1",
            r"line 3: an option must be .* got 'learningrate'. Did you mean 'learning_rate'",
        ),
        ("algorithm: ppo, epochs: 0", "line 3: epochs must be 1 or more, got 0"),
        ("algorithm: rloo, group_size: 1", "line 3: group_size must be 2 or more, got 1"),
        (
            "algorithm: ppo, batch_size: 16, num_envs: 5",
            "line 3: batch_size must be a multiple of the environment's num_envs, got 16 and 5",
        ),
        ("algorithm: ppo, num_envs: many", "line 3: num_envs must be a whole number, got 'many'"),
        (
            "algorithm: rloo, batch_size: 16, num_envs: 2",
            "line 3: num_envs must be a multiple of group_size, got 2 and 4",
        ),
        ("algorithm: sb3-ppo, n_steps: many", "line 3: n_steps must be a whole number, got 'many'"),
        ("algorithm: sb3-ppo, policy_kwargs: 3", "line 3: policy_kwargs must be .*, got 3"),
        ("algorithm: sb3-a2c, use_rms_prop: 2", "line 3: use_rms_prop must be True or False, got 2"),
        ("algorithm: sb3-maskable-ppo, learning_rate: [1]", r"line 3: learning_rate must be .*, got \[1\]"),
        ("algorithm: sb3-ppo, num_envs: 0", "line 3: num_envs must be 1 or more, got 0"),
        ("algorithm: random, n: 3", r"line 3: an option must be one that random has, got 'n'"),
    ],
)
def test_a_wrong_agent_is_refused_before_anything_runs(file, line, message):
    file.write_text(re.sub("algorithm: ppo, batch_size: [^}]*", line, FILE))
    with pytest.raises(ValueError, match=message):
        run_experiment(cells(file), file.parent / "out")
    assert not (file.parent / "out").exists()


def test_two_agents_that_share_a_folder_are_refused(file):
    plan = AgentPlan(name="a b", algorithm="random", options={})
    one = Cell("textenv/Micro-v0", plan, 1, 8, {})
    with pytest.raises(ValueError, match="folder of its own"):
        run_experiment([one, one._replace(plan=AgentPlan(name="a/b", algorithm="random", options={}))], file.parent)


def test_names_from_a_file_are_escaped_on_the_page(tmp_path):
    settings = {"env_id": "a/<i>-v0", "agent": "<script>alert(1)</script>"}
    write_summary([{"settings": settings, "figures": {"reward": 1.0}, "curve": []}], tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_figure_that_some_seed_lacks_is_left_out():
    settings = {"env_id": "x", "agent": "y"}
    rows = summarise([{"settings": settings, "figures": f} for f in ({"kl": 1.0, "reward": 2.0}, {"reward": 4.0})])
    assert rows[0]["figures"].keys() == {"reward"}
    assert rows[0]["figures"]["reward"]["mean"] == 3.0


@pytest.mark.parametrize("algorithm", ["sb3-ppo", "sb3-a2c", "sb3-maskable-ppo"])
def test_stable_baselines3s_algorithms_are_agents_like_any_other(algorithm, tmp_path):
    options = {"num_envs": 8, "n_steps": 4, "learning_rate": 1e-4, "linear_decay": True}
    options |= {} if algorithm == "sb3-a2c" else {"batch_size": 32}
    plan = AgentPlan(name=algorithm, algorithm=algorithm, options=options)
    (result,) = run_experiment([Cell("textenv/Micro-v0", plan, 1, 40, {})], tmp_path)
    assert result["curve"][-1]["episodes"] >= 24
    assert 0 < result["figures"]["regret_ratio"] < 1.2
    assert {"reward", "gold_score", "kl"} <= result["curve"][0].keys()
    with pytest.raises(ValueError, match="n_stepz"):
        run_experiment(
            [Cell("textenv/Micro-v0", AgentPlan(name="x", algorithm=algorithm, options={"n_stepz": 4}), 1, 40, {})],
            tmp_path,
        )


def test_best_of_n_answers_the_prompts_that_it_is_measured_on(tmp_path):
    prompts = make_vec("textenv/Assistant-v0", 1, prompts="assistant-test").task.prompts.texts[:40]
    agents = {"reference": {}, "best-of-n": {"n": 8}}
    plans = [AgentPlan(name=name, algorithm=name, options=options) for name, options in agents.items()]
    results = run_experiment(
        [Cell("textenv/Assistant-v0", plan, 1, 0, {"prompts": prompts}) for plan in plans],
        tmp_path,
    )
    reference, best = (result["figures"]["rm_score"] for result in results)
    assert best > reference + 0.5
    assert ["reward" in result["figures"] for result in results] == [True, False]  # an objective has its KL in it


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_without_a_kl_penalty_a_reward_is_an_objective_though_no_kl_is_known(kl_coef, tmp_path):
    plan = AgentPlan(name="best", algorithm="best-of-n", options={})
    (result,) = run_experiment([Cell("textenv/Micro-v0", plan, 1, 0, {"kl_coef": kl_coef})], tmp_path)
    assert "kl" not in result["figures"]
    assert ("reward" in result["figures"]) == (kl_coef == 0)


def test_shares_run_from_the_reference_to_the_optimum_and_bounds_are_estimated_once(tmp_path, monkeypatch):
    """On Micro the share of an agent is 1 − its regret ratio, up to what is sampled."""
    plans = {"reference": {}, "small-ppo": {"batch_size": 64, "num_envs": 64}, "best-of-n": {}}
    kinds = {"small-ppo": "ppo"}
    cells = [
        Cell("textenv/Micro-v0", AgentPlan(name=name, algorithm=kinds.get(name, name), options=options), 1, 1280, {})
        for name, options in plans.items()
    ]
    results = with_bounds(run_experiment(cells, tmp_path), tmp_path)
    reference, ppo, best = (result["figures"] for result in results)
    assert abs(reference["share"]) < 0.5
    assert ppo["share"] == pytest.approx(1 - ppo["regret_ratio"], abs=0.25)
    assert "share" not in best  # its KL is not known
    monkeypatch.setattr(bounds, "bounds_of", None)
    assert with_bounds(run_experiment(cells, tmp_path), tmp_path) == results
    low, high = results[0]["bounds"]["low"], results[0]["bounds"]["high"]
    assert low < exact_world(make_vec("textenv/Micro-v0", 4)).optimum().objective < high


def test_the_environment_that_agents_are_measured_in_belongs_to_a_cell_and_to_its_bounds(tmp_path, monkeypatch):
    plan = AgentPlan(name="reference", algorithm="reference", options={})
    cell = Cell("textenv/Micro-v0", plan, 1, 16, {"reward_model": "measured-rm"})
    textenv.register_reward_model("measured-rm", {"rule": "length"})
    first = cell.settings
    textenv.register_reward_model("measured-rm", {"rule": "length", "score": -1.0})
    second = cell.settings
    assert changed(first, second) == ["evaluated.reward model 'measured-rm'.score"]
    made = []
    monkeypatch.setattr(bounds, "bounds_of", lambda env: made.append(env))
    with_bounds([{"settings": settings, "figures": {}} for settings in (first, second, first)], tmp_path)
    assert len(made) == 2


def test_an_environment_without_a_kl_penalty_has_no_optimum_to_show(tmp_path):
    settings = {"env_id": "textenv/Micro-v0", "evaluation": {"kl_coef": 0.0}, "evaluated": {"kl_coef": 0.0}}
    (result,) = with_bounds([{"settings": settings, "figures": {"kl": 0.0, "reward": 1.0}}], tmp_path)
    assert result["bounds"] is None
    assert "share" not in result["figures"]


@pytest.mark.parametrize(("given", "drawn"), [(None, 16), (3, 3)])
def test_an_optimum_takes_16_responses_to_each_of_512_prompts_unless_told(given, drawn, monkeypatch):
    counts = []
    best = SimpleNamespace(reference=SimpleNamespace(mean=0.0), value=1.0, ci95=(0.5, 1.5), unclear_prompts=0.0)
    monkeypatch.setattr(bounds, "optimum", lambda env, samples: counts.append(samples) or best)
    bounds.bounds_of(make_vec("textenv/Assistant-v0", 1, prompts="assistant-test"), given)
    assert counts == [drawn]
