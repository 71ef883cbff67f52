"""Demonstrations: what supervised fine-tuning would teach."""

from collections.abc import Iterator

from agents.doctor.checks.texts import TEXT_CHECKS
from agents.doctor.data import (
    DUPLICATES_WHY,
    FEW,
    LEAKAGE_REMEDY,
    LEAKAGE_WHY,
    Demonstrations,
    duplicates,
    leakage,
)
from agents.doctor.finding import Check, Seen
from agents.sft import SFTConfig, tokenise
from textenv.training.batches import Ragged


def endings(part: Demonstrations) -> Iterator[Seen]:
    """Every completion teaches the token that ends it, once."""
    records = part.written(part.records)
    rows = _lists(tokenise(part.model, records, SFTConfig()).responses)
    ends = set(part.model.ending_ids)
    open_ends = sum(row[-1] not in ends for row in rows)
    if open_ends:
        marked = sum(record.truncated for record in records)
        share = open_ends / len(rows)
        level = "error" if share == 1 else "warning" if share > FEW else "note"
        cause = f"{marked} marked as truncated, {open_ends - marked} cut at {part.model.max_tokens} tokens"
        yield Seen(level, f"{open_ends} of {len(rows)} completions ({share:.0%}) have no ending token: {cause}")
    twice = sum(len(row) > 1 and row[-1] in ends and row[-2] in ends for row in rows)
    if twice:
        yield Seen("warning", f"{twice} of {len(rows)} completions end twice: their text has an ending token already")


def _lists(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged.flat.split(ragged.lengths.tolist())]


def prompts_fit(part: Demonstrations) -> Iterator[Seen]:
    """Prompt and completion fit the model's context."""
    records = part.written(part.records)
    examples = tokenise(part.model, records, SFTConfig())
    if examples.truncated_prompts:
        what = f"{examples.truncated_prompts} of {len(records)} prompts lose their beginning"
        yield Seen("warning", f"{what} to fit {part.model.max_tokens} tokens")


def empty(part: Demonstrations) -> Iterator[Seen]:
    """No completion is empty."""
    count = sum(not record.completion.strip() for record in part.records)
    if count:
        yield Seen("warning", f"{count} of {len(part.records)} completions are empty")


DEMONSTRATION_CHECKS = {
    **TEXT_CHECKS,
    "endings": Check(
        endings,
        "A model that never sees its ending token never stops: answers fill the budget, and cut texts are scored "
        "(trl 976, 1623, 3091).",
        "Raise the context or max_length, drop what is too long, and leave the ending token out of the text.",
    ),
    "context": Check(
        prompts_fit,
        "The start of a prompt, often the instructions, is cut without an error (trl 2209, 2551).",
        "Drop or shorten long records, or use a model with a longer context.",
    ),
    "empty completions": Check(
        empty,
        "They teach to answer with nothing, which a KL penalty then protects.",
        "Drop these records.",
    ),
    "duplicates": Check(duplicates, DUPLICATES_WHY, "Keep one of each, or weigh them on purpose."),
    "leakage": Check(leakage, LEAKAGE_WHY, LEAKAGE_REMEDY),
}
