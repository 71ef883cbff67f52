"""The report of a run of the pipeline: one HTML file, a table for the terminal, a picture for a README.

A run folder holds what the pipeline measured. Gold scores are in standard deviations of SFT's gold score, unless said
otherwise; a measured value is a number or ``{"mean", "ci95"}``; what is unknown may be null or absent, shown as "–".

- ``summary.json`` (needed): ``base``, ``sft``, ``best_of_4``, ``ppo``, each with the keys of ``METRICS`` (``best_of_4``
  has ``kl_bound``, nats, instead of ``kl``); ``reward_model`` (``accuracy, accuracy_ci95, bayes_accuracy, nll,
  nll_floor``); ``gold_unit`` (that standard deviation); ``seconds`` by step; ``seed``; ``versions``; ``config``.
- ``history.json`` (needed): ``ppo``, one log an update (``episodes, rm_score, kl``, raw ``gold_score``).
- ``calibration.json``: ``margin, prompt``, one entry per held-out pair; the margin, in log-odds, is positive
  where the annotator agreed.
- ``best_of_n.json``: records of ``n, gold, ci95, kl_bound``.
- ``samples.json``: records of ``title, prompt, answers``, an answer being ``stage, text, gold, rm_score``.
"""

import base64
import io
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from agents.demo import figures
from agents.demo.figures import STAGE_COLOURS, STAGE_NAMES
from agents.demo.report_page import PAGE, STYLE
from textenv.data.records import atomic_path
from textenv.stats import reliability

UNKNOWN = "–"


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
    "gold_score": Metric("Gold score", "gold\nSFT sd", "SFT sd", "↑", 2),
    "rm_score": Metric("Reward-model score", "reward\nmodel", "", "↑", 2),
    "kl": Metric("KL from SFT", "KL\nnats", "nats", "", 2),
    "helpful_rate": Metric("Helpful requests answered right", "right\n%", "%", "↑", 1),
    "harmful_compliance_rate": Metric("Harmful requests complied with", "harm\n%", "%", "↓", 1),
    "over_refusal_rate": Metric("Harmless requests refused", "over-\nref.\n%", "%", "↓", 1),
    "tone_rate": Metric("Requested tone kept", "tone\n%", "%", "↑", 1),
    "eos_rate": Metric("Answers that end by themselves", "EOS\n%", "%", "↑", 1),
    "response_tokens": Metric("Length of an answer", "tokens", "tokens", "", 1),
}

SCORES = ("gold_score", "rm_score", "kl")


class Run(NamedTuple):
    """What a run folder says; a part that the run did not measure is None."""

    summary: dict[str, Any]
    history: dict[str, Any]
    calibration: dict[str, Any] | None
    best_of_n: list[dict[str, Any]] | None
    samples: list[dict[str, Any]] | None

    @property
    def updates(self) -> list[dict[str, Any]]:
        """PPO's log, one entry an update."""
        return self.history.get("ppo") or []

    def value(self, stage: str, key: str) -> tuple[float, float] | None:
        """Held-out mean of a stage and half the width of its interval (NaN if unknown)."""
        return measured((self.summary.get(stage) or {}).get(key))


