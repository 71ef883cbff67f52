"""The report of a demo run: one HTML file, a table for the terminal, a picture for a README.

A run folder holds what the demo measured. Gold scores are in standard deviations of SFT's gold score, unless said
otherwise; a measured value is a number or ``{"mean", "ci95"}``; an unknown value, null or absent, is shown as "–".

- ``summary.json`` (needed): ``layout`` (a key of ``LAYOUTS``, default "embedded"); the stages of the layout, each with
  the keys of its metrics (``best_of_4`` has ``kl_bound``, nats, and ``reward_bound`` instead of ``kl`` and
  ``reward``); ``bounds`` (the objective of the reference and of the best policy, :mod:`agents.experiments.bounds`;
  null if unknown); ``reward_model`` (``accuracy, accuracy_ci95, bayes_accuracy, nll, nll_floor``); ``gold_unit`` (that
  standard deviation); ``facts`` and ``warnings`` (sentences); ``seconds`` by step; ``seed``; ``versions``; ``config``.
- ``history.json`` (needed): ``ppo``, one log per update (``episodes, reward, rm_score, kl``, raw ``gold_score``).
- ``calibration.json``: ``margin, prompt``, one entry per held-out pair; the margin, in log-odds, is positive
  where the annotator agreed.
- ``best_of_n.json``: records of ``n, gold, ci95, kl_bound``.
- ``samples.json``: records of ``title, prompt, answers``, an answer being ``stage, text, gold, rm_score``.
"""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from agents.demo import figures
from agents.demo.figures import STAGE_COLOURS, STAGE_NAMES
from textenv.data.records import atomic_path
from textenv.pages import write_page
from textenv.pages.figures import MUTED, Picture, data_uri, reliability_diagram, save
from textenv.pages.numbers import UNKNOWN, Cell, number, percent
from textenv.stats import reliability

STEP_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#8c8c8c")


class Metric(NamedTuple):
    """One measured quantity and how it is shown."""

    name: str
    short: str
    unit: str
    """Empty for a plain number, ``%`` for a rate in [0, 1]."""
    goal: str
    """Which way is better: an arrow, or empty."""
    digits: int


METRICS = {
    "reward": Metric("Objective: score − β KL", "objec-\ntive", "", "↑", 2),
    "gold_score": Metric("Gold score", "gold\nSFT sd", "SFT sd", "↑", 2),
    "rm_score": Metric("Reward-model score", "reward\nmodel", "", "↑", 2),
    "kl": Metric("KL from SFT", "KL\nnats", "nats", "", 2),
    "helpful_rate": Metric("Helpful requests answered right", "right\n%", "%", "↑", 1),
    "harmful_compliance_rate": Metric("Harmful requests complied with", "harm\n%", "%", "↓", 1),
    "over_refusal_rate": Metric("Harmless requests refused", "over-\nref.\n%", "%", "↓", 1),
    "tone_rate": Metric("Requested tone kept", "tone\n%", "%", "↑", 1),
    "eos_rate": Metric("Answers that end by themselves", "EOS\n%", "%", "↑", 1),
    "response_tokens": Metric("Length of an answer", "tokens", "tokens", "", 1),
    "perplexity": Metric("Perplexity under SFT", "ppl", "", "", 1),
    "distinct_1": Metric("Distinct words", "dist-1\n%", "%", "", 1),
    "distinct_2": Metric("Distinct pairs of words", "dist-2\n%", "%", "", 1),
}


class Layout(NamedTuple):
    """What the pages of one kind of run show and say."""

    stages: tuple[str, ...]
    metrics: tuple[str, ...]
    findings: tuple[str, ...]
    """Metrics whose change from SFT to PPO is shown in large print."""
    score: str
    """What the score that PPO maximises is called."""
    gold: str
    """What the judge's score is called."""
    short: dict[str, str]
    """Both in the narrow table of a terminal."""
    intro: str
    results: str
    """What the gold score is."""
    samples: str
    """What to look for in the answers."""


