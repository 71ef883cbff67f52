"""Reward models by name: rules, sums, ensembles, a cache, HTTP; what they score, and what they refuse."""

import json
import os
import subprocess
import sys
import threading

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from reward_models.scorers.cache import CachedRewardModel
from reward_models.scorers.ensemble import Ensemble
from reward_models.scorers.remote import HTTPRewardModel
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.serve import RewardServer
from tests.conftest import tiny_model

TEXTS = ["yes.", "no", "Well done, well done!"]


def score(spec, completions=TEXTS, **columns):
    return list(textenv.reward_model(spec)(["p"] * len(completions), list(completions), **columns))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"rule": "regex", "pattern": "[.!?]$", "score": 0.5}, [0.5, 0.0, 0.5]),
        ({"rule": "regex", "pattern": "no", "whole": True, "otherwise": -1.0}, [-1.0, 1.0, -1.0]),
        ({"rule": "regex_count", "pattern": "well", "ignore_case": True}, [0.0, 0.0, 2.0]),
        ({"rule": "regex_count", "pattern": "e", "maximum": 1}, [1.0, 0.0, 1.0]),
        ({"rule": "length", "score": -1.0}, [-1.0, -1.0, -4.0]),
        ({"rule": "length", "unit": "characters"}, [4.0, 2.0, 21.0]),
        ({"rule": "length_range", "minimum": 2, "maximum": 3, "slope": 0.25}, [0.75, 0.75, 0.75]),
        ({"weighted": {"a": {"model": {"rule": "length"}, "weight": 2.0}}}, [2.0, 2.0, 8.0]),
        (
            {"ensemble": [{"rule": "length"}, {"rule": "length", "unit": "characters"}], "combine": "min"},
            [1.0, 1.0, 4.0],
        ),
    ],
)
def test_json_says_what_is_scored(spec, expected):
    assert score(spec) == expected
    assert score(json.dumps(spec)) == expected


def test_an_answer_is_matched_with_the_prompts_own(text_options):
    spec = {"rule": "exact_match", "column": "answer", "extract": r"(\d+)"}
    assert score(spec, ["it is 3 or 4", "five"], answer=["4", "5"]) == [1.0, 0.0]
    prompts = [{"prompt": "red", "answer": "blue"}]
    env = gymnasium.make(
        "textenv/Text-v0", **{**text_options, "prompts": prompts, "reward_model": {**spec, "extract": None}}
    )
    env.reset(seed=0)
    env.step(3)  # "blue"
    assert env.step(0)[1] == 1.0
    with pytest.raises(ValueError, match=r"needs column 'answer'"):
        score(spec)


def test_sentiment_is_vaders():
    pytest.importorskip("vaderSentiment")
    good, bad = score({"rule": "sentiment"}, ["this is great", "this is horrible"])
    assert good > 0.5
    assert bad < -0.5


def test_a_weighted_sum_lists_its_parts_for_the_environment_and_is_scored_once(text_options):
    calls = []

    def counted(prompts, completions):
        calls.append(len(prompts))
        return [2.0] * len(prompts)

    textenv.register_reward_model("counted", counted)
    spec = {"weighted": {"counted": 1.5, "short": {"model": {"rule": "length"}, "weight": -0.1}}}
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "reward_model": spec, "kl_coef": 0.0})
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    for one in (env, again):
        one.reset(seed=0)
        one.step(3)
        one.step(3)
        _, reward, _, _, info = one.step(0)
        terms = info["reward_terms"]
        assert terms["reward_model/counted"] == pytest.approx(3.0)
        assert terms["reward_model/short"] == pytest.approx(-0.2)
        assert reward == pytest.approx(2.8)
        assert info["rm_score"] == pytest.approx(2.8)
    assert calls == [1, 1]


def test_ensembles_combine_as_their_names_say():
    members = {str(i): (lambda prompts, completions, i=i: [float(i * len(c)) for c in completions]) for i in (1, 2, 6)}
    texts = ["a", "bb"]  # scores 1 2 6 and twice that: mean 3, variance (4 + 1 + 9) / 3
    deviation = np.sqrt(14 / 3)
    expected = {
        "mean": [3.0, 6.0],
        "min": [1.0, 2.0],
        "mean_minus_std": [3 - 0.5 * deviation, 6 - deviation],
        "uncertainty": [3 - 0.5 * 14 / 3, 6 - 0.5 * 4 * 14 / 3],
    }
    for combine, values in expected.items():
        coefficient = 0.5 if combine in ("mean_minus_std", "uncertainty") else None
        ensemble = Ensemble(members, combine=combine, coefficient=coefficient)
        assert ensemble(["p", "p"], texts) == pytest.approx(values)


def test_an_ensemble_of_transformers_scores_as_its_members_do_apart():
    models = {str(seed): TransformerRewardModel.from_language_model(tiny_model(seed=seed)) for seed in (1, 2)}
    for seed, model in models.items():
        model.model.score.weight.data.normal_(generator=torch.Generator().manual_seed(int(seed)))
    prompts, texts = ["what is the sky ?", "red"], ["blue", "green grass is not red"]
    apart = np.mean([model(prompts, texts) for model in models.values()], axis=0)
    np.testing.assert_allclose(Ensemble(models)(prompts, texts), apart, atol=1e-5)


class Counting:
    """Scores by length, and counts what it is asked."""

    def __init__(self, identity):
        self.identity, self.asked = identity, 0

    def __call__(self, prompts, completions):
        self.asked += len(prompts)
        return [float(len(completion)) for completion in completions]


