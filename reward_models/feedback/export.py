"""What people said, as data: rankings and pairs in the package's own layouts, the raw rows, and a data card."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from reward_models.feedback.agreement import Agreement, agreement, levels_of
from reward_models.feedback.arena import bradley_terry
from reward_models.feedback.project import Annotation, Item, Project
from textenv.data.folders import replace_folder
from textenv.data.records import write_jsonl
from textenv.pages.numbers import number, percent

By = Literal["annotator", "consensus"]


def export(project: Project, output: str | Path, *, by: By = "annotator") -> dict[str, int]:
    """Write ``rankings.jsonl``, ``pairs.jsonl``, ``raw.jsonl`` and ``README.md``.

    Returns:
        How many lines each file has.

    Raises:
        ValueError: nobody has ranked anything, or the folder holds files of others.
    """
    items, annotations = project.items(), project.annotations()
    rankings = list(records(items, annotations, by))
    if not rankings:
        raise ValueError(
            f"a project must have rankings to export, got none in {str(project.path)!r}. Rank some: textenv feedback "
            "serve."
        )
    pairs = [pair for record in rankings for pair in pairs_of(record)]
    raw = project.history()
    with replace_folder(output) as folder:
        write_jsonl(folder / "rankings.jsonl", rankings)
        write_jsonl(folder / "pairs.jsonl", pairs)
        write_jsonl(folder / "raw.jsonl", raw)
        figures = agreement({item.id: item for item in items}, annotations)
        card = data_card(project, items, annotations, figures, by, len(rankings), len(pairs))
        (folder / "README.md").write_text(card, "utf-8")
    return {"rankings": len(rankings), "pairs": len(pairs), "raw": len(raw)}


def records(items: Sequence[Item], annotations: Sequence[Annotation], by: By) -> Iterator[dict[str, Any]]:
    """Rankings in the layout ``ranking``: one per annotator and item, or one per item."""
    by_item: dict[int, list[Annotation]] = {}
    for annotation in annotations:
        if annotation.action == "rank":
            by_item.setdefault(annotation.item, []).append(annotation)
    for item in items:
        own = by_item.get(item.id, [])
        if len({response.text for response in item.responses}) < 2:
            continue  # a pair of models that gave the same response: nothing to learn
        for annotation in own if by == "annotator" else []:
            yield _record(item, annotation.ranking) | {"annotator": annotation.annotator}
        if by == "consensus" and own:
            yield _record(item, consensus(own)) | {"annotators": len(own)}


def _record(item: Item, ranking: Sequence[Sequence[int]]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "prompt": item.prompt,
        "responses": [response.text for response in item.responses],
        "ranking": [list(group) if len(group) > 1 else group[0] for group in ranking],
        "models": [response.model for response in item.responses],
    }
    reasons = [response.finish_reason for response in item.responses]
    return (
        record
        | ({"finish_reasons": reasons} if all(reasons) else {})
        | ({"category": item.category} if item.category else {})
    )


def consensus(annotations: Sequence[Annotation]) -> list[list[int]]:
    """The ranking by Bradley–Terry strengths over the pairs of all annotators of an item; equal strengths are tied."""
    if len(annotations) == 1:
        return [list(group) for group in annotations[0].ranking]
    levels = [levels_of(annotation.ranking) for annotation in annotations]
    count = len(levels[0])
    outcomes = [
        (a, b, 0.5 if own[a] == own[b] else float(own[a] < own[b]))
        for own in levels
        for a, b in itertools.combinations(range(count), 2)
    ]
    strengths = [round(strength, 3) for strength in bradley_terry(count, outcomes)]
    return [
        [place for place in range(count) if strengths[place] == level] for level in sorted(set(strengths), reverse=True)
    ]


def pairs_of(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pairs of a ranking in the layout ``pair``, ties left out."""
    groups = [group if isinstance(group, list) else [group] for group in record["ranking"]]
    for better, worse in itertools.combinations(groups, 2):
        for a, b in itertools.product(better, worse):
            chosen, rejected = record["responses"][a], record["responses"][b]
            if chosen.strip() and rejected.strip() and chosen != rejected:
                rest = {key: record[key] for key in ("category", "annotator") if key in record}
                yield {"prompt": record["prompt"], "chosen": chosen, "rejected": rejected, **rest}


def data_card(
    project: Project,
    items: Sequence[Item],
    annotations: Sequence[Annotation],
    figures: Agreement,
    by: By,
    rankings: int,
    pairs: int,
) -> str:
    """What a user of the data should know, in Markdown."""
    models: dict[str, str] = {}
    for item in items:
        for response in item.responses:
            models.setdefault(response.model or "given", json.dumps(dict(response.sampling)))
    times = [annotation.created for annotation in annotations]
    begin, end = (datetime.fromtimestamp(when, UTC).date().isoformat() for when in (min(times), max(times)))
    low, high = figures.alpha.ci95
    ranked = [annotation.item for annotation in annotations if annotation.action == "rank"]
    prompts = {repr(item.prompt) for item in items if item.id in ranked}
    interval = f"± {percent(figures.first.ci95)} percentage points"
    if math.isnan(figures.first.ci95):
        interval = f"percentage points; {len(ranked)} that are all alike give no interval"
    flags = sum(len(annotation.flags) for annotation in annotations)
    lines = [
        f"# Rankings of {len(prompts)} prompts by {len(figures.annotators)} annotators",
        "",
        f"- Made between {begin} and {end} with textenv feedback.",
        f"- `rankings.jsonl`: {rankings} rankings, "
        + ("one per annotator and item." if by == "annotator" else "one per item, the consensus by Bradley–Terry."),
        f"- `pairs.jsonl`: the {pairs} pairs in them without ties.",
        "- `raw.jsonl`: every annotation ever made, with corrections, flags, scores, comments, times, order shown.",
        "- Responses of: " + "; ".join(f"`{name}` {sampling}" for name, sampling in models.items()),
        f"- Skipped: {sum(a.action == 'skip' for a in annotations)}. Flagged responses: {flags}.",
        "",
        "## Agreement",
        "",
        f"- Items with two annotators or more: {figures.overlapping}.",
        f"- Krippendorff's α over pairs: {number(figures.alpha.value)} (95 %: {number(low)} … {number(high)}).",
        f"- Kendall's W: {number(figures.kendall_w.mean)} ± {number(figures.kendall_w.ci95)}.",
        "- The response shown first is ranked best more often than by chance by "
        f"{percent(figures.first.mean)} {interval}.",
        "",
        "## Guidelines",
        "",
        project.guidelines or "None were given.",
        "",
    ]
    return "\n".join(lines)
