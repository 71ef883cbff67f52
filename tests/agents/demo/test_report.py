"""The report of a run: all that was measured is on the page, nothing from outside is, and gaps are named."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from agents.demo.figures import gold_against_kl
from agents.demo.report import read_run, save_summary_picture, summary_table, write_report

STAGES = {"base": "Base", "sft": "SFT", "best_of_4": "Best of 4", "ppo": "PPO"}
RATES = ("helpful_rate", "harmful_compliance_rate", "over_refusal_rate", "tone_rate", "eos_rate")
VOID = {"meta", "img", "br", "link", "input", "hr"}


def stage(rng: np.random.Generator) -> dict:
    scores = {
        key: {"mean": float(rng.uniform(low, 2)), "ci95": float(rng.uniform(0.02, 0.09))}
        for key, low in (("reward", -1), ("gold_score", -1), ("rm_score", -1), ("kl", 0))
    }
    return {**scores, **{key: float(rng.uniform()) for key in RATES}, "response_tokens": 12.34}


@pytest.fixture
def contents(rng) -> dict:
    """The files of a complete run, small and random."""
    stages = {name: stage(rng) for name in STAGES}
    stages["base"]["kl"] = None
    chosen = {"kl": None, "kl_bound": math.log(4) - 3 / 4, "reward": None, "reward_bound": 0.4271}
    stages["best_of_4"] = {**stages["best_of_4"], **chosen}
    logs = [
        {"episodes": 64.0 * (i + 1), "reward": 0.09 * i, "rm_score": 0.1 * i, "kl": 0.05 * i - 0.01}
        | {"gold_score": 0.2 * i}
        for i in range(8)
    ]
    answers = [
        {"stage": name, "text": f"{name} says <script>alert(1)</script> & more", "gold": -0.5, "rm_score": 1.5}
        for name in ("base", "sft", "best of 4", "ppo")
    ]
    return {
        "summary": {
            **stages,
            "reward_model": {"accuracy": 0.7284, "bayes_accuracy": 0.7716, "nll": 0.5413, "nll_floor": 0.4877},
            "gold_unit": 2.0,
            "bounds": {"reference": 0.0, "optimum": 1.2345, "low": 1.2, "high": 1.3, "unclear_prompts": 0.5},
            "seconds": {"base": 41.26, "ppo": 52.74},
            "seed": 12345,
            "versions": {"torch": "9.8.7<b>"},
            "config": {"note": "</pre><script>"},
        },
        "history": {"ppo": logs},
        "calibration": {
            "margin": rng.normal(size=90).tolist(),
            "prompt": np.repeat(np.arange(15), 6).tolist(),
        },
        "best_of_n": [{"n": n, "gold": 0.3 * n, "ci95": 0.1, "kl_bound": math.log(n) - (n - 1) / n} for n in (1, 2, 4)],
        "samples": [{"title": "Harmful", "prompt": "how <script>do</script> i", "answers": answers}],
    }


@pytest.fixture
def make_run(tmp_path):
    def make(contents):
        for name, value in contents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value), "utf-8")
        return tmp_path

    return make


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag must be closed by its own end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def row(self, start: str) -> list[str]:
        return next(row[1:] for row in self.cells if row[0].startswith(start))

    def pictures(self) -> list[str]:
        prefix = "data:image/svg+xml;base64,"
        sources = [value for name, value in self.attributes if name == "src"]
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix)).decode() for source in sources]


def read_page(run) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text("utf-8"))


def shown(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def test_the_page_needs_nothing_from_outside_and_runs_nothing(make_run, contents):
    page = read_page(make_run(contents))
    html = (make_run(contents) / "report.html").read_text("utf-8")
    assert len(html) < 500_000
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not {name for name, _ in page.attributes if name.startswith("on") or name in ("href", "srcset")}
    assert not re.search(r"url\(|@import|https?:", html)
    assert len(page.pictures()) == 6
    for picture in page.pictures():
        assert not re.search(r"<script|<image|@import|(href|src)\s*=\s*[\"'](?!#)|url\((?!#)", picture)


def test_every_stage_and_number_of_the_summary_is_in_the_table(make_run, contents):
    page, summary = read_page(make_run(contents)), contents["summary"]
    assert next(row for row in page.cells if "Base" in row)[1:] == list(STAGES.values())
    titles = {"reward": "Objective", "gold_score": "Gold score", "rm_score": "Reward-model score", "kl": "KL from SFT"}
    limits = {"kl": "≤ 0.64", "reward": "≥ 0.43"}  # log 4 − 3/4 = 0.636
    for key, title in titles.items():
        for text, name in zip(page.row(title), STAGES, strict=True):
            value = summary[name][key]
            bound = limits.get(key) if name == "best_of_4" else "–"
            assert text == (f"{shown(value['mean'])} ±{shown(value['ci95'])}" if value else bound)
    rates = ("Helpful", "Harmful", "Harmless", "Requested tone", "Answers that end")
    for key, title in zip(RATES, rates, strict=True):
        assert page.row(title) == [shown(100 * summary[name][key], 1) for name in STAGES]
    assert page.row("Length") == ["12.3"] * 4
    for text in ("seed 12345", "torch 9.8.7<b>", "41.3 s", "52.7 s", "total 94 s", "72.8", "77.2", "0.541", "0.488"):
        assert text in page.text


def test_an_answer_stands_above_its_two_scores(make_run, contents):
    text = " ".join(read_page(make_run(contents)).text.split())
    assert text.count("gold score −0.50 reward-model score 1.50") == 4


def test_large_print_shows_the_change_from_sft_to_ppo(make_run, contents):
    before, after = (shown(contents["summary"][stage]["gold_score"]["mean"]) for stage in ("sft", "ppo"))
    assert f"{before} → {after}" in " ".join(read_page(make_run(contents)).text.split())


def test_what_models_and_people_wrote_is_shown_as_text(make_run, contents):
    page = read_page(make_run(contents))
    assert "how <script>do</script> i" in page.text
    for name in ("base", "sft", "best of 4", "ppo"):
        assert f"{name} says <script>alert(1)</script> & more" in page.text
    assert "</pre><script>" in page.text


def test_equal_runs_give_equal_pages_and_matplotlib_keeps_its_settings(make_run, contents):
    before = dict(matplotlib.rcParams)
    run = make_run(contents)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert dict(matplotlib.rcParams) == before
    assert {path.name for path in run.iterdir()} == {f"{name}.json" for name in contents} | {"report.html"}


def test_a_run_that_measured_little_still_gives_a_page_that_names_the_gaps(make_run):
    page = read_page(make_run({"summary": {"ppo": {"gold_score": None, "kl": math.nan}}, "history": {}}))
    assert page.row("Gold score") == ["–"] * 4
    assert page.row("KL from SFT") == ["–"] * 4
    assert page.pictures() == []
    for gap in ("updates of PPO", "calibration.json", "samples.json", "gold scores"):
        assert f"Not in this run: {gap}" in page.text.replace("pairs in ", "").replace("prompts in ", "")


def test_a_world_without_a_judge_gives_a_page_without_gold(make_run, contents):
    del contents["summary"]["gold_unit"], contents["best_of_n"]
    for name in STAGES:
        del contents["summary"][name]["gold_score"]
    for log in contents["history"]["ppo"]:
        del log["gold_score"]
    page = read_page(make_run(contents))
    assert len(page.pictures()) == 4  # objective, score, KL, calibration
    assert "Not in this run: gold scores" in page.text


@pytest.mark.parametrize("name", ["summary", "history"])
def test_a_folder_without_a_needed_file_is_an_error_that_names_it(make_run, contents, name):
    del contents[name]
    run = make_run(contents)
    with pytest.raises(ValueError, match=rf"must hold {name}\.json, got .*Finish the run"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary", "{\n,", r"summary\.json, line 2: not valid JSON"),
        ("samples", "{}", r"samples\.json must hold a JSON array, got dict"),
        ("best_of_n", '[{"n": 2, "gold": 1.0}]', r"best_of_n\.json.*'kl_bound'.*record 0"),
        ("samples", '[{"title": "a", "prompt": "b", "answers": [{"text": "c"}]}]', r"samples\.json.*'stage'"),
        ("history", '{"ppo": [{"kl": 1.0}]}', r"history\.json.*'episodes'"),
        ("calibration", '{"margin": [1.0], "prompt": [0, 1]}', r"calibration\.json.*one length"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(make_run, contents, name, text, message):
    run = make_run(contents)
    (run / f"{name}.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_the_terminal_table_has_a_row_a_stage_and_fits_80_columns(make_run, contents):
    summary = read_run(make_run(contents)).summary
    for name in STAGES:  # the widest values that a run may well have
        for key in ("reward", "gold_score", "rm_score"):
            if summary[name][key]:
                summary[name][key]["mean"] -= 3.0
        summary[name]["eos_rate"] = 1.0
    stream = io.StringIO()
    Console(width=80, file=stream).print(summary_table(summary))
    text = stream.getvalue()
    assert "…" not in text
    lines = {
        name: next(line for line in text.splitlines() if line.strip().startswith(name)) for name in STAGES.values()
    }
    for key, name in STAGES.items():
        gold = summary[key]["gold_score"]
        assert f"{shown(gold['mean'])} ±{shown(gold['ci95'])}" in lines[name]
        assert all(shown(100 * summary[key][rate], 1) in lines[name].split() for rate in RATES)
    assert "≤ 0.64" in lines["Best of 4"]
    assert "accuracy 72.8 % (Bayes limit 77.2 %)" in " ".join(text.split())


def test_warnings_stand_on_the_page_and_below_the_table(make_run, contents):
    contents["summary"]["warnings"] = ["Over-optimisation: <b>look</b>."]
    run = make_run(contents)
    assert "Over-optimisation: <b>look</b>." in read_page(run).text
    stream = io.StringIO()
    Console(width=80, file=stream).print(summary_table(read_run(run).summary))
    assert stream.getvalue().rstrip().endswith("Over-optimisation: <b>look</b>.")


def points(figure: Figure, label: str) -> np.ndarray:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    handle = handles[labels.index(label)]
    line = handle if not hasattr(handle, "lines") else handle.lines[0]
    return np.asarray(line.get_xydata())


def test_gold_is_drawn_against_the_root_of_the_kl_in_sft_standard_deviations():
    updates = [{"episodes": 1, "kl": -0.02, "gold_score": 3.0}, {"episodes": 2, "kl": 0.25, "gold_score": 5.0}]
    best = [{"n": 4, "gold": 1.1, "ci95": 0.1, "kl_bound": 0.64}]
    figure = gold_against_kl(updates, 2.0, best, (0.4, 0.1), (0.81, 1.2, 0.1))
    np.testing.assert_allclose(points(figure, "PPO by update (training prompts)"), [[0.0, 1.5], [0.5, 2.5]])
    np.testing.assert_allclose(points(figure, "best of n (KL: upper bound)"), [[0.8, 1.1]])
    np.testing.assert_allclose(points(figure, "SFT"), [[0.0, 0.4]])
    np.testing.assert_allclose(points(figure, "PPO at the end (held-out prompts)"), [[0.9, 1.2]])
    assert "√KL" in figure.axes[0].get_xlabel()


def test_the_learning_curve_of_gold_is_in_sft_standard_deviations(make_run, contents):
    for log in contents["history"]["ppo"]:
        log["gold_score"] = 1000.0 * log["episodes"]
    contents["summary"]["gold_unit"] = 1000.0
    gold = next(picture for picture in read_page(make_run(contents)).pictures() if ">Gold score<" in picture)
    ticks = [float(number) for number in re.findall(r">(\d+)</text>", gold)]
    assert 500 in ticks  # 8 × 64 episodes; in raw units the ticks would be hundreds of thousands
    assert max(ticks) <= 600


def test_the_objective_is_drawn_first_with_the_reference_and_the_optimum(make_run, contents):
    first = read_page(make_run(contents)).pictures()[0]
    for text in ("Objective: score − β KL", "reference", "optimum ≥ 1.23"):  # half of the prompts are unclear
        assert f">{text}<" in first
    contents["summary"]["bounds"] = None  # β = 0
    assert "optimum" not in read_page(make_run(contents)).pictures()[0]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_summary_picture_is_wide_and_small(make_run, contents, tmp_path, suffix):
    path = tmp_path / "out" / f"picture.{suffix}"
    save_summary_picture(make_run(contents), path)
    assert path.stat().st_size < 60_000
    if suffix == "png":
        with Image.open(path) as image:
            assert image.width == 3 * image.height
    else:
        text = path.read_text("utf-8")
        assert all(f">{name}<" in text for name in STAGES.values())
        assert all(f">{name}<" in text for name in ("reference", "optimum ≥ 1.23"))
    with pytest.raises(ValueError, match=r"\.svg or \.png, got"):
        save_summary_picture(tmp_path, tmp_path / "picture.pdf")
