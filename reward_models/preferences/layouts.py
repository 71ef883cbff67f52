"""The layouts in which preferences are published: one row of a table each, recognised by its keys or named."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reward_models.preferences import readers
from reward_models.preferences.readers import COMMON, SCALES, listed

OWN = ("prompt", "responses", "ranking", "scores", "chosen", "rejected", "tie", *COMMON)
"""All fields of the project's own layouts."""


class Layout(NamedTuple):
    """One row of the table."""

    name: str
    keys: tuple[str, ...]
    """By which it is recognised; a key whose value is None is absent."""
    prompt: str
    """What becomes the prompt, and so on."""
    responses: str
    ranks: str
    read: Callable[[Any, str], Mapping[str, Any]]
    """``(record, option) → common fields``."""
    source: str
    margin: str = ""
    category: str = ""
    option: str = ""
    """What may stand after the name and a colon."""
    also: tuple[str, ...] = ()
    """Optional keys that it reads. All others reach the reward model by their own names."""
    structures: tuple[str, ...] = ()
    """Keys that hold lists or objects, which a table may hold as JSON text."""
    grouped: bool = False
    """``read`` takes the rows of one prompt, one response each."""


def named_layout(format: str) -> tuple[Layout, str]:
    """``(layout, option)`` of ``"name"`` or ``"name:option"``."""
    name, _, option = format.partition(":")
    layout = next((layout for layout in LAYOUTS if layout.name == name), None)
    if layout is None:
        raise ValueError(f"format must be one of {', '.join(row.name for row in LAYOUTS)}, got {format!r}. Choose one.")
    if option and not layout.option:
        raise ValueError(f"format {name!r} must stand alone, got {format!r}. It has no options.")
    return layout, option


def layout_of(record: Mapping[str, Any], format: str | None = None) -> tuple[Layout, str]:
    """The layout that ``format`` names or the keys of a record show, and its option.

    Raises:
        ValueError: keys are missing (names the nearest layouts), or two layouts fit.
    """
    present = {key for key, value in record.items() if value is not None}
    if format is not None:
        layout, option = named_layout(format)
        if missing := [key for key in layout.keys if key not in present]:
            if null := [key for key in missing if key in record]:
                rule = f"a preference of format {layout.name!r} must have values, got null for {listed(null)}"
                raise ValueError(f"{rule}. Give them, or drop the record.")
            raise ValueError(
                f"a preference of format {layout.name!r} must have {listed(layout.keys)}, got none of "
                f"{listed(missing)} in {sorted(present)}. Rename the columns, or name another format."
            )
        return layout, option
    fitting = [layout for layout in LAYOUTS if present.issuperset(layout.keys)]
    # of two that fit, the one that reads all keys of the other and more is the more exact
    exact = [a for a in fitting if not any(set(a.keys) < {*b.keys, *b.also} for b in fitting if b is not a)]
    if len(exact) > 1:
        raise ValueError(
            f"a preference must have the keys of one layout, got those of {' and '.join(a.name for a in exact)}. Name "
            "the one that counts as format."
        )
    if exact:
        return exact[0], ""

    def lacking(layout: Layout) -> list[str]:
        return [key for key in layout.keys if key not in present]

    near = sorted(
        (layout for layout in LAYOUTS if len(lacking(layout)) < len(layout.keys)),
        key=lambda layout: (len(lacking(layout)) / len(layout.keys), len(layout.keys)),
    )
    if near and all(key in record for key in lacking(near[0])):
        rule = f"a preference must have values, got null for {listed(lacking(near[0]))}"
        raise ValueError(f"{rule}. Give them, or drop the record.")
    nearest = "; ".join(f"{layout.name} (without {listed(lacking(layout))})" for layout in near[:3])
    raise ValueError(
        f"a preference must have the keys of a layout, got {sorted(present)}. "
        + (f"Nearest: {nearest}. Rename the columns." if near else "Read textenv reward --help for the layouts.")
    )


def layout_table() -> str:
    """The table in Markdown, as the docs and ``textenv reward --help`` print it."""
    lines = ["| format | keys | prompt | responses | ranks | margin | category | from |", "|" + "---|" * 8]
    for row in LAYOUTS:
        name = f"`{row.name}`" + (f"; `{row.name}:…`: {row.option}" if row.option else "")
        keys = ", ".join(f"`{key}`" for key in row.keys)
        cells = (name, keys, row.prompt, row.responses, row.ranks, row.margin, row.category, row.source)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layout_list() -> str:
    """The table as plain text, a paragraph a layout."""
    return "\n\n".join(
        f"{row.name}: {', '.join(row.keys)}. "
        + "".join(
            f"{name}: {getattr(row, name)}. "
            for name in ("prompt", "responses", "ranks", "margin", "category")
            if getattr(row, name)
        )
        + (f"{row.name}:…: {row.option}. " if row.option else "")
        + f"From: {row.source}."
        for row in LAYOUTS
    )


