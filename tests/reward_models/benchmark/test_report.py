"""What a report says, flags and shows, and the command that writes it."""

import json
import math
import os
import re
from pathlib import Path

import pytest

import textenv
from reward_models.benchmark import measures, run_benchmark
from reward_models.benchmark.bench import file_stems
from reward_models.benchmark.measure import Column, Measure, plain
from reward_models.benchmark.measures.accuracy import Limits
from reward_models.benchmark.measures.best_of_n import Point
from reward_models.benchmark.measures.probes import Probe
from reward_models.benchmark.measures.robustness import Robustness
from reward_models.benchmark.page import write_page
from reward_models.benchmark.report import columns, find_flags, markdown_table, row
from tests.reward_models.benchmark.models import CONFIG, length
from textenv.cli import main
from textenv.stats import Rate


def found(report, **figures):
    """A report with other figures."""
    return report._replace(figures={**report.figures, **figures})


def test_the_report_is_json_and_the_page_escapes_what_it_shows(tmp_path):
    records = [{"prompt": "<p>", "chosen": "<script>" * (1 + i), "rejected": "x", "category": "a<b"} for i in range(6)]
    report = run_benchmark(length, records, CONFIG, name="<b>|model")
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["scored"][0]["scores"] == [8.0, 1.0]
    assert stored["calibration"]["slope_per_pair"]["value"] is None  # infinite
    write_page(tmp_path / "r.html", [report])
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;|model" in page
    assert "<b>|model" not in page
    assert "a&lt;b" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    write_page(
        tmp_path / "again.html",
        [found(run_benchmark(length, records, CONFIG, name="<b>|model"), throughput=report.throughput)],
    )
    assert (tmp_path / "again.html").read_text() == page


def test_plain_values_have_no_nan():
    assert plain({"a": (math.nan, math.inf), "b": [Rate(1.0, (0.0, 1.0), (0.0, math.nan), 3)]}) == {
        "a": [None, None],
        "b": [{"value": 1.0, "wilson": [0.0, 1.0], "clustered": [0.0, None], "pairs": 3}],
    }


def test_equal_file_names_are_told_apart():
    assert file_stems(["a/b", "a:b", "c"]) == ["a-b-1", "a-b-2", "c"]


def test_only_what_noise_cannot_explain_is_a_leak():
    limits = Limits(
        bayes_accuracy=0.7,
        nll_floor=0.5,
        accuracy_gap=-0.05,
        accuracy_gap_ci95=0.04,
        accuracy_gap_se=0.02,
        gold_spearman=1.0,
    )
    assert not limits.leaks
    assert limits._replace(accuracy_gap=-0.07).leaks
    assert not limits._replace(accuracy_gap=0.07).leaks


@pytest.fixture(scope="module")
def report():
    return run_benchmark(length, [{"prompt": f"p{i}", "chosen": "aa", "rejected": "b"} for i in range(4)], CONFIG)


def test_flags_are_about_models_that_know_something_and_probes_that_win(report):
    accuracy = Rate(0.6, (0.5, 0.7), (0.55, 0.65), 100)
    quiet = found(report, probes={"praise": Probe(0.4, 0.9, "")}, response_only={"swapped": accuracy})
    assert find_flags(found(quiet, accuracy_per_pair=accuracy)) == (
        "as accurate with another prompt as with its own: it does not read the prompt",
    )
    chance = Rate(0.5, (0.4, 0.6), (0.45, 0.55), 100)  # no better with its prompt either
    assert find_flags(found(quiet, accuracy_per_pair=chance, response_only={"swapped": chance})) == ()
    assert find_flags(found(quiet, accuracy_per_pair=accuracy, response_only={"swapped": chance})) == ()
    won = find_flags(
        found(quiet, accuracy_per_pair=chance, probes={"praise": Probe(0.6, 0.1, ""), "empty": Probe(0.4, 1, "")})
    )
    assert won == ("'praise' beats the preferred response on 60 % of the items",)
    even = found(quiet, accuracy_per_pair=chance, probes={"praise": Probe(0.5, 0.1, "")})
    assert find_flags(even) == ()
    assert find_flags(even._replace(truncated_prompts=0)) == ()
    assert find_flags(even._replace(truncated_prompts=1)) == (
        "reads 1 of 4 prompts without their left part: they are longer than its context",
    )


