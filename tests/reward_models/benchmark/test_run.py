"""Models whose figures are known beforehand, and models that are broken in a known way."""

import math

import numpy as np
import pytest
import torch

from reward_models.benchmark import BenchmarkConfig, compare, load_suite, run_benchmark
from reward_models.benchmark.layout import Inputs
from reward_models.benchmark.measures.margins import signed_margins
from reward_models.benchmark.model import Refused
from reward_models.benchmark.page import write_page
from reward_models.benchmark.report import markdown_table
from reward_models.benchmark.suites import Pool, _ranked
from reward_models.evaluation import measure_scores
from reward_models.preferences import Ranking, load_rankings
from reward_models.scorers.transformer import TransformerRewardModel
from tests.conftest import tiny_model
from tests.reward_models.benchmark.models import CONFIG, Callable, length, noise
from textenv.stats import Rate
from textenv.tasks import assistant


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
    report = run_benchmark(Callable(assistant.gold_scores, 1 / assistant.ANNOTATOR_TEMPERATURE), suite, CONFIG)
    assert abs(report.limits.accuracy_gap) < 3 * report.limits.accuracy_gap_se
    assert report.calibration.declared
    slope = report.calibration.slope_per_pair
    assert abs(slope.value - 1) < 1.5 * (slope.ci95[1] - slope.value)  # 3 standard errors
    assert abs(report.calibration.nll_per_pair - report.limits.nll_floor) < 1.5 * report.calibration.nll_per_pair_ci95
    assert report.calibration.ece_per_pair < 0.05
    # A hundredth of the scores in units of a hundred times the log-odds is the same model.
    small = Callable(
        lambda *texts, **columns: [0.01 * score for score in assistant.gold_scores(*texts, **columns)],
        100 / assistant.ANNOTATOR_TEMPERATURE,
    )
    same = run_benchmark(small, suite._replace(pool=None), CONFIG)
    assert same.calibration.nll_per_pair == pytest.approx(report.calibration.nll_per_pair)
    assert same.calibration.slope_per_pair.value == pytest.approx(slope.value)
    assert report.limits.gold_spearman == pytest.approx(1.0)
    assert report.best_of_n[-1].gold_gain == pytest.approx(report.best_of_n[-1].oracle_gain)
    assert report.flags == ()
    assert isinstance(report.response_only["blank"], Refused)  # the judge knows no empty prompt
    assert "prompt must read" in report.response_only["blank"].reason
    assert report.robustness["paraphrase"].flips == 0.0  # the question is the same


def test_an_undeclared_scale_is_fitted(suite):
    report = run_benchmark("assistant-gold", suite, CONFIG)
    assert not report.calibration.declared
    # 1/τ is the true unit.
    assert report.calibration.unit == pytest.approx(1 / assistant.ANNOTATOR_TEMPERATURE, rel=0.2)
    assert report.calibration.nll_per_pair == report.calibration.nll_per_pair_rescaled


def test_a_model_of_noise_is_right_half_the_time_and_so_is_gold_on_shuffled_labels(suite):
    report = run_benchmark(noise(), suite, CONFIG)
    half_width = (report.accuracy_per_pair.clustered[1] - report.accuracy_per_pair.clustered[0]) / 2
    assert abs(report.accuracy_per_pair.value - 0.5) < 1.5 * half_width
    rng = np.random.default_rng(0)
    shuffled = []
    for item in suite.items:
        order = rng.permutation(len(item.responses))
        pick = {name: tuple(getattr(item, name)[i] for i in order) for name in ("responses", "gold", "finish_reasons")}
        shuffled.append(item._replace(**pick))
    report = run_benchmark("assistant-gold", suite._replace(items=shuffled), CONFIG)
    half_width = (report.accuracy_per_pair.clustered[1] - report.accuracy_per_pair.clustered[0]) / 2
    assert abs(report.accuracy_per_pair.value - 0.5) < 1.5 * half_width


def test_a_model_that_was_told_the_labels_is_flagged_as_a_leak():
    suite = load_suite("embedded", BenchmarkConfig(limit=160, pool=4, annotators=1))
    known = {(item.prompt, text): -rank for item in suite.items for text, rank in zip(item.responses, item.levels)}

    def leaky(prompts, completions, **columns):
        return [float(known.get(pair, 0.0)) for pair in zip(prompts, completions, strict=True)]

    report = run_benchmark(leaky, suite, CONFIG)
    assert -report.limits.accuracy_gap > 3 * report.limits.accuracy_gap_se
    assert any("above the Bayes limit: labels leak" in flag for flag in report.flags)


