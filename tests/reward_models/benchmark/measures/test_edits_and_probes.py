"""Prompts asked in other words, and responses that nobody should prefer."""

import math

import numpy as np
import pytest

from reward_models.benchmark import run_benchmark
from reward_models.benchmark.layout import lay_out
from reward_models.benchmark.measures.probes import Probe, best_word, probes
from reward_models.benchmark.measures.robustness import compare_scores, edit_prompt, edited, typo
from reward_models.benchmark.model import BenchmarkedModel
from reward_models.benchmark.suites import other_phrasing
from reward_models.preferences import Ranking
from tests.reward_models.benchmark.models import CONFIG
from textenv.tasks import assistant


def test_a_paraphrase_asks_the_same_in_other_words(rng):
    for prompt in assistant.prompts("test")[:200]:
        other = assistant.parse_prompt(other_phrasing(prompt.text, rng))
        assert other.phrasing != prompt.phrasing
        assert other._replace(text="", phrasing=0) == prompt._replace(text="", phrasing=0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("what now", "[what now]"),
        ("user: fix it assistant:", "user: [fix it] assistant:"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: [c]\n\nAssistant:",
        ),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "[u]"),
    ],
)
def test_an_edit_touches_what_the_user_said_last_and_nothing_else(rng, prompt, expected):
    found = edit_prompt(prompt, lambda text, rng: f"[{text}]", rng)
    assert (found if isinstance(found, str) else found[-1]["content"]) == expected
    if not isinstance(prompt, str):
        assert found[:-1] == prompt[:-1]
        assert prompt[-1]["content"] == "u"


def test_a_typo_swaps_two_neighbouring_letters_of_a_word(rng):
    for _ in range(20):
        found = typo("tell me about elephants", rng)
        assert sorted(found) == sorted("tell me about elephants")
        assert sum(a != b for a, b in zip(found, "tell me about elephants", strict=True)) in (0, 2)
    assert typo("a b c", rng) == "a b c"


def test_an_edit_is_measured_as_by_hand():
    items = [Ranking(f"p{i}", ("a", "b"), (0, 1)) for i in range(4)]
    before = np.array([1.0, 0.0, 100.0, 100.0, 7.0, 6.0, 0.0, -1.0])  # margins 1, 0, 1, 1
    after = np.array([1.0, 2.0, 101.0, 100.0, 6.0, 6.0, 5.0, 1.0])  # margins −1, 1, 0, 4
    found = compare_scores(lay_out(items), before, after)
    assert found.flips == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert found.accuracy == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    # Mean of 0, 2, 1, 0, 1, 0, 5, 2; before, squared deviations within prompts are 3 · ½ over four degrees of freedom.
    assert found.shift == pytest.approx((11 / 8) / math.sqrt(3 / 8))


def test_responses_of_a_prompt_share_its_edit():
    layout = lay_out([Ranking("tell me about elephants", tuple("abcdefgh"), tuple(range(8)))])
    assert len(set(edited(layout, typo, seed=0).prompts)) == 1


def test_probes_are_held_against_the_response_ranked_best_and_the_mean():
    items = [Ranking("p", ("a", "b"), (0, 1)), Ranking("p", ("c", "d"), (0, 1)), Ranking("q", ("e", "f"), (0, 1))]
    # The best ranked scores 1 (the model prefers b), 5 and 5; the means are 2, 5 and 3.
    table = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 5.0, "e": 5.0, "f": 1.0, ("p", "kind"): 2.0, ("q", "kind"): 4.0}
    layout = lay_out([item._replace(finish_reasons=("length", "length")) for item in items])
    reasons = set()

    def model(prompts, texts, finish_reason):
        reasons.update(finish_reason)
        return [table.get((prompt, text), table.get(text, 0.0)) for prompt, text in zip(prompts, texts, strict=True)]

    scores = np.array([table[text] for text in layout.texts.responses])
    found = probes(layout, scores, BenchmarkedModel(model), praise="kind")["praise"]
    assert found == Probe((1 + 0 + 0) / 3, (0 + 0 + 1) / 3, "kind")  # 2 does not beat the mean 2
    assert reasons == {"eos"}  # whatever ended the responses of the records


def test_the_best_word_is_the_one_of_the_best_responses_to_their_prompts():
    # Against the means 10 and 0: "high" stands on both sides of the first, "good" above both, (0.5 + 0.3)/2; "spam" is
    # counted once a response, (1 − 1.5)/2, however often it is said.
    items = [
        Ranking("p", ("high good", "high"), (0, 1)),
        Ranking("q", ("spam spam spam spam", "good", "spam", "no"), (0, 1, 2, 3)),
    ]
    assert best_word(lay_out(items), np.array([10.5, 9.5, 1.0, 0.3, -1.5, 0.2])) == "good"
    # One of 201 responses is less than a hundredth of them.
    texts = ("rare", *(f"{'fine' if i % 2 else 'dull'} {i}" for i in range(200)))
    layout = lay_out([Ranking("p", texts, tuple(range(201)))])
    assert best_word(layout, np.array([99.0, *(float(i % 2) for i in range(200))])) == "fine"


def test_a_model_that_knows_nothing_beats_nothing():
    records = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    report = run_benchmark(lambda prompts, texts, **columns: [0.5] * len(texts), records, CONFIG)
    assert {probe.beats_chosen for probe in report.probes.values()} == {0.0}
    assert report.flags == ()
