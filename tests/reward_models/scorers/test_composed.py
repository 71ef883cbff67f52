"""Sums, ensembles and caches of reward models: each argument reaches each part, and identities tell them apart."""

import contextlib
import json
import sqlite3

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from reward_models.scorers.cache import CachedRewardModel
from reward_models.scorers.ensemble import Ensemble
from reward_models.scorers.remote import HTTPRewardModel
from reward_models.scorers.spec import build_reward_model
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.scorers.weighted import Part, WeightedSum
from tests.conftest import tiny_model
from textenv.config import Loading
from textenv.scoring import note_truncated, truncations


class Known:
    """Scores by a table, notes what it is asked, and has an identity."""

    def __init__(self, scores, identity=None):
        self.scores, self.identity, self.asked = scores, identity, []

    def __call__(self, prompts, completions, bonus=None):
        self.asked.append((list(prompts), list(completions), bonus))
        return [self.scores[c] + b for c, b in zip(completions, bonus or [0.0] * len(completions), strict=True)]


A, B = Known({"x": 1.0, "y": 5.0}, "a"), Known({"x": -2.0, "y": 10.0}, "b")
ENSEMBLE_OF_TWO = {"mean": [-0.5, 7.5], "min": [-2.0, 5.0]}


def scorer(seed=0, **options):
    model = TransformerRewardModel.from_language_model(tiny_model(seed=seed), **options)
    model.model.score.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def test_a_sum_inside_a_sum_lists_its_scaled_parts_by_path():
    inner = WeightedSum({"a": Part(A, 2.0), "b": Part(B, -1.0)})
    outer = WeightedSum({"in": Part(inner, 0.5), "a": Part(A)})
    terms = outer.terms(["p", "p"], ["x", "y"], bonus=[0.0, 1.0])
    assert {name: list(values) for name, values in terms.items()} == {
        "in/a": [1.0, 6.0],
        "in/b": [1.0, -5.5],
        "a": [1.0, 6.0],
    }
    assert outer(["p", "p"], ["x", "y"], bonus=[0.0, 1.0]) == [3.0, 6.5]


@pytest.mark.parametrize(("combine", "expected"), ENSEMBLE_OF_TWO.items())
def test_an_ensemble_hands_columns_to_its_members(combine, expected):
    ensemble = Ensemble({"a": A, "b": B}, combine=combine)
    assert ensemble(["p", "p"], ["x", "y"]) == expected
    assert ensemble(["p", "p"], ["x", "y"], bonus=[1.0, 2.0]) == [expected[0] + 1.0, expected[1] + 2.0]


def test_disagreement_costs_one_deviation_unless_told_otherwise_and_nothing_in_an_ensemble_of_one():
    # Scores 1 and −2: mean −1/2, standard deviation 3/2, variance 9/4.
    both = {"a": A, "b": B}
    assert Ensemble(both, combine="mean_minus_std")(["p"], ["x"]) == pytest.approx([-2.0])
    assert Ensemble(both, combine="uncertainty")(["p"], ["x"]) == pytest.approx([-2.75])
    assert Ensemble(both, combine="mean_minus_std", coefficient=0.0)(["p"], ["x"]) == pytest.approx([-0.5])
    assert Ensemble(both, combine="uncertainty", coefficient=2.0)(["p"], ["x"]) == pytest.approx([-5.0])
    for combine in ("mean", "min", "mean_minus_std", "uncertainty"):
        assert Ensemble({"a": A}, combine=combine)(["p", "p"], ["x", "y"]) == [1.0, 5.0]


@pytest.mark.parametrize(
    ("combine", "coefficient"), [("mean", 1.0), ("min", 0.0), ("uncertainty", -1.0), ("uncertainty", float("inf"))]
)
def test_a_coefficient_that_cannot_be_meant_is_refused(combine, coefficient):
    with pytest.raises(ValueError, match="coefficient must be finite"):
        Ensemble({"a": A}, combine=combine, coefficient=coefficient)