def test_a_row_shows_the_worst_and_the_last(report):
    points = [Point(n, 0.0, "bound", 0.0, 0.0, 0.1 * n, 0.0, 0.0, 0.0, 0.3 * n) for n in (1, 2, 4)]
    shown = found(
        report,
        robustness={"typo": Robustness(0.1, 0.0, 1.0), "upper case": Robustness(0.3, 0.0, 1.0)},
        probes={"praise": Probe(0.2, 0.9, ""), "empty": Probe(0.1, 1.0, "")},
        best_of_n=points,
    )
    cells = dict(zip([column.head for column in columns()], row(shown), strict=True))
    assert cells["worst flips"] == "30.0 (upper case)"
    assert cells["worst probe"] == "20.0 (praise)"
    assert cells["gold at n"] == "0.40 of 1.20"
    assert cells["other prompt"] == cells["accuracy"].split()[0] == "100.0"


def test_a_measure_is_one_object_that_reaches_json_table_flags_and_page(monkeypatch, tmp_path):
    shouting = Measure(
        lambda run: {"shouting": sum(map(str.isupper, run.layout.texts.responses))},
        texts=lambda suite, layout: 1000,
        columns=(Column("shouts", "texts", "responses in capitals", lambda report: f"{report.shouting} loud"),),
        flags=lambda report: ["shouts are in the data"] * (report.shouting > 0),
        title="Does it shout?",
        rows=lambda report: {"shouted responses": str(report.shouting), "unknown": None},
    )
    monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, shouting))
    records = [{"prompt": f"p{i}", "chosen": f"A{i}", "rejected": "b"} for i in range(3)]
    expected = set()
    report = run_benchmark(length, records, CONFIG, on_progress=lambda done, total: expected.add(total))
    assert report.to_json()["shouting"] == report.shouting == 3
    assert min(expected) > 1000
    assert report.flags[-1] == "shouts are in the data"
    assert "| shouts, texts |" in markdown_table([report])
    assert row(report)[-1] == "3 loud"
    write_page(tmp_path / "r.html", [report])
    page = (tmp_path / "r.html").read_text()
    assert "<h2>Does it shout?</h2>" in page
    assert '<th scope="row">shouted responses</th><td>3</td>' in page
    assert '<th scope="row">unknown' not in page
    with pytest.raises(AttributeError, match="shouting, got 'whispering'"):
        _ = report.whispering


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
    assert re.search(r"^model +letters *$", printed.out, re.MULTILINE)
    assert len(re.findall(r"^accuracy, % +(?:100\.0|0\.0) ", printed.out, re.MULTILINE)) == 2
    table = [line for line in printed.out.splitlines() if not line.startswith(("letters", "reward_models"))]
    assert max(map(len, table)) <= 80
    assert "| letters | 100.0" in (tmp_path / "out" / "table.md").read_text()
    assert json.loads((tmp_path / "out" / "letters.json").read_text())["accuracy_per_pair"]["value"] == 1.0
    assert json.loads((tmp_path / "out" / "comparisons.json").read_text())[0]["difference"] == 1.0
    assert "+100.0 points of accuracy (+100.0 … +100.0); only the first right 8, only the second 0, tied" in printed.out
    assert "tied for a model 0; McNemar p" in printed.out
    assert "Model against model" in (tmp_path / "out" / "report.html").read_text()
    flags = ["--data", tmp_path / "d.jsonl", "--output", tmp_path / "out", "--resamples", 50, "--json"]
    assert [report["model"] for report in json.loads(cli(capsys, "letters", *flags)[1].out)] == ["letters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-of-this-name"], "reward model must be"),
        ([], "one or more models"),
        (["assistant-gold", "--data", "absent.jsonl"], "absent.jsonl"),
        (["assistant-gold", "--limit", "0"], "limit must be 1 or more, got 0"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(capsys, arguments, message):
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
    assert report["response_only"]["swapped"]["value"] == report["accuracy_per_pair"]["value"]
    assert report["limits"] is None
    assert 0.3 < report["accuracy_per_pair"]["value"] < 0.7
