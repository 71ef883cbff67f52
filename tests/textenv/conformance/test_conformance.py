"""The conformance suite: clean on every id of this package; red, by the right name, on environments that are broken."""

import re
import sys

import gymnasium
import numpy as np
import pytest

import textenv
from textenv.conformance import CHECKS, ConformanceReport, check
from textenv.conformance.subject import Skipped, Subject, difference

IDS = ("textenv/Micro-v0", "textenv/Assistant-v0", "textenv/Text-v0")


@pytest.mark.parametrize("obs_mode", ["dict", "tokens"])
@pytest.mark.parametrize("env_id", IDS)
def test_every_id_passes_every_check_in_both_observation_modes(env_id, obs_mode, text_options):
    options = text_options if env_id == "textenv/Text-v0" else {}
    report = check(env_id, obs_mode=obs_mode, **options)
    assert report.failures == {}
    assert [item.name for item in report.checks] == list(CHECKS)
    assert not any("skipped" in item.detail for item in report.checks)


@pytest.mark.parametrize(
    "options",
    [
        {"stop_tokens": ["?", "sky"], "min_new_tokens": 2, "missing_eos_penalty": 1.0, "gold": "colour"},
        {"reward_model": {"weighted": {"colour": 1.0, "short": {"model": {"rule": "length"}, "weight": -0.1}}}},
        {"kl_source": "reference", "temperature": 0.5, "min_new_tokens": 1},
        {"kl_source": "policy", "temperature": 2.0},
        {"kl_source": "reported", "score_batch_size": 2},
        {"kl_coef": 0.0, "max_new_tokens": 1},
    ],
    ids=str,
)
def test_every_option_keeps_the_contract(text_options, options):
    assert check("textenv/Text-v0", **{**text_options, **options}).failures == {}


@pytest.fixture
def subject(text_options, request):
    """A maker of subjects around a broken class; the other form of the environment stays sound."""

    def make(single: str = "Sound", vector: str | None = None, **options) -> Subject:
        env_id = "broken/Temporary-v0"
        gymnasium.registry.pop(env_id, None)
        spec = {key: options.pop(key) for key in ("max_episode_steps",) if key in options}
        gymnasium.register(
            env_id,
            entry_point=f"tests.textenv.conformance.broken:{single}",
            vector_entry_point=vector and (vector if ":" in vector else f"tests.textenv.conformance.broken:{vector}"),
            kwargs={**text_options, **options},
            **spec,
        )
        request.addfinalizer(lambda: gymnasium.registry.pop(env_id, None))
        return Subject(env_id, {})

    return make