LAYOUTS = {
    "embedded": Layout(
        stages=tuple(STAGE_NAMES),
        metrics=(
            "reward",
            "gold_score",
            "rm_score",
            "kl",
            "helpful_rate",
            "harmful_compliance_rate",
            "over_refusal_rate",
            "tone_rate",
            "eos_rate",
            "response_tokens",
        ),
        findings=("gold_score", "helpful_rate", "harmful_compliance_rate"),
        score="Reward-model score",
        gold="Gold score",
        short={},
        intro="A base model learns to answer from demonstrations (SFT), a reward model learns from rankings what "
        "people prefer, and PPO learns to write answers that the reward model likes while staying close to SFT.",
        results="The gold score is that of the true judge, which training sees only through noisy rankings: check "
        "whether it rises with the reward model's.",
        samples="Check whether the helpful answer becomes right, the harmful request is declined, and the requested "
        "tone is kept.",
    ),
    "pretrained": Layout(
        stages=("base", "sft", "ppo"),
        metrics=(
            "reward",
            "rm_score",
            "gold_score",
            "kl",
            "perplexity",
            "distinct_1",
            "distinct_2",
            "eos_rate",
            "response_tokens",
        ),
        findings=("rm_score", "gold_score", "perplexity"),
        score="Score that PPO maximises",
        gold="Judge's score",
        short={"rm_score": "score", "gold_score": "judge\nSFT sd"},
        intro="A pretrained model learns from the replies that people preferred (SFT), a reward model learns from "
        "their comparisons, and PPO learns to write replies that score high while staying close to SFT.",
        results="The judge was not trained on: check whether its score rises with the one that PPO maximises. "
        "Perplexity and distinct words show whether the language stays natural and varied.",
        samples="Prompts were picked by their place in the data, not by the answers.",
    ),
}


class DemoRun(NamedTuple):
    """The contents of a run folder; a part that was not measured is None."""

    summary: dict[str, Any]
    history: dict[str, Any]
    calibration: dict[str, Any] | None
    best_of_n: list[dict[str, Any]] | None
    samples: list[dict[str, Any]] | None

    @property
    def updates(self) -> list[dict[str, Any]]:
        """PPO's log, one entry per update."""
        return self.history.get("ppo") or []

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.summary.get("layout", "embedded")]

    def value(self, stage: str, key: str) -> tuple[float, float] | None:
        """Held-out mean of a stage and half the width of its interval (NaN if unknown)."""
        return measured((self.summary.get(stage) or {}).get(key))


def read_run(run: str | Path) -> DemoRun:
    """Read a run folder.

    Raises:
        ValueError: a needed file is missing, or a file is not the JSON it should be.
    """
    run = Path(run)
    needed = {"summary": dict, "history": dict}
    optional = {"calibration": dict, "best_of_n": list, "samples": list}
    parts: dict[str, Any] = {}
    for name, kind in {**needed, **optional}.items():
        path = run / f"{name}.json"
        if not path.is_file():
            if name in needed:
                raise ValueError(f"a run folder must hold {path.name}, got {str(run)!r} without it. Finish the run.")
            parts[name] = None
            continue
        try:
            parts[name] = json.loads(path.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Finish it again.") from None
        if not isinstance(parts[name], kind):
            what = "object" if kind is dict else "array"
            raise ValueError(f"{path} must hold a JSON {what}, got {type(parts[name]).__name__}. Finish the run again.")
    check_keys(run / "history.json", parts["history"].get("ppo") or [], ("episodes",))
    check_keys(run / "best_of_n.json", parts["best_of_n"] or [], ("n", "gold", "kl_bound"))
    check_keys(run / "samples.json", parts["samples"] or [], ("title", "prompt", "answers"))
    for sample in parts["samples"] or []:
        check_keys(run / "samples.json", sample["answers"], ("stage", "text"))
    if parts["calibration"]:
        check_keys(run / "calibration.json", [parts["calibration"]], ("margin", "prompt"))
        lengths = {key: len(parts["calibration"][key]) for key in ("margin", "prompt")}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"{run / 'calibration.json'}: columns must be of one length, got {lengths}. Finish it again."
            )
    return DemoRun(**parts)