_TEXTS = "chosen, rejected: a text, a message, a chat or a list of texts"
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "ranking", ("prompt", "responses", "ranking"), "prompt", "responses",
        "ranking: indices, best first, ties as a list: [[0, 2], 1]", readers.ranking, "this project",
        "margin", "category",
        also=("tie", *COMMON),
        structures=("responses", "ranking", "gold", "finish_reasons"),
    ),
    Layout(
        "scored", ("prompt", "responses", "scores"), "prompt", "responses", "by scores, higher is better",
        readers.scored, "this project", "margin", "category", also=COMMON,
        structures=("responses", "scores", "gold", "finish_reasons"),
    ),
    Layout(
        "pair", ("prompt", "chosen", "rejected"), "prompt", _TEXTS, "chosen before rejected; equal with tie: true",
        readers.chosen_rejected, "TRL; this project", "margin", "category", also=("tie", *COMMON),
        structures=("gold", "finish_reasons"),
    ),
    Layout(
        "dialogues", ("chosen", "rejected"), "their longest common start before an assistant turn",
        "all that follows, one or several turns", "chosen before rejected; equal with tie: true", readers.dialogues,
        "HH-RLHF (Bai et al. 2022)", "margin", "category", also=("tie", *COMMON),
        structures=("gold", "finish_reasons"),
    ),
    Layout(
        "rewardbench", ("prompt", "chosen", "rejected", "subset"), "prompt", "chosen, rejected",
        "chosen before rejected", readers.benchmarked, "RewardBench (Lambert et al. 2024)", category="subset",
    ),
    Layout(
        "rewardbench2", ("prompt", "chosen", "rejected", "num_correct", "subset"), "prompt", "chosen, rejected: lists",
        "all chosen equal, before all rejected", readers.benchmarked, "RewardBench 2 (Malik et al. 2025)",
        category="subset", also=("tie",),
        structures=("chosen", "rejected"),
    ),
    Layout(
        "helpsteer2", ("prompt", "response", *SCALES), "prompt", "response of each row of the prompt",
        "by helpfulness, or by the option", readers.helpsteer2, "HelpSteer2 (Wang et al. 2024)",
        option="a scale or weighted scales, like `helpfulness+0.5*correctness-0.2*verbosity`", grouped=True,
    ),
    Layout(
        "helpsteer3", ("context", "response1", "response2", "overall_preference"), "context (messages)",
        "response1, response2", "overall_preference: below 0 the first is better, 0 a tie", readers.helpsteer3,
        "HelpSteer3 (Wang et al. 2025)", "its size, 1 to 3", "domain", also=("domain",),
        structures=("context",),
    ),
    Layout(
        "ultrafeedback", ("instruction", "completions"), "instruction", "completions[].response", "by overall_score",
        readers.ultrafeedback, "UltraFeedback (Cui et al. 2023)",
        structures=("completions",),
    ),
    Layout(
        "ultrafeedback-scores", ("chosen", "rejected", "score_chosen", "score_rejected"), "prompt, or as in dialogues",
        _TEXTS, "chosen before rejected; equal where the scores are",
        readers.rated_pair("score_chosen", "score_rejected"), "ultrafeedback_binarized", also=("prompt", "tie"),
    ),
    Layout(
        "ultrafeedback-ratings", ("chosen", "rejected", "chosen-rating", "rejected-rating"),
        "prompt, or as in dialogues", _TEXTS, "chosen before rejected; equal where the ratings are",
        readers.rated_pair("chosen-rating", "rejected-rating"), "ultrafeedback-binarized-preferences",
        also=("prompt", "tie"),
    ),
    Layout(
        "nectar", ("prompt", "answers"), "prompt", "answers[].answer", "answers[].rank, 1 is the best", readers.nectar,
        "Nectar (Zhu et al. 2023)",
        structures=("answers",),
    ),
    Layout(
        "shp", ("history", "human_ref_A", "human_ref_B", "labels"), "history", "human_ref_A, human_ref_B",
        "labels: 1 where A is better", readers.shp, "SHP (Ethayarajh et al. 2022)", "log of score_ratio", "domain",
        also=("score_ratio", "domain"),
    ),
    Layout(
        "pku-saferlhf", ("prompt", "response_0", "response_1"), "prompt", "response_0, response_1",
        "better_response_id or safer_response_id; with both, the option says which", readers.pku_saferlhf,
        "PKU-SafeRLHF (Ji et al. 2023)", option="`better` or `safer`", also=("better_response_id", "safer_response_id"),
    ),
    Layout(
        "summarize-from-feedback", ("info", "summaries", "choice"), "info: subreddit, title, post, then TL;DR:",
        "summaries[].text", "choice: index of the better", readers.summaries,
        "summarize_from_feedback (Stiennon et al. 2020)",
        structures=("info", "summaries"),
    ),
    Layout(
        "question", ("question", "response_chosen", "response_rejected"),
        "question; with system or history, a chat that ends with it", "response_chosen, response_rejected",
        "chosen before rejected", readers.question, "DPO-En-Zh-20k-Preference", also=("system", "history"),
        structures=("history",),
    ),
    Layout(
        "arena", ("conversation_a", "conversation_b", "winner"), "as in dialogues", "as in dialogues",
        "winner: model_a, model_b, tie, tie (bothbad)", readers.arena, "Chatbot Arena (Zheng et al. 2023)",
        structures=("conversation_a", "conversation_b"),
    ),
    Layout(
        "unpaired", ("completion", "label"), "–", "–", "refused: one response alone is no preference", readers.unpaired,
        "KTO", also=("prompt",),
    ),
)  # fmt: skip
"""Every layout that is read. Keys of one may include those of another, which it then goes before."""