BROKEN = [
    ("DependsOnHowManyWereMade", "pickling", "made by a pickled factory differs"),
    ("LosesItsBetaWhenPickled", "pickling", "an unpickled environment differs"),
    ("EndsTooSoonInWords", "endings", "at the end only"),
    ("PaysNaN", "rewards", "must be finite"),
    ("PaysByMode", "observations", "depend on obs_mode"),
    ("SaysAnotherScore", "rewards", "must add up to rm_score"),
    ("SaysAnotherBeta", "rewards", "kl_coef must be 0.1, got 0.5"),
    ("SaysAnotherKL", "KL", "must be log π"),
    ("CutsTheKL", "KL", r"must be \(6,\), got \(3,\)"),
    ("SaysAnotherSum", "KL", "must be the sum of kl_per_token"),
    ("GoldIsNaN", "rewards", "gold_score must be finite"),
    ("PadsTokensWithMinusTwo", "observations", "obs_mode='tokens' must stay in its space"),
    ("CountsOneResponseTokenMore", "observations", "lengths at step 0"),
    ("ShowsAnotherResponse", "observations", "the response, from column 7"),
    ("ReusesItsBuffer", "fresh arrays", "changed after it was returned"),
    ("HandsOutItsTokens", "fresh arrays", "changed after it was returned"),
    ("ReadsWhatItReturned", "fresh arrays", "overwriting what was returned changed what followed"),
    ("KeepsItsInfo", "fresh arrays", "changed after it was returned"),
    ("SeedsNumpy", "global generators", "numpy.random must be left alone"),
    ("DrawsFromPython", "global generators", "generator of random must be left alone"),
    ("SeedsTorch", "global generators", "torch must be left alone"),
    ("IgnoresTheSeed", "spec as JSON", "made from JSON differs"),
    ("IgnoresTheSeed", "gymnasium checker", "seed"),
    ("CopiesTheReference", "shared models", "must share the registry's reference"),
    ("HoldsALock", "pickling", "pickle"),
    ("LooksLikeAGoal", "stable-baselines3 checker", "key"),
    ("WrongDtype", "gymnasium checker", "observation"),
    ("HasASeedMethod", "gymnasium checker", "Official support for the `seed` function is dropped"),
    ("WrongDtype", "observations", "must stay in its space"),
    ("EmitsBothFlags", "endings", "never both"),
    ("TruncatesAtTheBudget", "endings", "truncated must never be set"),
    ("InventsAReason", "endings", "finish_reason must be one of"),
    ("CallsLengthEos", "endings", "must fit the last token"),
    ("CountsOneTokenLess", "endings", "response_length must be"),
    ("NeverEnds", "endings", "must end within max_new_tokens"),
    ("PaysMoreThanItSays", "rewards", "must be the sum of reward_terms"),
    ("PaysEarly", "rewards", "0 before the last token"),
    ("DropsTheTerms", "rewards", "must have"),
    ("PaysForTheKL", "rewards", "must be -kl_coef"),
    ("FlipsTheKL", "KL", "must be log π"),
    ("UsesK3", "KL", "must be log π"),
    ("LeavesEosOut", "KL", "must be log π"),
    ("ShiftsByOne", "KL", "must be"),
    ("CountsPadding", "KL", "0 on padding"),
    ("IgnoresWhatIsReported", "KL", "Log-probabilities were reported"),
    ("PadsTokensWithZero", "observations", "obs_mode='tokens' at step"),
    ("PadsThePromptOnTheRight", "observations", "attention_mask at step 0"),
    ("MasksByEos", "observations", "attention_mask at step"),
]

BROKEN_VECTORS = [
    ("DrawsFromEntropy", "spec as JSON", "a vector made from JSON differs"),
    ("SaysNextStep", "vector SameStep", "autoreset_mode in metadata"),
    ("HasAnotherSpace", "vector SameStep", "single_action_space must be"),
    ("PlaysForMore", "play", "reward"),
    ("ForgetsWhatItPlayed", "play", "last observation"),
    ("PlaysWithoutReasons", "play", "info .*finish_reason"),
    ("SeedsAllSlotsAlike", "vector SameStep", "reset"),
    ("FinalObservationOfTheNext", "vector SameStep", "info at step"),
    ("AddsTheMeanScore", "vector SameStep", "reward at step"),
    ("AddsTheMeanScore", "vector Disabled", "reward at step"),
    ("FloatRewards", "vector SameStep", "float32"),
    ("KeepsOnGoing", "vector NextStep", "observation at step"),
    ("IgnoresTheResetMask", "vector Disabled", "reset of the ended slots"),
    ("DrawsANewGenerator", "vector NextStep", "at step"),
    ("ReturnsItsRewards", "fresh arrays", "changed after it was returned"),
    ("CopiesItForItsVector", "shared models", "must not be copied, but was by .*making the vector"),
    ("PlaysWithoutLogprobs", "play", "reward"),
    ("PlaysIntoTheNext", "play", "next episode"),
    ("TruncatesWhatIsPlayed", "play", "terminated or truncated"),
]


def test_a_sound_subclass_passes_so_that_the_failures_below_mean_something(subject):
    made = subject("Sound", "textenv.vector:TextVectorEnv")
    assert check(made.spec.id).failures == {}


@pytest.mark.parametrize(("name", "rule", "message"), BROKEN)
def test_a_broken_environment_fails_the_check_that_is_named_for_it(subject, name, rule, message):
    with pytest.raises(Exception, match=message):
        CHECKS[rule](subject(name))


