"""Models whose figures are known beforehand, and models that are broken in a known way."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import textenv
from reward_models.benchmark import BenchmarkConfig, Item, load_suite, run
from reward_models.benchmark.bench import file_stems
from reward_models.benchmark.best_of_n import Point
from reward_models.benchmark.bias import blanked, length_bias, swapped, within_prompt_spearman
from reward_models.benchmark.layout import Texts, lay_out
from reward_models.benchmark.metrics import Rate
from reward_models.benchmark.page import write_page
from reward_models.benchmark.probes import Probe, best_word, probes
from reward_models.benchmark.report import COLUMNS, Limits, find_flags, plain, row
from reward_models.benchmark.robustness import Robustness, compare_scores, edit_prompt, edited, typo
from reward_models.benchmark.scorer import Refused, Scorer
from reward_models.benchmark.suites import Pool, _ranked, other_phrasing
from reward_models.transformer import TransformerRewardModel
from tests.conftest import tiny_model
from textenv.cli import main
from textenv.tasks import assistant

CONFIG = BenchmarkConfig(limit=160, pool=8, resamples=300, annotators=2)


@pytest.fixture(scope="module")
def suite():
    return load_suite("embedded", CONFIG)


class Callable:
    """A reward model with a declared unit."""

    def __init__(self, function, score_unit):
        self.function, self.score_unit = function, score_unit

    def __call__(self, prompts, completions, **columns):
        return self.function(prompts, completions, **columns)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def noise(seed=0):
    """A fixed random score a text."""
    return lambda prompts, completions, **columns: [
        np.random.default_rng([seed, *map(ord, prompt + text)]).normal()
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def test_the_suite_is_the_held_out_world_and_equal_seeds_make_it_equal(suite):
    held_out = {prompt.text for prompt in assistant.prompts("test")}
    assert {item.prompt for item in suite.items} <= held_out
    again = load_suite("embedded", CONFIG)
    assert again.items == suite.items
    for item in suite.items[:50]:
        assert len(set(item.responses)) == len(item.responses)
        truth = assistant.gold_scores([item.prompt] * len(item.gold), item.responses, list(item.finish_reasons))
        assert truth == list(item.gold)
    reasons = {
        (len(text.split()) == 24, why) for item in suite.items for text, why in zip(item.responses, item.finish_reasons)
    }
    assert reasons == {(False, "eos"), (True, "length")}  # 24 words and no EOS is the budget


def test_a_model_that_knows_gold_reaches_the_limit_and_is_calibrated(suite):
    report = run(Callable(assistant.gold_scores, 1 / assistant.ANNOTATOR_TEMPERATURE), suite, CONFIG)
    assert abs(report.limits.accuracy_gap) < 3 * report.limits.accuracy_gap_se
    assert report.calibration.declared
    slope = report.calibration.slope
    assert abs(slope.value - 1) < 1.5 * (slope.ci95[1] - slope.value)  # 3 standard errors
    assert abs(report.calibration.nll - report.limits.nll_floor) < 3 * report.calibration.nll_se
    assert report.calibration.ece < 0.05
    # A hundredth of the scores in units of a hundred times the log-odds is the same model.
    small = Callable(
        lambda *texts, **columns: [0.01 * score for score in assistant.gold_scores(*texts, **columns)],
        100 / assistant.ANNOTATOR_TEMPERATURE,
    )
    same = run(small, suite._replace(pool=None), CONFIG)
    assert same.calibration.nll == pytest.approx(report.calibration.nll)
    assert same.calibration.slope.value == pytest.approx(slope.value)
    assert report.limits.gold_spearman == pytest.approx(1.0)
    assert report.best_of_n[-1].gold_gain == pytest.approx(report.best_of_n[-1].oracle_gain)
    assert report.flags == ()
    assert isinstance(report.response_only["blank"], Refused)  # the judge knows no empty prompt
    assert "prompt must read" in report.response_only["blank"].reason
    assert report.robustness["paraphrase"].flips == 0.0  # the question is the same


def test_an_undeclared_scale_is_fitted(suite):
    report = run("assistant-gold", suite, CONFIG)
    assert not report.calibration.declared
    # 1/τ is the true unit.
    assert report.calibration.unit == pytest.approx(1 / assistant.ANNOTATOR_TEMPERATURE, rel=0.2)
    assert report.calibration.nll == report.calibration.nll_stretched


def test_a_model_of_noise_is_right_half_the_time_and_so_is_gold_on_shuffled_labels(suite):
    report = run(noise(), suite, CONFIG)
    half_width = (report.accuracy.clustered[1] - report.accuracy.clustered[0]) / 2
    assert abs(report.accuracy.value - 0.5) < 1.5 * half_width
    rng = np.random.default_rng(0)
    shuffled = []
    for item in suite.items:
        order = rng.permutation(len(item.responses))
        pick = {name: tuple(getattr(item, name)[i] for i in order) for name in ("responses", "gold", "finish_reasons")}
        shuffled.append(item._replace(**pick))
    report = run("assistant-gold", suite._replace(items=shuffled), CONFIG)
    half_width = (report.accuracy.clustered[1] - report.accuracy.clustered[0]) / 2
    assert abs(report.accuracy.value - 0.5) < 1.5 * half_width


def test_a_model_that_was_told_the_labels_is_flagged_as_a_leak():
    suite = load_suite("embedded", BenchmarkConfig(limit=160, pool=4, annotators=1))
    known = {(item.prompt, text): -rank for item in suite.items for text, rank in zip(item.responses, item.ranks)}

    def leaky(prompts, completions, **columns):
        return [float(known.get(pair, 0.0)) for pair in zip(prompts, completions, strict=True)]

    report = run(leaky, suite, CONFIG)
    assert -report.limits.accuracy_gap > 3 * report.limits.accuracy_gap_se
    assert any("above the Bayes limit: labels leak" in flag for flag in report.flags)


def test_a_model_that_counts_letters_shows_a_length_bias_of_one_and_reads_no_prompt(suite):
    report = run(length, suite, CONFIG)
    assert report.length.spearman == pytest.approx(1.0)
    assert report.length.accuracy_longer.value == 1.0
    assert report.length.accuracy_shorter.value == 0.0
    assert report.accuracy.value == report.length.chosen_longer
    for name in ("blank", "swapped"):
        assert report.response_only[name].value == report.accuracy.value
    assert all(edit.flips == 0 and edit.shift == 0 for edit in report.robustness.values())
    assert report.probes["best word repeated"].beats_mean == 1.0
    assert report.probes["empty"].beats_mean == 0.0
    assert any("best word repeated" in flag for flag in report.flags)
    assert run(lambda p, c, **k: [-x for x in length(p, c)], suite, CONFIG).length.spearman == pytest.approx(-1.0)


def test_length_bias_is_measured_within_prompts():
    # Long answers to one prompt, short ones to the other: over all texts score falls with length, within both it rises.
    scores, lengths, prompt = (
        np.array([10.0, 20.0, 1.0, 2.0]),
        np.array([1.0, 2.0, 100.0, 200.0]),
        np.array([0, 0, 1, 1]),
    )
    assert within_prompt_spearman(scores, lengths, prompt) == pytest.approx([1.0, 1.0])
    # Equal lengths say nothing; equal scores do not go with length.
    assert within_prompt_spearman(scores, np.array([1.0, 1.0, 2.0, 1.0]), prompt) == pytest.approx([-1.0])
    assert within_prompt_spearman(np.ones(4), lengths, prompt) == [0.0, 0.0]


def test_only_a_prompt_blind_model_is_told_that_it_reads_no_prompt():
    records = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)]

    def blind(prompts, completions, **columns):
        return [float(text.startswith("good")) for text in completions]

    def reads(prompts, completions, **columns):
        same = (prompt.split()[-1:] == text.split()[-1:] for prompt, text in zip(prompts, completions, strict=True))
        return [float(text.startswith("good")) * ok for text, ok in zip(completions, same, strict=True)]

    assert any("does not read the prompt" in flag for flag in run(blind, records, CONFIG).flags)
    report = run(reads, records, CONFIG)
    assert not any("does not read the prompt" in flag for flag in report.flags)
    assert report.accuracy.value == 1.0
    assert report.response_only["swapped"].value == report.response_only["blank"].value == 0.5  # all ties


def test_columns_of_a_record_reach_the_model_and_go_along_when_prompts_are_swapped():
    records = [
        {"prompt": f"{i} + 1 = ?", "chosen": f"{i + 1}", "rejected": f"{i + 2}", "answer": i + 1} for i in range(30)
    ]

    def exact(prompts, completions, answer):
        return [float(text == str(right)) for text, right in zip(completions, answer, strict=True)]

    report = run(exact, records, CONFIG)
    assert report.accuracy.value == 1.0
    assert report.response_only["blank"].value == 1.0  # it reads the column, not the prompt
    assert report.response_only["swapped"].value < 0.6


def test_a_model_that_breaks_on_an_odd_text_is_reported_and_the_rest_is_measured():
    records = [{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"b {i}"} for i in range(9)]
    report = run(lambda p, c, **k: [float(len(text.split()[0])) for text in c], records, CONFIG)
    assert report.accuracy.value == 1.0
    assert report.probes["empty"].reason.startswith("IndexError")
    assert any("breaks on 'empty'" in flag for flag in report.flags)


def test_a_single_prompt_cannot_be_swapped():
    report = run(length, [{"prompt": "p", "chosen": "aa", "rejected": "b"}], CONFIG)
    assert report.response_only["swapped"] is None
    assert json.dumps(report.to_json(), allow_nan=False)


def batch_dependent(prompts, completions, **columns):
    """Scores against the mean of the batch, as some normalising wrappers do."""
    values = np.array([float(len(text)) for text in completions])
    return (values - values.mean()).tolist()


def order_dependent(prompts, completions, **columns):
    return [len(text) + 0.1 * place for place, text in enumerate(completions)]


def test_scores_that_depend_on_the_batch_or_the_order_are_caught(suite):
    small = suite._replace(pool=None)
    for broken, varied in ((batch_dependent, "batches of 8"), (order_dependent, "shuffled")):
        report = run(broken, small, CONFIG)
        assert report.determinism.changes[varied] > 1e-2
        assert not report.determinism.passed
        assert any("depend on more than their text" in flag for flag in report.flags)
    calls = iter(range(10**6))
    report = run(lambda p, c, **k: [len(text) + 1e-2 * next(calls) for text in c], small, CONFIG)
    assert report.determinism.changes["asked again"] > 0
    assert run(length, small, CONFIG).determinism.worst == 0.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_transformer_is_padded_on_the_left_too_and_scores_the_same(family):
    model = TransformerRewardModel.from_language_model(tiny_model(family))
    model.model.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    model.model.config.score_offset = 0.5
    records = [
        {"prompt": "what is the sky ?" * (1 + i % 3), "chosen": "blue " * (1 + i % 7), "rejected": "red"}
        for i in range(40)
    ]
    report = run(model, records, CONFIG)
    assert report.determinism.changes["left padding"] < 1e-4
    assert report.determinism.passed
    assert report.throughput.token_unit == "tokens"
    assert "EOS only" in report.probes
    # Of a plain callable nobody can ask for padding.
    assert "left padding" not in run(lambda p, c, **k: model(p, c), records, CONFIG).determinism.changes


def test_a_score_that_is_not_finite_names_its_prompt():
    with pytest.raises(ValueError, match="'why'"):
        run(lambda p, c, **k: [math.nan] * len(c), [{"prompt": "why", "chosen": "a", "rejected": "b"}], CONFIG)


def test_ties_in_the_labels_are_measured_apart_and_do_not_count_as_pairs():
    records = [{"prompt": f"p{i}", "chosen": "a" * 9, "rejected": "b"} for i in range(5)]
    records += [{"prompt": f"q{i}", "chosen": "a" * 3, "rejected": "bb", "tie": True} for i in range(4)]
    report = run(length, records, CONFIG)
    assert (report.pairs, report.ties, report.accuracy.value) == (5, 4, 1.0)
    assert report.tie_auc == 1.0  # |margin| 1 < 8, always
    with pytest.raises(ValueError, match="no tie"):
        run(length, records[5:], CONFIG)


def test_best_of_k_shares_equal_scores_and_accepts_any_of_the_best():
    records = [
        {"prompt": "p", "responses": ["aa", "bb", "c"], "ranking": [0, 1, 2]},  # two top scores, one is the best: ½
        {"prompt": "q", "responses": ["aa", "b", "c"], "ranking": [[0, 1], 2]},  # the top is one of two best: 1
        {"prompt": "r", "responses": ["a", "bbb", "c", "d"], "ranking": [0, 1, 2, 3]},  # wrong: 0
    ]
    report = run(length, records, CONFIG)
    assert report.best_of_k.accuracy.value == pytest.approx(1.5 / 3)
    assert report.best_of_k.chance == pytest.approx((1 / 3 + 2 / 3 + 1 / 4) / 3)


def test_declared_strengths_and_gold_of_a_file_are_used():
    records = [{"prompt": f"p{i}", "chosen": "a" * (i + 2), "rejected": "b", "margin": i + 1.0} for i in range(9)]
    assert run(length, records, CONFIG).margins.declared_spearman == pytest.approx(1.0)
    gold = [
        {**record, "ranking": [0, 1], "responses": [record["chosen"], "b"], "gold": [1.0, 0.0]} for record in records
    ]
    for record in gold:
        del record["chosen"], record["rejected"]
    assert run(length, gold, CONFIG).limits is None
    known = run(length, gold, BenchmarkConfig(gold_temperature=0.5, resamples=50))
    assert known.limits.bayes_accuracy == pytest.approx(1 / (1 + math.exp(-2)))
    with pytest.raises(ValueError, match="gold_temperature"):
        run(length, records, BenchmarkConfig(gold_temperature=0.5))


def test_categories_are_measured_each(suite):
    report = run("assistant-gold", suite, CONFIG)
    assert set(report.by_category) == {"fact", "harmful", "howto"}
    assert sum(rate.pairs for rate in report.by_category.values()) == report.pairs


def test_the_shipped_reward_model_is_below_the_limit_and_above_chance(suite):
    report = run("assistant-rm", suite._replace(items=suite.items[:120], pool=None), CONFIG)
    assert 0.62 < report.accuracy.value < report.limits.bayes_accuracy
    assert report.flags == ()
    assert report.determinism.worst < 1e-4


def test_the_exact_world_has_an_exact_curve():
    config = BenchmarkConfig(pool=8, responses=2, annotators=1, resamples=100)
    suite = load_suite("micro", config)
    report = run("micro-gold", suite, config)
    assert [point.kl_kind for point in report.best_of_n] == ["exact"] * 4
    world = suite.world
    for point in report.best_of_n:
        assert point.kl == pytest.approx(world.best_of_n(point.n).kl)
        assert point.gold == pytest.approx(world.best_of_n(point.n).expected_reward)
    assert abs(report.limits.accuracy_gap) < 3 * report.limits.accuracy_gap_se


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


def test_chats_go_through_every_part():
    records = [
        {"prompt": [{"role": "user", "content": f"what is {i}"}], "chosen": f"{i} it is", "rejected": "no"}
        for i in range(12)
    ]
    report = run(length, records, CONFIG)
    assert report.probes["prompt copied"].example == "what is 0"
    assert isinstance(report.response_only["blank"], Rate)


def test_swapped_prompts_are_never_their_own(suite):
    layout = lay_out(suite.items)
    texts = swapped(layout, seed=0)
    assert all(a != b for a, b in zip(texts.prompts, layout.texts.prompts, strict=True))
    partner = {}
    for own, other in zip(layout.texts.prompts, texts.prompts, strict=True):
        assert partner.setdefault(own, other) == other  # one for all of its responses


def test_the_report_is_json_and_the_page_escapes_what_it_shows(tmp_path):
    records = [{"prompt": "<p>", "chosen": "<script>" * (1 + i), "rejected": "x", "category": "a<b"} for i in range(6)]
    report = run(length, records, CONFIG, name="<b>|model")
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["scored"][0]["scores"] == [8.0, 1.0]
    assert stored["calibration"]["slope"]["value"] is None  # infinite
    write_page(tmp_path / "r.html", [report])
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;|model" in page
    assert "<b>|model" not in page
    assert "a&lt;b" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    write_page(
        tmp_path / "again.html", [run(length, records, CONFIG, name="<b>|model")._replace(throughput=report.throughput)]
    )
    assert (tmp_path / "again.html").read_text() == page


def test_plain_values_have_no_nan():
    assert plain({"a": (math.nan, math.inf), "b": [Rate(1.0, (0.0, 1.0), (0.0, math.nan), 3)]}) == {
        "a": [None, None],
        "b": [{"value": 1.0, "wilson": [0.0, 1.0], "clustered": [0.0, None], "pairs": 3}],
    }


def test_equal_file_names_are_told_apart():
    assert file_stems(["a/b", "a:b", "c"]) == ["a-b-1", "a-b-2", "c"]


def test_the_progress_ends_where_it_said_it_would(suite):
    seen = []
    run("assistant-gold", suite, CONFIG, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def cli(capsys, *arguments):
    code = main(["rm-bench", *map(str, arguments)])
    return code, capsys.readouterr()


def test_the_command_writes_a_table_a_page_and_a_json_a_model(capsys, tmp_path):
    textenv.register_reward_model("letters", length)
    lines = [json.dumps({"prompt": f"p{i}", "chosen": "aa" * i, "rejected": "b"}) for i in range(1, 9)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    code, printed = cli(
        capsys, "letters", "reward_models.benchmark.baselines:shorter", "--data", tmp_path / "d.jsonl", "--output",
        tmp_path / "out", "--compare", "--resamples", 50,
    )  # fmt: skip
    assert code == 0, printed.err
    assert "| letters | 100.0" in printed.out
    assert (tmp_path / "out" / "table.md").read_text() in printed.out
    assert json.loads((tmp_path / "out" / "letters.json").read_text())["accuracy"]["value"] == 1.0
    assert json.loads((tmp_path / "out" / "comparisons.json").read_text())[0]["difference"] == 1.0
    assert "+100.0 points of accuracy (+100.0 … +100.0); only the first right 8, only the second 0" in printed.out
    assert "Model against model" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-of-this-name"], "reward model must be"),
        ([], "one or more models"),
        (["assistant-gold", "--data", "absent.jsonl"], "absent.jsonl"),
        (["assistant-gold", "--limit", "0"], r"limit (=0)"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, arguments, message):
    code, printed = cli(capsys, *arguments)
    assert code == 2
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_real_dialogues_run_through_the_command(capsys, tmp_path):
    path = os.environ.get("TEXTENV_HH_DATA", "")
    if not Path(path).is_file():
        pytest.skip("TEXTENV_HH_DATA does not name a file of HH dialogues (JSONL, may be .gz).")
    code, printed = cli(
        capsys, "reward_models.benchmark.baselines:longer", "--data", path, "--output", tmp_path, "--skip-malformed",
        "--resamples", 200,
    )  # fmt: skip
    assert code == 0, printed.err
    report = json.loads(next(tmp_path.glob("*longer.json")).read_text())
    assert report["length"]["spearman"] == pytest.approx(1.0)
    assert report["response_only"]["swapped"]["value"] == report["accuracy"]["value"]
    assert report["limits"] is None
    assert 0.3 < report["accuracy"]["value"] < 0.7


def test_items_without_a_cluster_are_grouped_by_prompt():
    assert Item("p", ("a", "b"), (0, 1)).group == "p"
    assert Item("p", ("a", "b"), (0, 1), cluster="7").group == "7"


def flat(value):
    """Numbers of a report in JSON, by their path."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {(key, *rest): found for key, part in parts for rest, found in flat(part).items()}
    return {(): value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def test_copies_of_the_records_change_no_figure_and_narrow_no_interval():
    rng = np.random.default_rng(0)
    records = [
        {
            "prompt": f"prompt {i}",
            "responses": [f"{'word ' * int(rng.integers(1, 9))}{k}" for k in range(4)],
            "ranking": [0, 1, [2, 3]],
            "gold": rng.normal(size=4).tolist(),
            "category": "ab"[i % 2],
        }
        for i in range(12)
    ]
    config = BenchmarkConfig(gold_temperature=0.5, bins=5, resamples=200)  # five pairs an item: bins hold whole copies
    model = Callable(noise(), 2.0)
    suite = load_suite(records, config)
    pool = Pool(Texts(["p"] * 4 + ["q"] * 4, list("abcdabcd"), {"finish_reason": ["eos"] * 8}), rng.normal(size=(2, 4)))
    tripled = pool._replace(texts=pool.texts.select([*range(8)] * 3), gold=np.tile(pool.gold, (3, 1)))
    once = flat(run(model, suite._replace(pool=pool), config).to_json())
    thrice = flat(run(model, suite._replace(items=suite.items * 3, pool=tripled), config).to_json())
    counts = ("items", "pairs", "ties", "wilson", "throughput", "scored")  # as if pairs were independent, or of speed
    kept = [path for path in once if not set(path) & set(counts)]
    assert len(kept) > 100
    assert [thrice[path] for path in kept] == pytest.approx([once[path] for path in kept])


def test_calibration_is_the_one_done_by_hand_declared_or_not():
    # Three margins of 2 characters and one of −2.
    records = [{"prompt": f"p{i}", "chosen": "aaa", "rejected": "a"} for i in range(3)]
    records += [{"prompt": "p3", "chosen": "a", "rejected": "aaa"}]
    config = BenchmarkConfig(bins=1, resamples=20)
    best = -(3 * math.log(0.75) + math.log(0.25)) / 4
    # Read as log-odds of 2 log 3 (p = 0.9) where log 3 (p = ¾) would be right: twice too sure.
    sure = run(Callable(length, math.log(3)), records, config).calibration
    assert (sure.unit, sure.slope.value) == pytest.approx((math.log(3), 0.5))
    assert sure.nll == pytest.approx(-(3 * math.log(0.9) + math.log(0.1)) / 4)
    assert sure.nll_stretched == pytest.approx(best)
    assert (sure.brier, sure.ece) == pytest.approx(((3 * 0.01 + 0.81) / 4, 0.9 - 0.75))
    # Undeclared, the unit is the slope of the raw margins: 2 · unit = log 3.
    fitted = run(length, records, config).calibration
    assert (fitted.unit, fitted.slope.value) == pytest.approx((math.log(3) / 2, math.log(3) / 2))
    assert (fitted.nll, fitted.nll_stretched, fitted.ece) == pytest.approx((best, best, 0.0), abs=1e-9)
    assert fitted.brier == pytest.approx(3 / 16)
    # Wrong three times in four: no positive unit helps, and the best one knows nothing.
    wrong = run(lambda p, c, **k: [-x for x in length(p, c)], records, config).calibration
    assert (wrong.unit, wrong.nll, wrong.brier) == pytest.approx((0.0, math.log(2), 0.25))
    assert wrong.slope.value == pytest.approx(-math.log(3) / 2)


def test_margins_are_signed_and_in_deviations_within_a_prompt():
    # Margins 1, 2, 3, −4: squared deviations 2 · (¼ + 1 + 9/4 + 4) over four degrees of freedom: 15/4.
    lengths = [(2, 1), (3, 1), (4, 1), (1, 5)]
    records = [
        {"prompt": f"p{i}", "chosen": "a" * a, "rejected": "b" * b, "margin": strength}
        for i, ((a, b), strength) in enumerate(zip(lengths, (1, -2, 3, 4), strict=True))  # of the second, its size
    ]
    found = run(length, records, CONFIG).margins
    sd = math.sqrt(15 / 4)
    assert found.within_prompt_sd == pytest.approx(sd)
    # The median of −4, 1, 2, 3; the 5 % quantile 0.15 of the way from −4 to 1.
    assert found.quantiles["50 %"] == pytest.approx(1.5 / sd)
    assert found.quantiles["5 %"] == pytest.approx((-4 + 0.15 * 5) / sd)
    assert found.score_ties == 0.0
    # Ranks 2, 3, 4, 1 against 1, 2, 3, 4: 1 − 6 · (1 + 1 + 1 + 9) / (4 · 15).
    assert found.declared_spearman == pytest.approx(-0.2)


def test_length_bias_is_the_one_done_by_hand():
    lengths = [(21, 19), (30, 10), (10, 30), (10, 10)]  # 2 of 21 is less than a tenth, 2 of 19 more
    items = [Item(f"p{i}", ("a" * a, "b" * b), (0, 1), gold=(1.0, 0.0)) for i, (a, b) in enumerate(lengths)]
    # The scores: wrong, right, tied, right.
    scores = np.array([0.0, 1.0, 1.0, 0.0, 5.0, 5.0, 1.0, 0.0])
    found = length_bias(lay_out(items), scores, resamples=20, seed=0)
    assert found.chosen_longer == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    parts = found.accuracy_longer, found.accuracy_shorter, found.accuracy_matched
    assert [(part.value, part.pairs) for part in parts] == [(1.0, 1), (0.5, 1), (0.5, 2)]
    # Rank correlations of two: −1, 1, and 0 for equal scores; equal lengths do not count. Deviation 1, three prompts.
    assert (found.spearman, found.ci95) == pytest.approx((0.0, 1.959964 / math.sqrt(3)))
    assert found.gold_spearman == pytest.approx((1 + 1 - 1) / 3)


def test_without_its_prompt_a_response_keeps_how_it_ended_and_a_chat_keeps_nothing():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why ?"}]
    items = [
        Item("p", ("a", "b"), (0, 1), finish_reasons=("eos", "length"), columns={"answer": 1}),
        Item(chat, ("c", "d"), (0, 1), finish_reasons=("length", "length"), columns={"answer": 2}),
    ]
    layout = lay_out(items)
    other = swapped(layout, seed=0)
    assert (other.prompts, other.responses) == ([chat, chat, "p", "p"], ["a", "b", "c", "d"])
    assert other.columns == {"answer": [2, 2, 1, 1], "finish_reason": ["eos", "length", "length", "length"]}
    blank = blanked(layout.texts)
    assert blank.prompts == ["", "", *[[{"role": "user", "content": ""}]] * 2]
    assert blank._replace(prompts=layout.texts.prompts) == layout.texts


def test_an_edit_is_measured_as_by_hand():
    items = [Item(f"p{i}", ("a", "b"), (0, 1)) for i in range(4)]
    before = np.array([1.0, 0.0, 100.0, 100.0, 7.0, 6.0, 0.0, -1.0])  # margins 1, 0, 1, 1
    after = np.array([1.0, 2.0, 101.0, 100.0, 6.0, 6.0, 5.0, 1.0])  # margins −1, 1, 0, 4
    found = compare_scores(lay_out(items), before, after)
    assert found.flips == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert found.accuracy == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    # Mean of 0, 2, 1, 0, 1, 0, 5, 2; before, squared deviations within prompts are 3 · ½ over four degrees of freedom.
    assert found.shift == pytest.approx((11 / 8) / math.sqrt(3 / 8))


def test_responses_of_a_prompt_share_its_edit():
    layout = lay_out([Item("tell me about elephants", tuple("abcdefgh"), tuple(range(8)))])
    assert len(set(edited(layout, typo, seed=0).prompts)) == 1


def test_probes_are_held_against_the_response_ranked_best_and_the_mean():
    items = [Item("p", ("a", "b"), (0, 1)), Item("p", ("c", "d"), (0, 1)), Item("q", ("e", "f"), (0, 1))]
    # The best ranked scores 1 (the model prefers b), 5 and 5; the means are 2, 5 and 3.
    table = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 5.0, "e": 5.0, "f": 1.0, ("p", "kind"): 2.0, ("q", "kind"): 4.0}
    layout = lay_out([item._replace(finish_reasons=("length", "length")) for item in items])
    reasons = set()

    def model(prompts, texts, finish_reason):
        reasons.update(finish_reason)
        return [table.get((prompt, text), table.get(text, 0.0)) for prompt, text in zip(prompts, texts, strict=True)]

    scores = np.array([table[text] for text in layout.texts.responses])
    found = probes(layout, scores, Scorer(model), praise="kind")["praise"]
    assert found == Probe((1 + 0 + 0) / 3, (0.5 + 0 + 1) / 3, "kind")
    assert reasons == {"eos"}  # whatever ended the responses of the records