def test_a_text_is_scored_once_a_model_and_another_model_never_finds_it(tmp_path):
    model = Counting("one")
    for _ in range(2):  # the second object reads what the first one wrote
        cached = CachedRewardModel(model, tmp_path / "scores.sqlite")
        assert cached(["p", "p", "q"], ["a", "bb", "a"]) == [1.0, 2.0, 1.0]
    assert model.asked == 3
    changed = Counting("two")
    assert CachedRewardModel(changed, tmp_path / "scores.sqlite")(["p"], ["a"]) == [1.0]
    assert changed.asked == 1
    with pytest.raises(ValueError, match="must have an identity"):
        CachedRewardModel(lambda prompts, completions: [0.0], tmp_path / "scores.sqlite")
    (tmp_path / "broken.sqlite").write_text("no database")
    with pytest.raises(ValueError, match="must be an SQLite file"):
        CachedRewardModel(model, tmp_path / "broken.sqlite")


def test_a_cache_is_keyed_by_the_columns_that_the_model_takes(tmp_path):
    def pays(prompts, completions, bonus):
        return list(bonus)

    cached = CachedRewardModel(pays, tmp_path / "scores.sqlite", version="1")
    assert cached(["p"], ["a"], bonus=[1.0], other=["x"]) == [1.0]
    assert cached(["p"], ["a"], bonus=[2.0], other=["y"]) == [2.0]
    assert len(cached) == 2


def test_processes_share_a_cache(tmp_path):
    code = (
        "import sys; from reward_models.scorers.cache import CachedRewardModel as C\n"
        "c = C(lambda prompts, completions: [1.0] * len(prompts), sys.argv[1], version='v')\n"
        "[c(['p'], [str(i)]) for i in range(50)]"
    )
    path = tmp_path / "scores.sqlite"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert len(CachedRewardModel(lambda prompts, completions: [1.0], path, version="v")) == 50


@pytest.fixture
def server():
    def serve(model, **options):
        made = RewardServer(model, **options)
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        made_servers.append(made)
        return made.url

    made_servers = []
    yield serve
    for one in made_servers:
        one.shutdown()
        one.server_close()


def lengths(prompts, completions, bonus=None):
    return [len(c) + (b or 0.0) for c, b in zip(completions, bonus or [0.0] * len(completions), strict=True)]


def test_a_served_model_scores_as_it_does_here_in_batches_and_with_columns(server, monkeypatch):
    monkeypatch.setenv("RM_TOKEN", "secret")
    url = server(lengths, token="secret")
    spec = {"http": url, "batch_size": 2, "token_variable": "RM_TOKEN"}
    assert score(spec, ["a", "bb", "ccc"], bonus=[0.5, 0.0, 1.0]) == [1.5, 2.0, 4.0]
    monkeypatch.setenv("RM_TOKEN", "wrong")
    with pytest.raises(ValueError, match="status 401"):
        score(spec, ["a"])


def test_failures_that_may_pass_are_tried_again_and_others_are_not(server):
    def flaky(prompts, completions):
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("not yet")
        return [7.0]

    def broken(prompts, completions):
        tries.append(1)
        raise ValueError("bad text")

    tries = []
    assert HTTPRewardModel(server(flaky), backoff=0.0)(["p"], ["a"]) == [7.0]
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(ValueError, match=r"status 400 with body .*bad text"):
        HTTPRewardModel(server(broken), backoff=0.0)(["p"], ["a"])
    assert len(tries) == 1


def test_a_server_that_is_down_or_talks_nonsense_gets_one_clear_error(server):
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/score must answer, got .* in the last of 2 attempts"):
        HTTPRewardModel("http://127.0.0.1:9/score", retries=1, backoff=0.0, timeout=2.0)(["p"], ["a"])
    with pytest.raises(ValueError, match="status 400"):
        HTTPRewardModel(server(lambda prompts, completions: [float("nan")]), backoff=0.0)(["p"], ["a"])
    with pytest.raises(ValueError, match="must have a token"):
        RewardServer(lengths, host="0.0.0.0")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "exactly one of the keys"),
        ({"rule": "regexp"}, "a rule must be one of .*, got 'regexp'"),
        ({"rule": "regex", "pattern": "["}, r"must be a regular expression, got '\['"),
        ({"rule": "regex", "pattern": "a", "scor": 1}, "must be one of pattern, score, .*, got 'scor'"),
        ({"rule": "regex"}, "must have the option 'pattern'"),
        ({"rule": "length", "score": "1"}, r"score of rule 'length' must be a finite number, got '1'"),
        ({"weighted": {}}, "at least one part"),
        (
            {"weighted": {"micro-gold": float("nan")}},
            "the weight of part 'micro-gold' must be a finite number, got nan",
        ),
        ({"ensemble": ["micro-gold"], "combine": "median"}, "combine of 'ensemble' must be one of .*, got 'median'"),
        ({"http": "file:///etc/passwd"}, "must start with http"),
        ({"http": "http://127.0.0.1/", "token_variable": "NOT_SET_ANYWHERE"}, "environment variable that is set"),
        ("{not json", "must be JSON"),
    ],
    ids=str,
)
def test_a_wrong_description_is_refused_with_what_is_wrong(spec, message):
    os.environ.pop("NOT_SET_ANYWHERE", None)
    with pytest.raises(ValueError, match=message):
        textenv.reward_model(spec)