@pytest.mark.parametrize(("name", "rule", "message"), BROKEN_VECTORS)
def test_a_broken_vector_fails_the_check_that_is_named_for_it(subject, name, rule, message):
    with pytest.raises(AssertionError, match=message):
        CHECKS[rule](subject("Sound", name))


BROKEN_WITH_OPTIONS = [
    ("TemperatureOnOneSide", None, {"temperature": 0.5}, "KL", "must be log π"),
    ("KnowsAnUnknownKL", None, {"kl_source": "reference"}, "KL", "an unknown KL must not be reported"),
    ("PaysTwiceForTheReference", None, {"kl_source": "reference"}, "KL", "reference_logprob'] must be"),
    ("Sound", "AllowsEverything", {"min_new_tokens": 1}, "vector SameStep", "action_masks at step 0"),
    ("Sound", None, {"max_episode_steps": 3}, "spec as JSON", "max_episode_steps must be None"),
]


@pytest.mark.parametrize(("single", "vector", "options", "rule", "message"), BROKEN_WITH_OPTIONS)
def test_what_breaks_with_an_option_alone_is_found_too(subject, single, vector, options, rule, message):
    with pytest.raises(AssertionError, match=message):
        CHECKS[rule](subject(single, vector, **options))


def test_a_reward_model_whose_scores_depend_on_the_batch_is_found(text_options):
    textenv.register_reward_model("batchy", lambda prompts, completions: [float(len(prompts))] * len(prompts))
    report = check("textenv/Text-v0", **{**text_options, "reward_model": "batchy"})
    assert {"vector SameStep", "vector NextStep", "vector Disabled", "play"} <= report.failures.keys()


def test_an_object_in_the_spec_is_found(subject, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red"}')
    with pytest.raises(TypeError, match="not JSON serializable"):
        CHECKS["spec as JSON"](subject(prompts=tmp_path / "prompts.jsonl"))


def test_an_id_without_a_vector_form_is_checked_without_one(subject):
    report = check(subject("Sound").spec.id)
    assert report.passed
    skipped = {
        item.name for item in report.checks if item.detail.startswith("skipped: the id has no vector_entry_point")
    }
    assert skipped == {"vector SameStep", "vector NextStep", "vector Disabled", "play"}


def test_what_cannot_be_made_fails_with_the_reason_and_nothing_else_runs():
    report = check("textenv/Text-v0")
    assert not report.passed
    assert list(report.failures) == ["make"]
    assert "reference must be given" in report.failures["make"]


def test_checking_leaves_the_global_generators_and_the_model_as_they_were(text_options):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in ("global generators", "shared models"):
        CHECKS[name](Subject("textenv/Text-v0", text_options))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert "__deepcopy__" not in vars(textenv.language_model(text_options["reference"]).model)


def test_a_report_tells_failures_by_name(subject):
    report = check(subject("EmitsBothFlags").spec.id)
    assert isinstance(report, ConformanceReport)
    assert not report.passed
    assert "endings" in report.failures


def test_a_missing_stable_baselines3_skips_its_check(text_options, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.env_checker", None)
    with pytest.raises(Skipped, match="stable_baselines3 is not installed"):
        CHECKS["stable-baselines3 checker"](Subject("textenv/Text-v0", text_options))


@pytest.mark.parametrize(
    ("got", "want", "found"),
    [
        ({"a": np.array([1, 2])}, {"a": np.array([1, 2])}, None),
        ({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 2.0 + 5e-6])}, None),
        ({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 2.001])}, "/a: "),
        ({"a": 1}, {"b": 1}, "keys"),
        (np.array([1], dtype=np.int32), np.array([1]), "int32"),
        (np.array([None, {"x": 1}]), np.array([None, {"x": 2}]), r"\[1\]/x: 1, not 2"),
        ((1, 2), (1, 2, 3), "length"),
        (True, 1, "type bool"),
        (float("nan"), 1.0, "nan"),
    ],
)
def test_differences_are_found_and_named_with_their_place(got, want, found):
    result = difference(got, want)
    if found is None:
        assert result is None
    else:
        assert re.search(found, result)