def test_members_that_read_differently_share_no_tokens():
    plain, chatty = scorer(1), scorer(2)
    chatty.tokenizer.chat_template = "{% for m in messages %}red {{ m['content'] }} {% endfor %}"
    chat = [{"role": "user", "content": "the sky"}]
    texts = ["green the sky", "grass"], ["is blue", "green"]
    alone = np.array([model(*texts, chat=[chat, None]) for model in (plain, chatty)])
    assert alone[1][0] == pytest.approx(chatty(["red the sky"], ["is blue"])[0], abs=1e-5)
    members = Ensemble({"plain": plain, "chatty": chatty}).member_scores(*texts, chat=[chat, None])
    np.testing.assert_allclose(members, alone, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_on_one_trunk_share_its_pass_and_score_as_they_do_alone(family, monkeypatch):
    heads = [TransformerRewardModel.from_language_model(tiny_model(family), batch_size=2) for _ in range(3)]
    other = scorer(seed=5)
    for seed, model in enumerate(heads):
        model.model.score.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    texts = ["the grass", "red", "green"], ["is blue", "sky", "the sky is red"]
    alone = np.array([model(*texts) for model in (*heads, other)])
    ensemble = Ensemble({"a": heads[0], "other": other, "b": heads[1], "c": heads[2]})
    passes: list[str] = []
    for name, model in ensemble.members.items():
        model.model.base_model.register_forward_hook(lambda *_, name=name: passes.append(name))
    np.testing.assert_allclose(ensemble.member_scores(*texts), alone[[0, 3, 1, 2]], rtol=0, atol=1e-6)
    assert passes.count("a") == 2, "three texts in batches of two"
    assert not {"b", "c"} & set(passes)
    assert "other" in passes
    assert ensemble([], []) == []


def test_heads_on_one_trunk_that_read_differently_share_no_pass():
    models = [TransformerRewardModel.from_language_model(tiny_model()) for _ in range(4)]
    for seed, model in enumerate(models):
        model.model.score.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    for model in models[2:]:
        model.tokenizer.chat_template = "{% for m in messages %}red {{ m['content'] }} {% endfor %}"
    chat = [{"role": "user", "content": "the sky"}]
    alone = np.array([model(["green the sky"], ["is blue"], chat=[chat]) for model in models])
    members = Ensemble({str(seed): model for seed, model in enumerate(models)}).member_scores(
        ["green the sky"], ["is blue"], chat=[chat]
    )
    np.testing.assert_allclose(members, alone, atol=1e-6)


def test_members_that_cut_prompts_elsewhere_share_no_tokens():
    long, short = scorer(1), scorer(2)
    short.model.config.max_position_embeddings = 32
    texts = ["red green " * 25], ["is blue"]
    alone = np.array([model(*texts) for model in (long, short)])
    np.testing.assert_allclose(Ensemble({"long": long, "short": short}).member_scores(*texts), alone, atol=1e-5)


def test_a_member_whose_scores_are_not_finite_is_named():
    broken = scorer()
    broken.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"member 'broken' of an ensemble must return finite scores"):
        Ensemble({"fine": scorer(), "broken": broken})(["red"], ["blue"])
    with pytest.raises(ValueError, match=r"part 'nan' of a weighted sum must return finite"):
        WeightedSum({"nan": Part(Known({"x": float("nan")}))})(["p"], ["x"])


