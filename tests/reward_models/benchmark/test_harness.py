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
from reward_models.benchmark.bias import swapped, within_prompt_spearman
from reward_models.benchmark.layout import lay_out
from reward_models.benchmark.metrics import Rate
from reward_models.benchmark.page import write_page
from reward_models.benchmark.report import plain
from reward_models.benchmark.robustness import edit_prompt, typo
from reward_models.benchmark.scorer import Refused
from reward_models.benchmark.suites import other_phrasing
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


def test_a_transformer_is_padded_on_the_left_too_and_scores_the_same():
    model = TransformerRewardModel.from_language_model(tiny_model("llama"))
    model.model.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
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