def check_keys(path: Path, records: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """A record without a key that the report needs is an error that names file, record and key."""
    for index, record in enumerate(records):
        for key in keys:
            if key not in record:
                found = f"record {index} with {sorted(record)}"
                raise ValueError(f"{path}: every record must have {key!r}, got {found}. Finish the run again.")


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all: one file that needs no network and no scripts.

    Raises:
        ValueError: the folder is not that of a finished run; the message names the file.
    """
    data = read_run(run)
    summary, path, layout = data.summary, Path(run) / "report.html", data.layout
    write_page(
        path,
        Path(__file__).with_name("report.html.j2"),
        layout=layout,
        warnings=summary.get("warnings") or [],
        facts=[*(summary.get("facts") or []), f"seed {summary.get('seed', UNKNOWN)}"]
        + [f"{name} {version}" for name, version in (summary.get("versions") or {}).items()],
        tiles=tiles(summary, layout),
        steps=steps(summary.get("seconds") or {}),
        colours=[STAGE_COLOURS[stage] for stage in layout.stages],
        heads=[Cell(STAGE_NAMES[stage]) for stage in layout.stages],
        rows=[
            (metric_title(key, layout), [cell(summary.get(s) or {}, key) for s in layout.stages])
            for key in layout.metrics
        ],
        curves=learning_curves(data),
        calibration=calibration(data),
        frontier=frontier(data),
        samples=samples(data.samples or []),
        config=json.dumps(summary.get("config") or {}, indent=2, ensure_ascii=False),
    )
    return path


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The results for a terminal: stages as rows, metrics as columns."""
    table = Table(
        box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False, title="Held-out prompts, mean ± 95 %"
    )
    layout = LAYOUTS[summary.get("layout", "embedded")]
    table.add_column("stage", no_wrap=True)
    for key in layout.metrics:
        table.add_column(layout.short.get(key, METRICS[key].short), justify="right", no_wrap=True)
    for stage in layout.stages:
        cells = ((key, cell(summary.get(stage) or {}, key)) for key in layout.metrics)
        # One interval: with more of them the table would not fit 80 columns.
        table.add_row(
            STAGE_NAMES[stage], *(f"{c.value} {c.note}".strip() if key == "gold_score" else c.value for key, c in cells)
        )
    table.caption = "\n".join([reward_model_caption(summary.get("reward_model") or {}), *summary.get("warnings", [])])
    table.caption_justify = "left"
    return table


def save_summary_picture(run: str | Path, path: str | Path) -> None:
    """Write one wide picture (900 × 300 points; SVG or PNG by the suffix): PPO's curves and gold score by stage."""
    data, path = read_run(run), Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"a picture must be .svg or .png, got {str(path)!r}. Change the suffix.")
    gold = {stage: value for stage in STAGE_NAMES if (value := data.value(stage, "gold_score"))}
    unit, bounds = data.summary.get("gold_unit"), data.summary.get("bounds")
    figure = figures.summary_picture(data.updates, unit, gold, bounds, data.layout.gold.lower())
    with atomic_path(path) as temporary:
        save(figure, temporary, path.suffix[1:])


def measured(value: Any) -> tuple[float, float] | None:
    """Mean and half-width of a value of ``summary.json``; None when it is unknown, NaN for an unknown half-width."""
    if isinstance(value, Mapping):
        mean, ci95 = value.get("mean"), value.get("ci95")
    else:
        mean, ci95 = value, None
    if mean is None or not math.isfinite(mean):
        return None
    return float(mean), math.nan if ci95 is None else float(ci95)


def cell(stage: Mapping[str, Any], key: str) -> Cell:
    """A value with its interval, if that is known."""
    metric = METRICS[key]
    bound = stage.get(f"{key}_bound")
    if bound is not None:
        return Cell(f"{'≤' if key == 'kl' else '≥'} {number(bound)}")
    value = measured(stage.get(key))
    if value is None:
        return Cell()
    show = percent if metric.unit == "%" else number
    mean, ci95 = (show(part, metric.digits) for part in value)
    return Cell(mean, "" if ci95 == UNKNOWN else f"±{ci95}")


def reward_model_caption(reward_model: Mapping[str, Any]) -> str:
    """Accuracy and NLL of the reward model beside what no model can beat."""
    accuracy, ci95, bayes = (percent(reward_model.get(key)) for key in ("accuracy", "accuracy_ci95", "bayes_accuracy"))
    nll, floor = (number(reward_model.get(key), 3) for key in ("nll", "nll_floor"))
    interval = "" if ci95 == UNKNOWN else f" ± {ci95}"
    limit, lowest = ("", "") if bayes == UNKNOWN else (f" (Bayes limit {bayes} %)", f" (floor {floor})")
    return f"Reward model: accuracy {accuracy}{interval} %{limit}, NLL {nll} nats{lowest}."


def metric_title(key: str, layout: Layout) -> Cell:
    """The name of a metric in a layout, with its unit and its goal."""
    metric = METRICS[key]
    name = {"gold_score": layout.gold, "rm_score": layout.score}.get(key, metric.name)
    return Cell(name, f"{metric.unit} {metric.goal}".strip())


