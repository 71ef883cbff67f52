"""Data files as parts of a set-up, and the checks that demonstrations and preferences share."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agents.doctor.finding import Seen
from agents.doctor.parts import Text, refusal
from agents.sft import Demonstration, load_demonstrations
from reward_models.preferences import Ranking, prompt_key, read_rankings
from reward_models.preferences.layouts import layout_of
from textenv.conformance.subject import Skipped
from textenv.data.datasets import raw_records, read_records
from textenv.data.records import as_prompt_set, json_object, messages_of
from textenv.lm import LanguageModel

R = TypeVar("R")

FEW = 0.1
"""Share of records up to which a fault of single ones is a note."""


@dataclass(frozen=True, eq=False)
class _Data:
    """What demonstrations and preferences share."""

    name: str
    lm: LanguageModel | None
    """That would be trained on it."""
    held_out: list[Any] | None
    """Prompts."""

    @property
    def prompts(self) -> list[Any]:
        """Of each record."""
        raise NotImplementedError

    @property
    def texts(self) -> list[Text]:
        """Every response with its prompt."""
        raise NotImplementedError

    @property
    def model(self) -> LanguageModel:
        if self.lm is None:
            raise Skipped("no model was given")
        return self.lm

    @functools.cached_property
    def refusals(self) -> list[str]:
        """Why the model's chat template cannot write the prompt of each record; empty where it can."""
        return [refusal(self.model, prompt) for prompt in self.prompts]

    def written(self, records: list[R]) -> list[R]:
        """Those whose prompt the chat template writes; raises :class:`Skipped` where there are none."""
        found = [record for record, reason in zip(records, self.refusals, strict=True) if not reason]
        if not found:
            raise Skipped("the chat template refuses every prompt")
        return found


@dataclass(frozen=True, eq=False)
class Demonstrations(_Data):
    """What supervised fine-tuning would learn from."""

    records: list[Demonstration]

    @property
    def prompts(self) -> list[Any]:
        return [record.prompt for record in self.records]

    @property
    def keys(self) -> list[Any]:
        """What makes a record the same as another."""
        return [(prompt_key(record.prompt), record.completion) for record in self.records]

    @property
    def texts(self) -> list[Text]:
        return [Text(record.prompt, record.completion) for record in self.records]


@dataclass(frozen=True, eq=False)
class Preferences(_Data):
    """What a reward model would learn from."""

    rankings: list[Ranking]
    malformed: list[str]
    """What is wrong with each record that cannot be read."""
    raw: list[dict[str, Any]]

    @property
    def prompts(self) -> list[Any]:
        return [ranking.prompt for ranking in self.rankings]

    @property
    def keys(self) -> list[Any]:
        return [(prompt_key(ranking.prompt), ranking.responses, ranking.levels) for ranking in self.rankings]

    @property
    def texts(self) -> list[Text]:
        return [Text(ranking.prompt, response) for ranking in self.rankings for response in ranking.responses]


def read_data(
    source: str | Path, lm: LanguageModel | None, held_out: list[Any] | None
) -> "Demonstrations | Preferences":
    """A file, folder or hub id of demonstrations or preferences, recognised by the keys of the first record.

    Raises:
        ValueError: there is no such data, it is empty, its columns are those of neither, or training would refuse it.
    """
    raw, unread = _records(source)
    first = raw[0] if raw else {}
    demonstrated = first.get("messages") is not None or {"prompt", "completion"} <= first.keys()
    if _is_ranking(first) or (not demonstrated and any(map(_is_ranking, raw))):
        rankings, malformed = read_rankings(raw, skip_malformed=True)
        return Preferences(str(source), lm, held_out, rankings, [*unread, *malformed], raw)
    if unread:
        raise ValueError(unread[0])
    if demonstrated:
        return Demonstrations(str(source), lm, held_out, load_demonstrations(source))
    raise ValueError(
        f"data must be demonstrations (prompt and completion, or messages) or preferences in a layout that "
        f"`textenv reward --help` lists, got columns {', '.join(first)} in {str(source)!r}. Rename the columns."
    )


def _records(source: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Records as they are, and what is wrong with each line that is none.

    Raises:
        ValueError: there is no such data, or it is empty.
    """
    records: list[dict[str, Any]] = []
    unread: list[str] = []
    for where, record in raw_records(source):
        try:
            records.append(json_object(record) if isinstance(record, str) else record)
        except ValueError as error:
            unread.append(f"{where}: {error}")
    if not records and not unread:
        raise ValueError(f"data must have at least one record, got {str(source)!r}, which is empty. Name another file.")
    return records, unread


def read_prompts(source: str | Path) -> list[Any]:
    """The prompts of a file of prompts, demonstrations or preferences.

    Raises:
        ValueError: there is no such file, or a record has no prompt.
    """
    raw = list(read_records(source).values())
    if raw and raw[0].get("messages") is not None:
        return [demonstration.prompt for demonstration in load_demonstrations(source)]
    if raw and _is_ranking(raw[0]):
        return [ranking.prompt for ranking in read_rankings(raw, skip_malformed=True)[0]]
    return list(as_prompt_set([{"prompt": messages_of(record.get("prompt"))} for record in raw]).prompts)


def _is_ranking(record: dict[str, Any]) -> bool:
    try:
        layout_of(record)
    except ValueError:
        return False
    return True


def duplicates(part: Demonstrations | Preferences) -> Iterator[Seen]:
    """No record stands there twice."""
    counts = Counter(part.keys)
    again = sum(counts.values()) - len(counts)
    if again:
        share = again / len(part.keys)
        level = "warning" if share > FEW else "note"
        yield Seen(level, f"{again} of {len(part.keys)} records ({share:.0%}) repeat another")


def leakage(part: Demonstrations | Preferences) -> Iterator[Seen]:
    """No held-out prompt is trained on."""
    yield from leaked(part.prompts, part.held_out)


def leaked(prompts: Sequence[Any], held_out: Sequence[Any] | None) -> Iterator[Seen]:
    """What of the held-out prompts is among the others, whatever their spaces and capitals."""
    if held_out is None:
        raise Skipped("no held-out prompts were given")
    seen, unseen = {_plain(prompt) for prompt in prompts}, {_plain(prompt): prompt for prompt in held_out}
    both = [prompt for key, prompt in unseen.items() if key in seen]
    if both:
        share = len(both) / len(unseen)
        what = f"{len(both)} of {len(unseen)} held-out prompts ({share:.0%}) are trained on"
        yield Seen("error", f"{what}: {str(both[0])[:60]!r}")


def _plain(prompt: Any) -> str:
    return " ".join(prompt_key(prompt).lower().split())


DUPLICATES_WHY = (
    "A record seen twice weighs twice and is memorised first; duplicates across a split leak (Lee et al. 2022, "
    "Deduplicating Training Data Makes Language Models Better)."
)
LEAKAGE_WHY = (
    "Held-out figures would measure memory: accuracy above what labels allow (cf. the decontamination of "
    "RewardBench, Lambert et al. 2024)."
)
LEAKAGE_REMEDY = "Split by prompt, not by record: reward_models.preferences.split_by_prompt."