def test_a_model_that_breaks_on_an_odd_text_is_reported_and_the_rest_is_measured():
    records = [{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"b {i}"} for i in range(9)]
    report = run_benchmark(lambda p, c, **k: [float(len(text.split()[0])) for text in c], records, CONFIG)
    assert report.accuracy_per_pair.value == 1.0
    assert report.probes["empty"].reason.startswith("IndexError")
    assert any("breaks on 'empty'" in flag for flag in report.flags)


def test_a_score_that_is_not_finite_names_its_prompt():
    with pytest.raises(ValueError, match="'why'"):
        run_benchmark(
            lambda p, c, **k: [math.nan] * len(c), [{"prompt": "why", "chosen": "a", "rejected": "b"}], CONFIG
        )


def test_ties_in_the_labels_are_measured_apart_and_do_not_count_as_pairs():
    records = [{"prompt": f"p{i}", "chosen": "a" * 9, "rejected": "b"} for i in range(5)]
    records += [{"prompt": f"q{i}", "chosen": "a" * 3, "rejected": "bb", "tie": True} for i in range(4)]
    report = run_benchmark(length, records, CONFIG)
    assert (report.pairs, report.ties, report.accuracy_per_pair.value) == (5, 4, 1.0)
    assert report.tie_auc == 1.0  # |margin| 1 < 8, always
    with pytest.raises(ValueError, match="not a tie"):
        run_benchmark(length, records[5:], CONFIG)


def test_best_of_k_shares_equal_scores_and_accepts_any_of_the_best():
    records = [
        {"prompt": "p", "responses": ["aa", "bb", "c"], "ranking": [0, 1, 2]},  # two top scores, one is the best: ½
        {"prompt": "q", "responses": ["aa", "b", "c"], "ranking": [[0, 1], 2]},  # the top is one of two best: 1
        {"prompt": "r", "responses": ["a", "bbb", "c", "d"], "ranking": [0, 1, 2, 3]},  # wrong: 0
    ]
    report = run_benchmark(length, records, CONFIG)
    assert report.best_of_k.accuracy.value == pytest.approx(1.5 / 3)
    assert report.best_of_k.chance == pytest.approx((1 / 3 + 2 / 3 + 1 / 4) / 3)


def test_declared_strengths_and_gold_of_a_file_are_used():
    records = [{"prompt": f"p{i}", "chosen": "a" * (i + 2), "rejected": "b", "margin": i + 1.0} for i in range(9)]
    assert run_benchmark(length, records, CONFIG).margins.declared_spearman == pytest.approx(1.0)
    gold = [
        {**record, "ranking": [0, 1], "responses": [record["chosen"], "b"], "gold": [1.0, 0.0]} for record in records
    ]
    for record in gold:
        del record["chosen"], record["rejected"]
    assert run_benchmark(length, gold, CONFIG).limits is None
    known = run_benchmark(length, gold, BenchmarkConfig(gold_temperature=0.5, resamples=50))
    assert known.limits.bayes_accuracy == pytest.approx(1 / (1 + math.exp(-2)))
    with pytest.raises(ValueError, match="gold_temperature"):
        run_benchmark(length, records, BenchmarkConfig(gold_temperature=0.5))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"gold_temperature must be .*, got {temperature}"):
            BenchmarkConfig(gold_temperature=temperature)


def test_categories_are_measured_each(suite):
    report = run_benchmark("assistant-gold", suite, CONFIG)
    assert set(report.by_category) == {"fact", "harmful", "howto"}
    assert sum(rate.pairs for rate in report.by_category.values()) == report.pairs


def test_the_shipped_reward_model_is_below_the_limit_and_above_chance(suite):
    report = run_benchmark("assistant-rm", suite._replace(items=suite.items[:120], pool=None), CONFIG)
    assert 0.62 < report.accuracy_per_pair.value < report.limits.bayes_accuracy
    assert report.flags == ()
    assert report.determinism.worst < 1e-4


def test_the_exact_world_has_an_exact_curve():
    config = BenchmarkConfig(pool=8, responses=2, annotators=1, resamples=100)
    suite = load_suite("micro", config)
    report = run_benchmark("micro-gold", suite, config)
    assert [point.kl_kind for point in report.best_of_n] == ["exact"] * 4
    world = suite.world
    for point in report.best_of_n:
        assert point.kl == pytest.approx(world.best_of_n(point.n).kl)
        assert point.gold == pytest.approx(world.best_of_n(point.n).expected_reward)
    assert abs(report.limits.accuracy_gap) < 3 * report.limits.accuracy_gap_se


def test_chats_go_through_every_part():
    records = [
        {"prompt": [{"role": "user", "content": f"what is {i}"}], "chosen": f"{i} it is", "rejected": "no"}
        for i in range(12)
    ]
    report = run_benchmark(length, records, CONFIG)
    assert report.probes["prompt copied"].example == "what is 0"
    assert isinstance(report.response_only["blank"], Rate)