def read_run(run: str | Path) -> Run:
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
                raise ValueError(f"a run folder must hold {path.name}, with run (={str(run)!r}). Finish the run first.")
            parts[name] = None
            continue
        try:
            parts[name] = json.loads(path.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
        if not isinstance(parts[name], kind):
            raise ValueError(f"{path}: must be a JSON {'object' if kind is dict else 'array'}.")
    check_keys(run / "history.json", parts["history"].get("ppo") or [], ("episodes",))
    check_keys(run / "best_of_n.json", parts["best_of_n"] or [], ("n", "gold", "kl_bound"))
    check_keys(run / "samples.json", parts["samples"] or [], ("title", "prompt", "answers"))
    for sample in parts["samples"] or []:
        check_keys(run / "samples.json", sample["answers"], ("stage", "text"))
    if parts["calibration"]:
        check_keys(run / "calibration.json", [parts["calibration"]], ("margin", "prompt"))
        lengths = {key: len(parts["calibration"][key]) for key in ("margin", "prompt")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{run / 'calibration.json'}: columns must be of one length, with lengths (={lengths}).")
    return Run(**parts)


def check_keys(path: Path, records: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """A record without a key that the report needs is an error that names file, record and key."""
    for index, record in enumerate(records):
        for key in keys:
            if key not in record:
                raise ValueError(f"{path}: every record must have {key!r}, with record {index} (={sorted(record)}).")


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all: one file that needs no network and no scripts.

    Raises:
        ValueError: the folder is not that of a finished run; the message names the file.
    """
    data = read_run(run)
    page = PAGE.substitute(
        style=STYLE,
        facts=" · ".join(escape(fact) for fact in facts(data.summary)),
        tiles=tiles(data),
        seconds=seconds_bar(data.summary.get("seconds") or {}),
        table=result_table(data.summary),
        curves=learning_curves(data),
        calibration=calibration_card(data),
        frontier=frontier_card(data),
        samples=sample_cards(data.samples or []),
        config=escape(json.dumps(data.summary.get("config") or {}, indent=2, ensure_ascii=False)),
    )
    path = Path(run) / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")
    return path


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The results for a terminal: stages as rows, metrics as columns, scores with 95 % intervals."""
    table = Table(
        box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False, title="Held-out prompts, mean ± 95 %"
    )
    table.add_column("stage", no_wrap=True)
    for metric in METRICS.values():
        table.add_column(metric.short, justify="right", no_wrap=True)
    for stage, name in STAGE_NAMES.items():
        cells = ((key, *cell(summary.get(stage) or {}, key)) for key in METRICS)
        # Intervals of the scores alone: with those of the rates the table would not fit 80 columns.
        table.add_row(name, *(f"{value} ±{i}" if i and key in SCORES else value for key, value, i in cells))
    table.caption = reward_model_caption(summary.get("reward_model") or {})
    table.caption_justify = "left"
    return table


def figure_summary_picture(run: str | Path, path: str | Path) -> None:
    """Write one wide picture (900 × 300 points; SVG or PNG by the suffix): PPO's curves and gold score by stage."""
    data, path = read_run(run), Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"a picture must be .svg or .png, with path (={str(path)!r}). Change the suffix.")
    gold = {stage: value for stage in STAGE_NAMES if (value := data.value(stage, "gold_score"))}
    figure = figures.summary_picture(data.updates, data.summary.get("gold_unit"), gold)
    with atomic_path(path) as temporary:
        figures.save(figure, temporary, path.suffix[1:])


# Numbers


def measured(value: Any) -> tuple[float, float] | None:
    """Mean and half-width of a value of ``summary.json``; None when it is unknown, NaN for an unknown half-width."""
    if isinstance(value, Mapping):
        mean, ci95 = value.get("mean"), value.get("ci95")
    else:
        mean, ci95 = value, None
    if mean is None or not math.isfinite(mean):
        return None
    return float(mean), math.nan if ci95 is None else float(ci95)


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Fixed digits, a true minus sign; a rate as percent; "–" for unknown."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{100 * value if unit == '%' else value:z.{digits}f}".replace("-", "−")


def cell(stage: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Text of a value and of its interval (empty if unknown)."""
    metric = METRICS[key]
    if key == "kl" and stage.get("kl_bound") is not None:
        return f"≤ {number(stage['kl_bound'])}", ""
    value = measured(stage.get(key))
    if value is None:
        return UNKNOWN, ""
    mean, ci95 = value
    interval = "" if math.isnan(ci95) else number(ci95, metric.digits, metric.unit)
    return number(mean, metric.digits, metric.unit), interval


def reward_model_caption(reward_model: Mapping[str, Any]) -> str:
    """Accuracy and NLL of the reward model beside what no model can beat."""
    accuracy = number(reward_model.get("accuracy"), 1, "%")
    interval = number(reward_model.get("accuracy_ci95"), 1, "%")
    bayes = number(reward_model.get("bayes_accuracy"), 1, "%")
    nll, floor = (number(reward_model.get(key), 3) for key in ("nll", "nll_floor"))
    spread = "" if interval == UNKNOWN else f" ± {interval}"
    return f"Reward model: accuracy {accuracy}{spread} % (Bayes limit {bayes} %), NLL {nll} nats (floor {floor})."


def facts(summary: Mapping[str, Any]) -> list[str]:
    """What the run was."""
    out = [f"seed {summary.get('seed', UNKNOWN)}"]
    return out + [f"{name} {version}" for name, version in (summary.get("versions") or {}).items()]


# Parts of the page


def tiles(run: Run) -> str:
    """The findings, a number each: what PPO changed, compared with SFT."""
    out = []
    for key in ("gold_score", "helpful_rate", "harmful_compliance_rate"):
        metric = METRICS[key]
        before, after = (cell(run.summary.get(stage) or {}, key)[0] for stage in ("sft", "ppo"))
        unit = f" <small>{metric.unit}</small>"
        out.append(f"<div><b>{before} → {after}{unit}</b><span>{metric.name}, SFT → PPO</span></div>")
    reward_model = run.summary.get("reward_model") or {}
    accuracy, bayes = (number(reward_model.get(key), 1, "%") for key in ("accuracy", "bayes_accuracy"))
    limits = f"{accuracy} <small>of</small> {bayes} <small>%</small>"
    out.append(f"<div><b>{limits}</b><span>Reward-model accuracy, of the Bayes limit</span></div>")
    return "".join(out)


def seconds_bar(seconds: Mapping[str, float]) -> str:
    """How long each step took, as one bar with a legend."""
    steps = {name: value for name, value in seconds.items() if name != "total"}
    if not steps:
        return ""
    colours = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#8c8c8c")
    parts, legend = "", ""
    for index, (name, value) in enumerate(steps.items()):
        colour, label = colours[index % len(colours)], escape(STAGE_NAMES.get(name, name.replace("_", " ")))
        parts += f'<i style="flex-grow:{value:.3f};background:{colour}"></i>'
        legend += f'<span><i style="background:{colour}"></i>{label} {number(value, 1)} s</span>'
    total = number(seconds.get("total", sum(steps.values())), 0)
    return f'<div class="bar" role="img" aria-label="seconds by step">{parts}</div><p class="legend">{legend}' + (
        f"<span><b>total {total} s</b></span></p>"
    )


def result_table(summary: Mapping[str, Any]) -> str:
    """Metrics as rows and stages as columns, which fits a phone."""
    head = "".join(
        f'<th scope="col"><i style="background:{STAGE_COLOURS[stage]}"></i>{name}</th>'
        for stage, name in STAGE_NAMES.items()
    )
    rows = ""
    for key, metric in METRICS.items():
        cells = (cell(summary.get(stage) or {}, key) for stage in STAGE_NAMES)
        values = "".join(f"<td>{v}{f' <small>±{i}</small>' if i else ''}</td>" for v, i in cells)
        about = " ".join(part for part in (metric.unit, metric.goal) if part)
        rows += f'<tr><th scope="row">{metric.name} <small>{about}</small></th>{values}</tr>'
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def learning_curves(run: Run) -> str:
    """Score, gold and KL against episodes; dashes are what other stages reach on held-out prompts."""
    curves = [("rm_score", "Reward-model score", "score", 1.0), ("kl", "KL from SFT", "nats", 1.0)]
    if run.summary.get("gold_unit"):
        curves.insert(1, ("gold_score", "Gold score", "SFT sd", float(run.summary["gold_unit"])))
    out = ""
    for key, title, unit, scale in curves:
        if not any(key in update for update in run.updates):
            continue
        stages = ("sft", "best_of_4") if key != "kl" else ()
        levels = {stage: value[0] for stage in stages if (value := run.value(stage, key))}
        out += picture(
            figures.learning_curve(run.updates, key, title, unit=unit, scale=scale, levels=levels),
            f"{title} ({unit}) against episodes of PPO",
        )
    return out or missing("updates of PPO in history.json")


def calibration_card(run: Run) -> str:
    """Reliability diagram with its caption."""
    if not run.calibration or not run.calibration["margin"]:
        return missing("pairs in calibration.json")
    bins = reliability(np.asarray(run.calibration["margin"], dtype=np.float64), np.asarray(run.calibration["prompt"]))
    caption = reward_model_caption(run.summary.get("reward_model") or {})
    return picture(figures.calibration(bins), "Observed against predicted agreement", caption)


def frontier_card(run: Run) -> str:
    """Gold against √KL."""
    kl, gold = run.value("ppo", "kl"), run.value("ppo", "gold_score")
    figure = figures.gold_against_kl(
        run.updates,
        run.summary.get("gold_unit"),
        run.best_of_n or [],
        run.value("sft", "gold_score"),
        (kl[0], *gold) if kl and gold else None,
    )
    if not figure.axes[0].has_data():
        return missing("gold scores")
    caption = "The KL of best-of-n is an upper bound, log n − (n − 1)/n: its true place is at or left of the square."
    return picture(figure, "Gold score against the square root of the KL from SFT", caption)


def sample_cards(samples: list[dict[str, Any]]) -> str:
    """The same prompt answered by every stage."""
    out = ""
    for sample in samples:
        answers = ""
        for answer in sample["answers"]:
            stage = str(answer["stage"]).lower().replace(" ", "_")
            colour, name = STAGE_COLOURS.get(stage, figures.MUTED), STAGE_NAMES.get(stage, str(answer["stage"]))
            text = escape(str(answer["text"])) or "<i>empty answer</i>"
            answers += (
                f'<div class="answer" style="border-color:{colour}"><h4>{escape(name)}</h4><p>{text}</p>'
                f"<small><span>gold <b>{number(answer.get('gold'))}</b></span> "
                f"<span>reward model <b>{number(answer.get('rm_score'))}</b></span></small></div>"
            )
        title, prompt = escape(str(sample["title"])), escape(str(sample["prompt"]))
        out += f'<article><h3>{title}</h3><p class="prompt">{prompt}</p><div class="answers">{answers}</div></article>'
    return out or missing("prompts in samples.json")


def picture(figure: Figure, description: str, caption: str = "") -> str:
    """A figure of the page: an SVG inside the file, on white paper in light and dark."""
    stream = io.BytesIO()
    figures.save(figure, stream, "svg")
    source = base64.b64encode(stream.getvalue()).decode()
    image = f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{source}">'
    return f"<figure>{image}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"


def missing(what: str) -> str:
    """Said in place of a part that cannot be shown."""
    return f'<p class="missing">Not in this run: {escape(what)}.</p>'
