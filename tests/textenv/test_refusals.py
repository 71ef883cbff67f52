"""What the environment refuses: options, actions, and what a reward model returns, each with value and remedy."""

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from tests.conftest import colour_score
from textenv.scoring import Finished, checked_scores, reward_model_terms

BAD = [
    ({"reward_model": "colours"}, "Did you mean 'colour'"),
    ({"reward_model": colour_score}, "register_reward_model"),
    ({"reward_model": "no_such_module:f"}, "importable"),
    ({"reference": None}, "the KL and the vocabulary come from it"),
    ({"reference": "micro-referense"}, "Did you mean 'micro-reference'"),
    ({"prompts": None}, "prompts must be given"),
    ({"prompts": []}, "at least one prompt"),
    ({"prompts": [""]}, "record 1: a prompt"),
    ({"prompts": ["the the the the the the the the"]}, "got 8 in .*Raise max_prompt_tokens"),
    ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
    ({"max_new_tokens": 58}, "must fit the reference's context \\(64\\), got 65"),
    ({"min_new_tokens": 9}, "min_new_tokens"),
    ({"kl_coef": -1.0}, "kl_coef must be 0 or more, got -1.0"),
    ({"kl_source": "guess"}, "kl_source must be one of"),
    ({"temperature": 0.0}, "temperature"),
    ({"obs_mode": "image"}, "obs_mode"),
    ({"top_k": 5}, "got 'top_k'"),
    ({"kl_coeff": 5}, "Did you mean 'kl_coef'"),
    ({"stop_tokens": ("sky grass",)}, "one token"),
    ({"stop_tokens": ("zzz",)}, "one token of the reference, got 'zzz' → \\['<unk>'\\]"),
    ({"prompts": ["sky " * 40]}, "got 40 in '(sky ){20}…'. Raise max_prompt_tokens, or set long_prompts='drop'"),
    ({"prompts": ["sky " * 40], "long_prompts": "drop"}, "got 1 longer ones.*long_prompts='cut'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[next(iter(b)) + str(i) for i, (b, _) in enumerate(BAD)])
def test_a_bad_option_gets_one_clear_error(text_options, bad, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make("textenv/Text-v0", **{**text_options, **bad})


def test_a_budget_may_fill_the_references_context_to_its_last_token(text_options):
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "max_new_tokens": 57}).unwrapped
    env.reset(seed=0)
    for _ in range(57):
        *_, terminated, _, info = env.step(1)
    assert terminated
    assert info["response_length"] == 57


def test_an_unknown_id_is_an_error_of_gymnasium():
    with pytest.raises(gymnasium.error.NameNotFound, match="Micr"):
        gymnasium.make("textenv/Micr-v0")


def test_bad_reset_options_and_actions_are_errors(text_options):
    env = gymnasium.make("textenv/Text-v0", **text_options).unwrapped
    for options, message in [
        ({"promt": "red"}, "reset options"),
        ({"prompt": "red", "prompt_id": 1}, "one of the two"),
        ({"prompt_id": 4}, "prompt_id must lie in"),
        ({"prompt": "the " * 8}, "Raise max_prompt_tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.reset(seed=0, options=options)
    env.reset(seed=0)
    for action in (-1, 12):
        with pytest.raises(ValueError, match="token of the vocabulary"):
            env.step(action)
    for action in (1.7, 1.0, True, "1", None, np.array([1.0])):
        with pytest.raises(ValueError, match="whole numbers"):
            env.step(action)
    with pytest.raises(ValueError, match="must be 0 or less"):
        env.report_logprobs(0.5)
    env.report_logprobs(-1.0)
    env.step(1)
    with pytest.raises(ValueError, match="every token of an episode or for none"):
        env.step(0)


NO_SCORES = {
    "nothing": (None, r"list of scores, got None"),
    "a number": (1.0, r"list of scores, got 1.0"),
    "an array of no axis": (np.array(1.0), r"list of scores, got array\(1.\)"),
    "a string": ("1", r"list of scores, got '1'"),
    "a dict": ({1.0: 2.0}, r"list of scores, got \{1.0: 2.0\}"),  # one key for one text
    "a set": ({1.0}, r"list of scores, got \{1.0\}"),
    "too many": ([1.0, 2.0], r"one score per episode, got 2 for 1"),
    "NaN": ([float("nan")], r"finite scores.* got nan for prompt 'red'"),
    "infinity": (torch.tensor([torch.inf]), r"finite scores.* got inf for prompt 'red'"),
    "too large": ([10**400], r"finite scores.* got 10+\.\.\.0+ for prompt 'red'"),
    "a list of nothing": ([None], r"finite scores.* got None for prompt 'red'"),
    "a list of strings": (["1.5"], r"finite scores.* got '1.5' for prompt 'red'"),
    "an array of strings": (np.array(["1.5"]), r"finite scores.* got '1.5' for prompt 'red'"),
    "a complex number": (np.array([1j]), r"finite scores.* got 1j for prompt 'red'"),
    "two a text": (np.array([[1.0, 2.0]]), r"finite scores.* got array\(\[1., 2.\]\) for prompt"),
    "tensors of two": (torch.ones(1, 2), r"finite scores.* got tensor\(\[1., 1.\]\) for prompt"),
}


@pytest.mark.parametrize("case", NO_SCORES)
def test_a_reward_model_that_returns_nonsense_is_named_with_its_value(text_options, case):
    scores, message = NO_SCORES[case]

    def broken(prompts, completions):
        return scores

    textenv.register_reward_model("broken", broken)
    env = gymnasium.make("textenv/Text-v0", **{**text_options, "reward_model": "broken"}).unwrapped
    env.reset(options={"prompt": "red"})
    with pytest.raises(ValueError, match=f"reward model 'broken' must return .*{message}"):
        env.step(0)


@pytest.mark.parametrize("terms", [None, [1.0], {}, {"a": None}, {"a": [None]}], ids=str)
def test_parts_that_are_no_scores_by_name_are_refused(terms):
    class Broken:
        def __call__(self, prompts, completions):
            return [1.0]

        def terms(self, prompts, completions):
            return terms

    with pytest.raises(ValueError, match=r"(terms|part 'a') of reward model 'Broken' must return"):
        reward_model_terms(Broken(), Finished(None, ["p"], ["c"], {}, None))


@pytest.mark.parametrize(
    "scores",
    [
        (1, 0.5),
        iter([True, 0.5]),
        np.array([1.0, 0.5], dtype=np.float16),
        np.array([1.0, 0.5], dtype=np.longdouble),
        np.array([[1.0], [0.5]]),
        [np.array([1.0]), np.float32(0.5)],
        torch.tensor([1.0, 0.5], requires_grad=True),
        torch.tensor([[1.0], [0.5]], requires_grad=True),
        torch.tensor([1.0, 0.5]).bfloat16(),
        [torch.tensor(1.0, requires_grad=True), torch.tensor([0.5])],
    ],
    ids=lambda scores: type(scores).__name__,
)
def test_numbers_of_every_make_are_scores_one_a_text(scores):
    checked = checked_scores(scores, ["p", "q"], ["c", "d"], "a reward model")  # a warning would be an error
    assert (checked.tolist(), checked.dtype) == ([1.0, 0.5], np.float64)


def test_a_required_kl_source_that_is_missing_is_an_error(text_options):
    for source, message in [("reported", "report_logprobs"), ("policy", "attach_policy")]:
        env = gymnasium.make("textenv/Text-v0", kl_source=source, **text_options).unwrapped
        env.reset(seed=0)
        with pytest.raises(ValueError, match=message):
            env.step(0)