def test_the_progress_ends_where_it_said_it_would(suite):
    seen = []
    run_benchmark("assistant-gold", suite, CONFIG, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_items_without_a_cluster_are_grouped_by_prompt():
    assert Ranking("p", ("a", "b"), (0, 1)).group == "p"
    assert Ranking("p", ("a", "b"), (0, 1), cluster="7").group == "7"


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
    pool = Pool(
        Inputs(["p"] * 4 + ["q"] * 4, list("abcdabcd"), {"finish_reason": ["eos"] * 8}), rng.normal(size=(2, 4))
    )
    tripled = pool._replace(texts=pool.texts.select([*range(8)] * 3), gold=np.tile(pool.gold, (3, 1)))
    once = flat(run_benchmark(model, suite._replace(pool=pool), config).to_json())
    thrice = flat(run_benchmark(model, suite._replace(items=suite.items * 3, pool=tripled), config).to_json())
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
    sure = run_benchmark(Callable(length, math.log(3)), records, config).calibration
    assert (sure.unit, sure.slope_per_pair.value) == pytest.approx((math.log(3), 0.5))
    assert sure.nll_per_pair == pytest.approx(-(3 * math.log(0.9) + math.log(0.1)) / 4)
    assert sure.nll_per_pair_rescaled == pytest.approx(best)
    assert (sure.brier_per_pair, sure.ece_per_pair) == pytest.approx(((3 * 0.01 + 0.81) / 4, 0.9 - 0.75))
    # Undeclared, the unit is the slope of the raw margins: 2 · unit = log 3.
    fitted = run_benchmark(length, records, config).calibration
    assert (fitted.unit, fitted.slope_per_pair.value) == pytest.approx((math.log(3) / 2, math.log(3) / 2))
    assert (fitted.nll_per_pair, fitted.nll_per_pair_rescaled, fitted.ece_per_pair) == pytest.approx(
        (best, best, 0.0), abs=1e-9
    )
    assert fitted.brier_per_pair == pytest.approx(3 / 16)
    # Wrong three times in four: no positive unit helps, and the best one knows nothing.
    wrong = run_benchmark(lambda p, c, **k: [-x for x in length(p, c)], records, config).calibration
    assert (wrong.unit, wrong.nll_per_pair, wrong.brier_per_pair) == pytest.approx((0.0, math.log(2), 0.25))
    assert wrong.slope_per_pair.value == pytest.approx(-math.log(3) / 2)


def test_the_figures_of_an_evaluation_are_the_benchmarks_to_the_last_digit(rng):
    records = [
        {"prompt": f"p{i // 2}", "responses": [f"{'ab' * k} {i}" for k in rng.permutation(9)[:count]],
         "ranking": [*rng.permutation(count - 2).tolist(), [int(count) - 2, int(count) - 1]]}
        for i, count in enumerate(rng.integers(3, 7, 40))
    ]  # fmt: skip
    records.append({"prompt": "p0", "responses": ["a", "b", "a"], "ranking": [0, 1, 2]})  # two are equal: no pair
    unit = 0.1
    rankings = load_rankings(records)
    scores = [unit * score for ranking in rankings for score in length(ranking.responses, ranking.responses)]
    own = measure_scores(torch.tensor(scores, dtype=torch.float64), rankings)
    report = run_benchmark(Callable(length, unit), records, BenchmarkConfig(resamples=20))
    calibration = report.calibration
    assert report.accuracy_per_pair.value == own["accuracy_per_pair"]
    assert (report.pairs, report.ties) == (own["pairs"], own["ties"])
    assert calibration.nll_per_pair == pytest.approx(own["nll_per_pair"], rel=1e-14)
    assert calibration.nll_per_pair_ci95 == pytest.approx(own["nll_per_pair_ci95"], rel=1e-12)
    assert calibration.ece_per_pair == pytest.approx(own["ece_per_pair"], rel=1e-12)
    assert calibration.slope_per_pair.value == pytest.approx(own["calibration_slope_per_pair"], rel=1e-10)
    assert own["nll_per_ranking"] != pytest.approx(own["nll_per_pair"], rel=1e-3)  # another weighting, another name


def test_margins_are_signed_and_in_deviations_within_a_prompt():
    # Margins 1, 2, 3, −4: squared deviations 2 · (¼ + 1 + 9/4 + 4) over four degrees of freedom: 15/4.
    lengths = [(2, 1), (3, 1), (4, 1), (1, 5)]
    records = [
        {"prompt": f"p{i}", "chosen": "a" * a, "rejected": "b" * b, "margin": strength}
        for i, ((a, b), strength) in enumerate(zip(lengths, (1, -2, 3, 4), strict=True))  # of the second, its size
    ]
    found = run_benchmark(length, records, CONFIG).margins
    sd = math.sqrt(15 / 4)
    assert found.within_prompt_sd == pytest.approx(sd)
    # The median of −4, 1, 2, 3; the 5 % quantile 0.15 of the way from −4 to 1.
    assert found.quantiles["50 %"] == pytest.approx(1.5 / sd)
    assert found.quantiles["5 %"] == pytest.approx((-4 + 0.15 * 5) / sd)
    assert found.score_ties == 0.0
    # Ranks 2, 3, 4, 1 against 1, 2, 3, 4: 1 − 6 · (1 + 1 + 1 + 9) / (4 · 15).
    assert found.declared_spearman == pytest.approx(-0.2)


def test_annotators_of_different_prompts_do_not_err_together():
    # Two answers of equal gold: a coin decides each time, and 60 prompts have not one coin.
    texts = Inputs([f"p{x}" for x in range(60) for _ in range(2)], ["a", "b"] * 60, {"finish_reason": ["eos"] * 120})
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


def test_pairs_of_equal_texts_count_nowhere():
    records = [
        {"prompt": "p", "responses": ["aaa", "bb", "aaa", "bb", "c"], "ranking": [0, 1, 2, [3, 4]]},
        {"prompt": "q", "responses": ["bb", "bb", "a"], "ranking": [[0, 1], 2]},
    ]
    reports = [run_benchmark(model, records, CONFIG) for model in (length, lambda p, t, **k: [1.0] * len(t))]
    # Of the ten pairs of the first, two are of equal texts and one is a tie; one wrong one: bb before aaa.
    assert [report.pairs for report in reports] == [9, 9]
    assert [report.ties for report in reports] == [1, 1]  # bb and c; not bb and bb
    assert reports[0].accuracy_per_pair.value == pytest.approx(8 / 9)
    assert reports[0].margins.score_ties == 0.0
    assert len(signed_margins(reports[0])) == compare(*reports).pairs == compare(*reports).tied == 9
    # The highest score is on aaa, of which one copy was ranked best; two of five are copies of it, two of three of bb.
    assert reports[0].best_of_k.accuracy.value == 1.0
    assert reports[0].best_of_k.chance == pytest.approx((2 / 5 + 2 / 3) / 2)


def test_prompts_that_a_transformer_cuts_are_counted_said_and_shown(tmp_path, caplog):
    model = TransformerRewardModel.from_language_model(tiny_model())  # 64 positions
    long = "what is the " * 30
    records = [{"prompt": f"{long}{word}", "chosen": "blue", "rejected": "red sky"} for word in ("sky", "grass")]
    records += [*records, {"prompt": "the sky is", "chosen": "blue", "rejected": "red"}]
    cut, short = run_benchmark(model, records, CONFIG), run_benchmark(model, records[-1:], CONFIG)
    assert (cut.truncated_prompts, cut.to_json()["truncated_prompts"], short.truncated_prompts) == (2, 2, 0)
    flag = "reads 2 of 3 prompts without their left part: they are longer than its context"
    assert flag in cut.flags
    assert not any("context" in found for found in short.flags)
    assert flag in markdown_table([cut])
    assert "(≤ 64 tokens): 2 prompts cut on the left" in caplog.text
    other = run_benchmark(length, records, CONFIG)
    assert other.truncated_prompts is None
    write_page(tmp_path / "r.html", [cut, other])
    assert '<th scope="row">prompts cut on the left</th><td>2 of 3</td><td>–</td>' in (tmp_path / "r.html").read_text()


def test_a_hub_id_may_hold_a_dot_and_a_file_that_is_not_there_is_no_hub_id(monkeypatch):
    asked = []
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    monkeypatch.setattr("textenv.data.datasets._load_dataset", lambda name, *which: asked.append(name) or [record])
    assert load_suite("org/data-1.5").items == [Ranking("p", ("a", "b"))]
    assert asked == ["org/data-1.5"]
    for absent in ("runs/absent.jsonl.gz", "runs/absent.csv", "./absent-1.5", "embeded"):
        with pytest.raises(ValueError, match="data must be 'embedded'"):
            load_suite(absent)


def test_training_and_the_benchmark_read_the_same_rankings_with_everything_in_them():
    records = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, [0, 1]], "gold": [1, 2, 3], "category": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "tie": True, "margin": 2.0, "answer": 7},
    ]
    (ranking, pair) = load_rankings(records)
    assert load_suite(records).items == [ranking, pair]
    assert ranking == Ranking("p", ("c", "a", "b"), (0, 1, 1), gold=(3, 1, 2), category="x")
    assert (pair.ranks, pair.margin, pair.columns) == ((0, 0), 2.0, {"answer": 7})
    for read in (load_rankings, load_suite):
        with pytest.raises(ValueError, match="record 1: 'tie' belongs to a pair"):
            read([{**records[0], "tie": True}])