@pytest.mark.parametrize("scores", [None, 1.0, ["a"], {"x": 1.0}, np.ones((1, 2))], ids=str)
def test_a_part_that_returns_no_scores_is_named(scores, tmp_path):
    wrong = {"wrong": lambda prompts, completions: scores}
    for model, name in [
        (Ensemble(wrong), "member 'wrong' of an ensemble"),
        (WeightedSum({"wrong": Part(wrong["wrong"])}), "part 'wrong' of a weighted sum"),
        (CachedRewardModel(wrong["wrong"], tmp_path / "scores.sqlite", version="1"), "a cached reward model"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must return .*, got "):
            model(["p"], ["x"])


def test_identities_tell_models_apart_by_parts_weights_and_ways_to_combine():
    models = [
        WeightedSum({"a": Part(A), "b": Part(B)}),
        WeightedSum({"a": Part(A), "b": Part(B, 2.0)}),
        WeightedSum({"a": Part(B), "b": Part(A)}),
        Ensemble({"a": A, "b": B}),
        Ensemble({"a": A, "b": B}, combine="min"),
        Ensemble({"a": A, "b": B}, combine="uncertainty"),
        Ensemble({"a": A, "b": B}, combine="uncertainty", coefficient=2.0),
        Ensemble({"a": A}),
        HTTPRewardModel("http://127.0.0.1:1", version="1"),
        HTTPRewardModel("http://127.0.0.1:1", version="2"),
        HTTPRewardModel("http://127.0.0.1:2", version="1"),
        scorer(1),
        scorer(2),
    ]
    assert len({model.identity for model in models}) == len(models)
    unknown = Known({"x": 1.0})
    assert WeightedSum({"a": Part(A), "b": Part(unknown)}).identity is None
    assert Ensemble({"a": unknown}).identity is None
    assert HTTPRewardModel("http://127.0.0.1:1").identity is None


@pytest.fixture
def cached(tmp_path):
    return lambda model, version=None: CachedRewardModel(model, tmp_path / "scores.sqlite", version=version)


def by_place(prompts, completions):
    """No two of the texts below score alike."""
    places = {("p", "ab"): 1.0, ("pa", "b"): 2.0, ("q", "ab"): 3.0, ("p", "b"): 4.0, ("p", ""): 5.0}
    return [places[pair] for pair in zip(prompts, completions, strict=True)]


def test_a_cache_mixes_up_no_prompt_and_completion_and_keeps_their_order(cached):
    model = cached(by_place, version="1")
    prompts, texts = ["p", "pa", "q", "p", "p"], ["ab", "b", "ab", "b", ""]
    assert model(prompts[:2], texts[:2]) == [1.0, 2.0]
    # Some are known, some new, one twice.
    assert model([*prompts[::-1], "q"], [*texts[::-1], "ab"]) == [5.0, 4.0, 3.0, 2.0, 1.0, 3.0]
    assert model([], []) == []
    assert len(model) == 5


def test_new_texts_get_their_own_prompts_and_columns_and_nothing_is_asked_twice(cached):
    known = Known({"x": 1.0, "y": 2.0, "z": 3.0}, "known")
    model = cached(known)
    assert model(["p"], ["y"], bonus=[0.5]) == [2.5]
    assert model(["p", "q", "r"], ["y", "x", "z"], bonus=[0.5, 0.25, 0.125], other=[1, 2, 3]) == [2.5, 1.25, 3.125]
    assert known.asked == [(["p"], ["y"], [0.5]), (["q", "r"], ["x", "z"], [0.25, 0.125])]
    model(["p"], ["y"], bonus=[0.5], other=[9])  # a column that the model does not take
    assert len(known.asked) == 2


def test_a_version_goes_with_the_identity_and_does_not_stand_for_it(cached):
    for score, (identity, version) in enumerate([("a", "1"), ("a", "2"), ("b", "1"), ("a", None), (None, "1")]):
        assert cached(Known({"x": float(score)}, identity), version)(["p"], ["x"]) == [float(score)]
    identities = {cached(Known({}, i), v).identity for i, v in [("a", "1"), ("a", "2"), ("b", "1"), ("a", None)]}
    assert len(identities) == 4


def test_a_score_from_the_file_still_says_that_its_response_was_not_read_to_its_end(tmp_path):
    def reads_one_word(prompts, completions):
        note_truncated(text for text in completions if " " in text)
        return [0.0] * len(prompts)

    for asked in (["one"], ["one", "two words"], ["two words", "one", "two words"]):
        model = CachedRewardModel(reads_one_word, tmp_path / "scores.sqlite", version="1")  # as another process would
        with truncations() as cut:
            model(["p"] * len(asked), asked)
        assert cut == {text for text in asked if text == "two words"}
    assert len(model) == 2


def test_a_cache_answers_more_texts_than_one_query_holds(cached):
    model = cached(lambda prompts, completions: [float(c) for c in completions], version="1")
    count = 32_767  # SQLite takes 32,766 values in a query
    texts, expected = [str(i) for i in range(count)], [float(i) for i in range(count)]
    assert model(["p"] * count, texts) == expected
    ignorant = cached(Known({}), version="1")  # knows no score, and is not asked for any
    assert ignorant(["p"] * count, texts[::-1]) == expected[::-1]
    assert len(model) == count


@pytest.mark.parametrize("value", ["abc", b"abc", None, float("inf")], ids=repr)
def test_a_damaged_score_is_refused_with_the_name_of_the_file(value, cached, tmp_path):
    model = cached(by_place, version="1")
    model(["p", "q"], ["ab", "ab"])
    with contextlib.closing(sqlite3.connect(tmp_path / "scores.sqlite")) as database, database:
        database.execute("UPDATE scores SET value = ? WHERE value = 3.0", (value,))
    assert model(["p"], ["ab"]) == [1.0]
    with pytest.raises(ValueError, match=r"a score cache must hold .*, got .* in '.*scores\.sqlite'\. .*remove it"):
        model(["p", "q"], ["ab", "ab"])


@pytest.mark.parametrize("path", ["/proc/nowhere/scores.sqlite", "/dev/null/scores.sqlite"])
def test_a_cache_that_cannot_be_made_is_named(path):
    with pytest.raises(ValueError, match=rf"a score cache must be .*, got '{path}':"):
        build_reward_model({"cache": path, "of": {"rule": "length"}})


def test_a_cache_takes_json_columns_and_refuses_others(cached):
    model = cached(Known({"x": 1.0}, "a"))
    with pytest.raises(ValueError, match="columns must be JSON values"):
        model(["p"], ["x"], bonus=[object()])


def test_json_builds_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_A_TEST", "t")
    options = {"timeout": 3.0, "batch_size": 7, "retries": 2, "backoff": 0.125, "version": "9"}
    http = build_reward_model({"http": "http://127.0.0.1:1/s", **options, "token_variable": "TOKEN_OF_A_TEST"})
    assert {name: getattr(http, name) for name in ("timeout", "batch_size", "retries", "backoff")} == {
        name: value for name, value in options.items() if name != "version"
    }
    assert json.loads(http.identity) == {"http": "http://127.0.0.1:1/s", "version": "9"}
    rule = {"rule": "length"}
    ensemble = build_reward_model({"ensemble": [rule, rule], "combine": "uncertainty", "coefficient": 2.0})
    assert (ensemble.combine, ensemble.coefficient, len(ensemble.members)) == ("uncertainty", 2.0, 2)
    sum_ = build_reward_model({"weighted": {"one": {"model": rule}, "two": {"model": rule, "weight": -2}}})
    assert [part.weight for part in sum_.parts.values()] == [1.0, -2]
    path = str(tmp_path / "scores.sqlite")
    ones, twos = (build_reward_model({"cache": path, "of": rule, "version": v}) for v in ("1", "2"))
    assert ones.identity != twos.identity
    scorer().save_pretrained(tmp_path / "rm")
    classifier = build_reward_model({"classifier": str(tmp_path / "rm"), "batch_size": 3, "dtype": "bfloat16"})
    assert (classifier.batch_size, classifier.model.dtype) == (3, torch.bfloat16)


def test_every_part_goes_to_the_device_that_is_asked_for(tmp_path):
    scorer().save_pretrained(tmp_path / "rm")
    name = str(tmp_path / "rm")
    (member,) = build_reward_model({"ensemble": [name]}, Loading("meta")).members.values()
    (part,) = build_reward_model({"weighted": {name: 1.0}}, Loading("meta")).parts.values()
    classifier = build_reward_model({"classifier": name}, Loading("meta"))
    assert [str(model.model.device) for model in (member, part.model, classifier)] == ["meta"] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rule": "length", "ensemble": []}, "exactly one of the keys"),
        ({"weighted": {"a": {"model": {"rule": "length"}, "wieght": 1.0}}}, r"got the unknown keys \['wieght'\]"),
        ({"weighted": ["a"]}, "'weighted' must be an object"),
        ({"weighted": {"a": {"model": {"rule": "length"}, "weight": "1"}}}, "must be a finite number, got '1'"),
        (
            {"weighted": {"a": {"model": {"rule": "length"}, "weight": float("inf")}}},
            "must be a finite number, got inf",
        ),
        ({"ensemble": "a"}, "'ensemble' must be a list"),
        ({"ensemble": []}, "at least one member"),
        ({"ensemble": [{"rule": "length"}], "weights": [1]}, "got 'weights'"),
        ({"cache": "x.sqlite"}, "must have the option 'of'"),
        (
            {"classifier": "x", "dtype": "tensor"},
            "dtype of 'classifier' must be one of 'float32', 'bfloat16' or None, got 'tensor'",
        ),
        ({"weighted": {"a": {"model": {"rule": "length"}, "weight": True}}}, "must be a finite number, got True"),
        ({"weighted": {"a": {"model": {"rule": "length"}, "weight": 10**400}}}, "must be a finite number, got 10+"),
        ({"weighted": 5}, r"'weighted' must be an object, got 5"),
        ({"ensemble": [], "combine": ["min"]}, r"combine of 'ensemble' must be one of 'mean', .*, got \['min'\]"),
        (
            {"ensemble": [], "coefficient": "1"},
            r"coefficient of 'ensemble' must be a finite number or None, got '1'",
        ),
        ({"cache": 5, "of": {"rule": "length"}}, r"'cache' must be a string, got 5"),
        ({"cache": "x", "of": 5}, r"of of 'cache' must be a string or an object, got 5"),
        (
            {"cache": "x", "of": {"rule": "length"}, "version": 5},
            r"version of 'cache' must be a string or None, got 5",
        ),
        ({"classifier": 5}, r"'classifier' must be a string, got 5"),
        ({"classifier": "x", "dtype": 5}, r"dtype of 'classifier' must be one of .* or None, got 5"),
        ({"classifier": "x", "batch_size": "4"}, r"batch_size of 'classifier' must be a whole number, got '4'"),
        ({"classifier": "x", "batch_size": 0}, r"batch_size of 'classifier' must be 1 or more, got 0"),
        ({"http": 5}, r"'http' must be a string, got 5"),
        ({"http": "http://127.0.0.1", "timeout": "10"}, r"timeout of 'http' must be a finite number, got '10'"),
        ({"http": "http://127.0.0.1", "timeout": True}, r"timeout of 'http' must be a finite number, got True"),
        ({"http": "http://127.0.0.1", "retries": 1.5}, r"retries of 'http' must be a whole number, got 1.5"),
        ({"http": "http://127.0.0.1", "batch_size": 1.5}, r"batch_size of 'http' must be a whole number, got 1.5"),
        (
            {"http": "http://127.0.0.1", "token_variable": 5},
            r"token_variable of 'http' must be a string or None, got 5",
        ),
        ({"http": "http://127.0.0.1", "retries": -1}, "retries must be 0 or more, got -1"),
        ({"http": "http://127.0.0.1", "batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"http": "http://127.0.0.1", "timeout": 0}, "timeout must be above 0, got 0"),
    ],
    ids=str,
)
def test_a_description_with_a_mistake_is_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        build_reward_model(spec)


def test_a_model_may_hold_another_twice_but_never_itself():
    rule = {"rule": "length"}
    twice = {"ensemble": [{"weighted": {"a": {"model": rule}}}, {"weighted": {"a": {"model": rule}}}]}
    assert textenv.reward_model(twice)(["p"], ["one two"]) == [2.0]
    # Through two names: the way round is longer than one step.
    textenv.register_reward_model("circle-1", {"ensemble": ["circle-2"]})
    textenv.register_reward_model("circle-2", {"weighted": {"circle-1": 1.0}})
    with pytest.raises(ValueError, match="must not hold itself"):
        textenv.reward_model("circle-1")
    assert textenv.reward_model(twice)(["p"], ["one two"]) == [2.0]  # nothing is left behind


def test_terms_of_nested_sums_reach_the_environment(text_options):
    inner = {"weighted": {"long": {"model": {"rule": "length"}, "weight": 2.0}}}
    spec = {"weighted": {"sum": {"model": inner, "weight": 0.5}, "any": {"model": {"rule": "regex", "pattern": ""}}}}
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "reward_model": spec, "kl_coef": 0.0})
    env.reset(seed=0)
    env.step(3)
    _, reward, *_, info = env.step(0)
    assert info["reward_terms"] == {"reward_model/sum/long": 1.0, "reward_model/any": 1.0}
    assert reward == 2.0