def test_the_best_word_is_the_one_of_the_best_responses_to_their_prompts():
    # Against the means 10 and 0: "high" stands on both sides of the first, "good" above both, (0.5 + 0.3)/2; "spam" is
    # counted once a response, (1 − 1.5)/2, however often it is said.
    items = [
        Item("p", ("high good", "high"), (0, 1)),
        Item("q", ("spam spam spam spam", "good", "spam", "no"), (0, 1, 2, 3)),
    ]
    assert best_word(lay_out(items), np.array([10.5, 9.5, 1.0, 0.3, -1.5, 0.2])) == "good"
    # One of 201 responses is less than a hundredth of them.
    texts = ("rare", *(f"{'fine' if i % 2 else 'dull'} {i}" for i in range(200)))
    layout = lay_out([Item("p", texts, tuple(range(201)))])
    assert best_word(layout, np.array([99.0, *(float(i % 2) for i in range(200))])) == "fine"


def test_the_largest_change_is_reported_in_deviations_within_a_prompt():
    # Deviations within a prompt √2, whatever lies between prompts; each time asked, one text gains 0.01 more.
    records = [{"prompt": "x" * (1 + i), "chosen": f"aa{i}", "rejected": f"{i}"} for i in range(9)]
    calls = iter(range(10**6))

    def drifting(prompts, completions, **columns):
        drift = 0.01 * next(calls)
        return [
            100.0 * len(prompt) + len(text) + drift * (text == "aa4")
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    found = run(drifting, records, CONFIG).determinism
    assert found.changes["asked again"] == pytest.approx(0.01 / math.sqrt(2))


def test_only_what_noise_cannot_explain_is_a_leak():
    limits = Limits(bayes_accuracy=0.7, nll_floor=0.5, accuracy_gap=-0.05, accuracy_gap_se=0.02, gold_spearman=1.0)
    assert not limits.leaks
    assert limits._replace(accuracy_gap=-0.07).leaks
    assert not limits._replace(accuracy_gap=0.07).leaks


@pytest.fixture(scope="module")
def report():
    return run(length, [{"prompt": f"p{i}", "chosen": "aa", "rejected": "b"} for i in range(4)], CONFIG)


def test_flags_are_about_models_that_know_something_and_probes_that_win(report):
    accuracy = Rate(0.6, (0.5, 0.7), (0.55, 0.65), 100)
    quiet = report._replace(probes={"praise": Probe(0.4, 0.9, "")}, response_only={"swapped": accuracy})
    assert find_flags(quiet._replace(accuracy=accuracy)) == ("as accurate with another prompt as with its own: it does "
                                                             "not read the prompt",)  # fmt: skip
    chance = Rate(0.5, (0.4, 0.6), (0.45, 0.55), 100)  # no better with its prompt either
    assert find_flags(quiet._replace(accuracy=chance, response_only={"swapped": chance})) == ()
    assert find_flags(quiet._replace(accuracy=accuracy, response_only={"swapped": chance})) == ()
    won = find_flags(
        quiet._replace(accuracy=chance, probes={"praise": Probe(0.6, 0.1, ""), "empty": Probe(0.4, 1, "")})
    )
    assert won == ("'praise' beats the preferred response on 60 % of the items",)


def test_a_row_shows_the_worst_and_the_last(report):
    points = [Point(n, 0.0, "bound", 0.0, 0.0, 0.1 * n, 0.0, 0.0, 0.0, 0.3 * n) for n in (1, 2, 4)]
    shown = report._replace(
        robustness={"typo": Robustness(0.1, 0.0, 1.0), "upper case": Robustness(0.3, 0.0, 1.0)},
        probes={"praise": Probe(0.2, 0.9, ""), "empty": Probe(0.1, 1.0, "")},
        best_of_n=points,
    )
    cells = dict(zip([column.head for column in COLUMNS], row(shown), strict=True))
    assert cells["worst flips"] == "30.0 (upper case)"
    assert cells["worst probe"] == "20.0 (praise)"
    assert cells["gold at n"] == "0.40 of 1.20"
    assert cells["other prompt"] == cells["accuracy"].split()[0] == "100.0"


def test_annotators_of_different_prompts_do_not_err_together():
    # Two answers of equal gold: a coin decides each time, and 60 prompts have not one coin.
    texts = Texts([f"p{x}" for x in range(60) for _ in range(2)], ["a", "b"] * 60, {"finish_reason": ["eos"] * 120})
    pool = Pool(texts, np.zeros((60, 2)))
    items = [_ranked(pool, x, slice(0, 2), BenchmarkConfig(), 1, category="")[0] for x in range(60)]
    assert 18 < sum(item.responses[0] == "a" for item in items) < 42  # 30 ± 3 standard errors


def test_every_ranking_of_fresh_answers_is_a_cluster_of_its_own_in_the_exact_world():
    suite = load_suite("micro", BenchmarkConfig(limit=1, responses=3, annotators=2))
    groups = {}
    for item in suite.items:
        groups.setdefault(item.group, []).append(sorted(item.responses))
    assert len(groups) > 100
    assert all(first == second for first, second in groups.values())  # both annotators saw the same answers