def tiles(summary: Mapping[str, Any], layout: Layout) -> list[tuple[str, str, str]]:
    """The findings as value, unit and title: what PPO changed, and how good the reward model is."""
    out = []
    for key in layout.findings:
        before, after = (cell(summary.get(stage) or {}, key).value for stage in ("sft", "ppo"))
        out.append((f"{before} → {after}", METRICS[key].unit, f"{metric_title(key, layout).value}, SFT → PPO"))
    reward_model = summary.get("reward_model") or {}
    accuracy, bayes = (percent(reward_model.get(key)) for key in ("accuracy", "bayes_accuracy"))
    if bayes == UNKNOWN:
        return [*out, (accuracy, "%", "Reward-model accuracy on held-out pairs")]
    return [*out, (f"{accuracy} of {bayes}", "%", "Reward-model accuracy, of the Bayes limit")]


def steps(seconds: Mapping[str, float]) -> dict[str, Any] | None:
    """Name, seconds and colour of every step, and the total; None if no step is known."""
    names = [STAGE_NAMES.get(name, name.replace("_", " ")) for name in seconds]
    parts = list(zip(names, seconds.values(), itertools.cycle(STEP_COLOURS)))
    return {"parts": parts, "total": number(sum(seconds.values()), 0)} if parts else None


def learning_curves(run: DemoRun) -> list[Picture]:
    """Objective, gold, score and KL against episodes; lines are what other stages reach on held-out prompts."""
    curves = [
        ("reward", "Objective: score − β KL", "objective", 1.0),
        ("rm_score", run.layout.score, "score", 1.0),
        ("kl", "KL from SFT", "nats", 1.0),
    ]
    if run.summary.get("gold_unit"):
        curves.insert(1, ("gold_score", run.layout.gold, "SFT sd", float(run.summary["gold_unit"])))
    out = []
    for key, title, unit, scale in curves:
        if not any(key in update for update in run.updates):
            continue
        bounds = run.summary.get("bounds") if key == "reward" else None
        stages = () if key == "kl" or bounds else ("sft", "best_of_4")
        levels = {stage: value[0] for stage in stages if (value := run.value(stage, key))}
        figure = figures.learning_curve(run.updates, key, title, unit=unit, scale=scale, levels=levels, bounds=bounds)
        out.append(Picture(data_uri(figure), f"{title} ({unit}) against episodes of PPO"))
    return out


def calibration(run: DemoRun) -> Picture | None:
    """Reliability diagram of the reward model; None without pairs."""
    if not run.calibration or not run.calibration["margin"]:
        return None
    bins = reliability(np.asarray(run.calibration["margin"], dtype=np.float64), np.asarray(run.calibration["prompt"]))
    caption = reward_model_caption(run.summary.get("reward_model") or {})
    return Picture(data_uri(reliability_diagram(bins, 4.6, 3.8)), "Observed against stated agreement", caption)


def frontier(run: DemoRun) -> Picture | None:
    """Gold against √KL; None without gold."""
    kl, gold = run.value("ppo", "kl"), run.value("ppo", "gold_score")
    figure = figures.gold_against_kl(
        run.updates,
        run.summary.get("gold_unit"),
        run.best_of_n or [],
        run.value("sft", "gold_score"),
        (kl[0], *gold) if kl and gold else None,
        run.layout.gold.lower(),
    )
    if not figure.axes[0].has_data():
        return None
    caption = "The KL of best-of-n is an upper bound, log n − (n − 1)/n: the true point is at or left of the square."
    title = f"{run.layout.gold} against the square root of the KL from SFT"
    return Picture(data_uri(figure), title, caption if run.best_of_n else "")


def samples(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts and their answers, with the name, colour and scores of each."""

    def shown(answer: dict[str, Any]) -> dict[str, str]:
        stage = str(answer["stage"]).lower().replace(" ", "_")
        return {
            "colour": STAGE_COLOURS.get(stage, MUTED),
            "name": STAGE_NAMES.get(stage, str(answer["stage"])),
            "text": str(answer["text"]),
            "gold": number(answer.get("gold")),
            "rm_score": number(answer.get("rm_score")),
        }

    return [record | {"answers": [shown(answer) for answer in record["answers"]]} for record in records]
