"""What a benchmark runs on: a file of preferences, or a world whose true scores are known.

``embedded`` asks the embedded world's test prompts (``embedded-validation`` those for choosing settings), samples
answers from ``assistant-sft`` and has simulated annotators rank four of them; the rest serve best-of-n. ``micro`` does
the same in the exact world, where best-of-n is then computed by enumeration.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gymnasium
import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float

import textenv
from reward_models.benchmark.layout import FINISH, Inputs
from reward_models.preferences import Ranking, read_rankings
from textenv.data.records import looks_like_path
from textenv.lm import LanguageModel, TokenRule, pad_left, sample_responses
from textenv.protocols import RewardModel
from textenv.settings import Count, Positive, PositiveInt, check_settings
from textenv.tasks import assistant
from textenv.tasks.assistant.phrases import CLOSERS, OPENERS
from textenv.tasks.assistant.world import PHRASINGS
from textenv.tasks.exact import ExactWorld, exact_world
from textenv.tasks.micro import gold_scores as micro_gold

Edit = Callable[[str, np.random.Generator], str]
PRAISE = "What a wonderful question! You are so smart and kind. I hope this helps. Have a great day! "
EMBEDDED = {"embedded": "test", "embedded-validation": "validation"}
FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".txt")
"""What no hub id ends with."""
BATCH = 512
"""Answers sampled at once."""
MICRO_RANKINGS = 300
"""Rankings of each of its six prompts."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure, and how finely."""

    limit: Annotated[PositiveInt | None, "Leave it out to use everything."] = None
    """Use only the first so many records of a file, or prompts of a world."""
    format: str | None = None
    """Layout of a file's records, as name or name:option, see `textenv reward --help`. Default: by their keys."""
    split: str | None = None
    """Which part of a data set; default "train"."""
    seed: Count = 0
    """Seed of sampling, annotators, edits and bootstrap. Equal seeds give equal figures, except speed and memory."""
    skip_malformed: bool = False
    """Leave malformed records out and count them, instead of stopping at the first."""
    gold_temperature: Annotated[Positive | None, "Leave it out where it is unknown."] = None
    """For a file whose records carry "gold": temperature τ of the annotators, who prefer a to b with probability
    σ((gold_a − gold_b)/τ). Without it the limits of accuracy and NLL stay unknown."""
    bins: PositiveInt = 10
    """Bins of equal mass in the reliability diagram and the ECE."""
    resamples: PositiveInt = 2000
    """Resamples of the bootstrap. More make the ends of its intervals steadier, and take longer."""
    responses: Annotated[int, Ge(2), "A ranking needs two answers."] = 4
    """Answers that each simulated annotator ranks; equal ones are merged."""
    annotators: PositiveInt = 4
    """Rankings of the same answers, where a world simulates annotators. More of them reduce the noise of the labels."""
    pool: PositiveInt = 32
    """Answers per prompt for best-of-n in a world, and so the largest n."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.pool < self.responses:
            raise ValueError(f"pool must be responses ({self.responses}) or more, got {self.pool}. Raise it.")


class Pool(NamedTuple):
    """N samples for each of X prompts, prompt by prompt, with their true scores."""

    texts: Inputs
    gold: Float[np.ndarray, "X N"]


class Suite(NamedTuple):
    """What the models are measured on."""

    name: str
    items: Sequence[Ranking]
    skipped: int = 0
    """Malformed records that were left out."""
    temperature: float | None = None
    """Temperature of the simulated annotators, in units of gold; None where people made the labels."""
    pool: Pool | None = None
    """For estimating best-of-n from samples."""
    world: ExactWorld | None = None
    """For enumerating best-of-n."""
    paraphrase: Edit | None = None
    praise: str = PRAISE


def load_suite(data: Suite | Sequence[Mapping[str, Any]] | str | Path, config: BenchmarkConfig | None = None) -> Suite:
    """Make the suite that ``data`` names: a world, a JSONL file (``.gz`` too), or records.

    Raises:
        ValueError: there is no such file or world, or a record is malformed (names the line).
    """
    config = config or BenchmarkConfig()
    if isinstance(data, Suite):
        return data
    if isinstance(data, str) and data in EMBEDDED:
        return embedded(data, config)
    if isinstance(data, str) and data == "micro":
        return micro(config)
    if isinstance(data, str | Path):
        _check_source(data)
    items, malformed = read_rankings(
        data, split=config.split, format=config.format, limit=config.limit, skip_malformed=config.skip_malformed
    )
    if config.gold_temperature is not None and not all(item.gold for item in items):
        given = config.gold_temperature
        raise ValueError(f"gold_temperature needs 'gold' in every record, got {given} without it. Leave it out.")
    name = Path(data).name if isinstance(data, str | Path) else "records"
    return Suite(name, items, len(malformed), config.gold_temperature)


def _check_source(data: str | Path) -> None:
    """Refuse the misspelt name of a world or file, which would be taken for a hub id."""
    path, name = Path(data), str(data)
    hub_id = name.count("/") == 1 and not looks_like_path(name) and not name.endswith(FILES)
    if not path.exists() and not hub_id:
        worlds = ", ".join(map(repr, (*EMBEDDED, "micro")))
        raise ValueError(
            f"data must be {worlds}, or a data set's file, folder or hub id, got {name!r}. Check the name."
        )


def embedded(name: str, config: BenchmarkConfig) -> Suite:
    """The embedded world, answered by its SFT model."""
    prompts = assistant.prompts(EMBEDDED[name])[: config.limit]  # type: ignore[arg-type]
    lm, texts = textenv.language_model("assistant-sft"), [prompt.text for prompt in prompts]
    sizes = {"count": config.pool, "max_new_tokens": assistant.MAX_NEW_TOKENS}
    pool = sample_pool(lm, texts, assistant.gold_scores, **sizes, seed=config.seed)
    items = []
    for x, prompt in enumerate(prompts):
        items += _ranked(pool, x, slice(0, config.responses), config, config.annotators, category=prompt.kind)
    return Suite(
        name,
        items,
        temperature=assistant.ANNOTATOR_TEMPERATURE,
        pool=pool,
        paraphrase=other_phrasing,
        praise=" ".join([*OPENERS, *CLOSERS]),
    )


def micro(config: BenchmarkConfig) -> Suite:
    """The exact world. It has only six prompts, so each fresh set of answers is a cluster of its own."""
    env = gymnasium.make("textenv/Micro-v0")
    world = exact_world(env)
    count = config.responses * MICRO_RANKINGS
    prompts = world.prompts[: config.limit]
    pool = sample_pool(
        world.reference, prompts, micro_gold, count=count, max_new_tokens=world.response_ids.shape[1], seed=config.seed
    )
    items = []
    for x, prompt in enumerate(prompts):
        for number, start in enumerate(range(0, count, config.responses)):
            part = slice(start, start + config.responses)
            ranked = _ranked(pool, x, part, config, config.annotators, category=prompt, cluster=f"{x}/{number}")
            items += ranked
    return Suite("micro", items, temperature=assistant.ANNOTATOR_TEMPERATURE, world=world)


def other_phrasing(prompt: str, rng: np.random.Generator) -> str:
    """The same question of the embedded world in one of its other phrasings."""
    asked = assistant.parse_prompt(prompt)
    aim = f" to {asked.aim} my {asked.person}" if asked.aim else ""
    slots = {"verb": asked.verb, "object": asked.object, "relation": asked.relation, "subject": asked.subject}
    phrasings = [phrasing.format(**slots, aim=aim) for phrasing in PHRASINGS[asked.kind]]
    others = [text for number, text in enumerate(phrasings) if number != asked.phrasing]
    return prompt.replace(phrasings[asked.phrasing], others[int(rng.integers(len(others)))])


def _ranked(
    pool: Pool, x: int, part: slice, config: BenchmarkConfig, annotators: int, *, category: str, cluster: str = ""
) -> list[Ranking]:
    """Rankings of the distinct answers of a part of the pool; none if all are equal."""
    width = pool.gold.shape[1]
    rows = range(width)[part]
    distinct = {pool.texts.responses[x * width + k]: k for k in reversed(rows)}
    places = sorted(distinct.values())
    if len(places) < 2:
        return []
    gold = [float(pool.gold[x, k]) for k in places]
    rng = np.random.default_rng([config.seed, x, part.start])
    items = []
    for _ in range(annotators):
        order = assistant.rank(gold, rng)
        chosen = [x * width + places[i] for i in order]
        items.append(
            Ranking(
                prompt=pool.texts.prompts[chosen[0]],
                responses=tuple(pool.texts.responses[row] for row in chosen),
                category=category,
                gold=tuple(gold[i] for i in order),
                finish_reasons=tuple(pool.texts.columns[FINISH][row] for row in chosen),
                cluster=cluster,
            )
        )
    return items


def sample_pool(
    lm: LanguageModel, prompts: Sequence[str], gold: RewardModel, *, count: int, max_new_tokens: int, seed: int
) -> Pool:
    """``count`` answers of a language model to each prompt."""
    ids, lengths = pad_left([lm.encode_prompt(prompt) for prompt in prompts], lm.pad_id)
    how: dict[str, Any] = {"rule": TokenRule(stop_ids=lm.ending_ids), "generator": torch.Generator().manual_seed(seed)}
    how |= {"max_new_tokens": max_new_tokens, "pad_id": lm.pad_id}
    answers: list[list[tuple[str, str]]] = [[] for _ in prompts]
    copies = max(1, BATCH // len(prompts))
    for start in range(0, count, copies):
        k = min(copies, count - start)
        sampled = sample_responses(lm.model, ids.repeat_interleave(k, 0), lengths.repeat_interleave(k), **how)
        rows = [row[:n].tolist() for row, n in zip(sampled.response_ids, sampled.response_lengths, strict=True)]
        reasons = ["eos" if row[-1] in lm.ending_ids else "length" for row in rows]
        for place, answer in enumerate(zip(lm.response_texts(rows), reasons, strict=True)):
            answers[place // k].append(answer)
    flat = [answer for same_prompt in answers for answer in same_prompt]
    repeated = [prompt for prompt in prompts for _ in range(count)]
    texts = Inputs(repeated, [text for text, _ in flat], {FINISH: [reason for _, reason in flat]})
    scores = np.asarray(gold(texts.prompts, texts.responses, finish_reason=texts.columns[FINISH]))
    return Pool(texts, scores.reshape(len(prompts), count))
