"""Rules, one field at a time; every expected number is counted by hand."""

import pytest

import textenv
from reward_models.scorers.rules import RULES, ExactMatch, Length, LengthRange, Regex, RegexCount


def score(rule, *completions, **columns):
    return rule(["p"] * len(completions), list(completions), **columns)


def test_a_pattern_is_found_anywhere_or_must_be_the_whole_response():
    assert score(Regex(pattern="no", score=2.0, otherwise=-1.0), "no", "not", "a no", "yes") == [2.0, 2.0, 2.0, -1.0]
    assert score(Regex(pattern="no", whole=True), "no", "not", "a no") == [1.0, 0.0, 0.0]


def test_case_counts_unless_it_is_ignored_and_a_dot_matches_a_line_break():
    assert score(Regex(pattern="No.Yes"), "No\nYes", "no yes") == [1.0, 0.0]
    assert score(Regex(pattern="No.Yes", ignore_case=True), "No\nYes", "no yes") == [1.0, 1.0]
    assert score(RegexCount(pattern="a."), "a\nab Ab") == [2.0]
    assert score(RegexCount(pattern="a.", ignore_case=True), "a\nab Ab") == [3.0]


def test_matches_count_without_overlap_up_to_the_maximum():
    assert score(RegexCount(pattern="aa", score=-0.5), "aaaaa", "") == [-1.0, 0.0]
    assert score(RegexCount(pattern="a", maximum=3), "aa", "aaaaa") == [2.0, 3.0]
    assert score(RegexCount(pattern="a", maximum=0), "aa") == [0.0]


def test_a_length_is_in_words_characters_or_a_models_tokens_without_eos(model_folder):
    assert score(Length(), "a  b\nc", "") == [3.0, 0.0]
    assert score(Length(unit="characters", score=0.5), "a  b\nc", "") == [3.0, 0.0]
    tokens = Length(unit="tokens", language_model=str(model_folder))
    assert score(tokens, "the sky is blue", "red", "") == [4.0, 1.0, 0.0]


def test_a_range_of_lengths_charges_each_unit_outside_it():
    rule = LengthRange(minimum=2, maximum=3, score=1.0, slope=0.25)
    assert score(rule, "", "a", "a b", "a b c", "a b c d", "a b c d e") == [0.5, 0.75, 1.0, 1.0, 0.75, 0.5]
    assert score(LengthRange(minimum=1, slope=0.5, score=2.0), "", "a " * 99) == [1.5 + 0.0, 2.0]
    assert score(LengthRange(minimum=2, maximum=2), "a b") == [1.0]


def test_an_answer_must_match_but_for_outer_space_and_for_case_if_that_is_ignored():
    answers = {"answer": ["Blue ", "Blue", "Blue", 7]}
    texts = [" Blue\n", "blue", "Blue sky", "7"]
    assert score(ExactMatch(column="answer"), *texts, **answers) == [1.0, 0.0, 0.0, 1.0]
    loose = ExactMatch(column="answer", ignore_case=True, score=3.0, otherwise=-1.0)
    assert score(loose, *texts, **answers) == [3.0, 3.0, -1.0, 3.0]


def test_the_last_match_is_the_answer_and_its_first_group_if_it_has_one():
    texts = ["is 3, no: is 4", "is 4, no: is 3", "none"]
    same = {"answer": ["4", "4", "4"]}
    assert score(ExactMatch(column="answer", extract=r"is (\d)"), *texts, **same) == [1.0, 0.0, 0.0]
    assert score(ExactMatch(column="answer", extract=r"\d"), *texts, **same) == [1.0, 0.0, 0.0]
    # A group that took no part in the match is an empty answer, not an error.
    assert score(ExactMatch(column="answer", extract=r"is|no (\d)"), "is 4", answer=["4"]) == [0.0]
    assert score(ExactMatch(column="answer", extract="IS (.)", ignore_case=True), "is a", answer=["A"]) == [1.0]


def test_a_prompt_without_its_answer_is_named():
    with pytest.raises(ValueError, match=r"needs column 'answer' for every prompt, got none for prompt 'q'"):
        ExactMatch(column="answer")(["p", "q"], ["a", "b"], answer=["a", None])


def test_sentiment_is_scaled_by_its_score():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    text = "this is great"
    assert score(RULES["sentiment"](score=-2.0), text) == [-2.0 * vader.polarity_scores(text)["compound"]]


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("regex", {"pattern": "a", "score": True}),
        ("regex", {"pattern": "a", "score": float("nan")}),
        ("regex", {"pattern": "a", "score": float("inf")}),
        ("regex", {"pattern": "a", "whole": 1}),
        ("regex", {"pattern": 3}),
        ("regex_count", {"pattern": "("}),
        ("regex_count", {"pattern": "a", "maximum": 1.5}),
        ("regex_count", {"pattern": "a", "maximum": True}),
        ("regex_count", {"pattern": "a", "maximum": -2}),
        ("length", {"unit": "lines"}),
        ("length", {"unit": "tokens"}),
        ("length", {"unit": "words", "language_model": "gpt2"}),
        ("length_range", {"minimum": 3, "maximum": 2}),
        ("length_range", {"minimum": -5, "maximum": -2}),
        ("length_range", {"minimum": -1}),
        ("length_range", {"slope": 10**400}),
        ("exact_match", {"column": "a", "extract": "["}),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind_is_refused(rule, fields):
    with pytest.raises(ValueError, match=r"must be|must not|needs a language_model"):
        textenv.reward_model({"rule": rule, **fields})


def test_rules_that_differ_in_any_field_have_different_identities():
    rules = [
        Regex(pattern="a"),
        Regex(pattern="b"),
        Regex(pattern="a", score=2.0),
        Regex(pattern="a", otherwise=1.0),
        Regex(pattern="a", whole=True),
        RegexCount(pattern="a"),
        Length(),
        LengthRange(),
    ]
    assert len({rule.identity for rule in rules}) == len(rules)
    assert Regex(pattern="a").identity == rules[0].identity
