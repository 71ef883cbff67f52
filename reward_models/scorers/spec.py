"""Reward models as JSON: what an environment takes as ``reward_model=`` besides a name.

    {"rule": "regex", "pattern": "[.!?]$", "score": 0.5}
    {"weighted": {"assistant-rm": 1.0, "short": {"model": {"rule": "length", "score": -1.0}, "weight": 0.1}}}
    {"ensemble": ["rm-1", "rm-2"], "combine": "mean_minus_std", "coefficient": 1.0}
    {"http": "http://127.0.0.1:8000/score", "timeout": 10, "batch_size": 64}
    {"cache": "scores.sqlite", "of": "assistant-rm"}
    {"classifier": "folder-or-hub-id", "batch_size": 16, "dtype": "bfloat16"}
    {"classifier": "lvwerra/distilbert-imdb", "label": "POSITIVE"}  # the probability of one of several labels

Exactly one of the keys of ``KINDS`` says which kind it is; the others are its options. Wherever an object holds another
reward model, that is a name or an object again.
"""

import contextlib
import contextvars
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

from reward_models.scorers.cache import CachedRewardModel
from reward_models.scorers.ensemble import Combine, Ensemble
from reward_models.scorers.label import LabelProbability
from reward_models.scorers.remote import HTTPRewardModel
from reward_models.scorers.rules import RULES
from reward_models.scorers.transformer import load_classifier, load_reward_model
from reward_models.scorers.weighted import Part, WeightedSum
from textenv import registry
from textenv.config import Loading, Precision
from textenv.protocols import RewardModel
from textenv.registry.sharing import share_matrices
from textenv.settings import PositiveInt, check_value

Spec = str | Mapping[str, Any]
"""A registered name, a path, a hub id, or a JSON object."""

_under_way: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("under_way", default=())


def build_reward_model(spec: Mapping[str, Any], how: Loading = Loading()) -> RewardModel:  # noqa: B008
    """The reward model that a JSON object describes.

    Raises:
        ValueError: the object has no kind, two kinds, an unknown option, a value of the wrong type, or holds itself.
    """
    kinds = [key for key in KINDS if key in spec]
    if len(kinds) != 1:
        rule = f"a reward model in JSON must have exactly one of the keys {', '.join(map(repr, KINDS))}"
        raise ValueError(f"{rule}, got {list(spec)}. Name one kind.")
    (kind,) = kinds
    build = KINDS[kind]
    options = {name: value for name, value in spec.items() if name != kind}
    if kind != "rule":
        described = HTTPRewardModel.__init__ if kind == "http" else build
        _check_names(repr(kind), options, described)
        hints = get_type_hints(described, include_extras=True)
        check_value(repr(kind), spec[kind], hints[next(iter(hints))])
        for name, value in options.items():
            check_value(name, value, hints[name], f" of {kind!r}")
    with _not_inside_itself(json.dumps(spec, sort_keys=True)):
        return build(spec[kind], how, **options)


def _rule(name: str, how: Loading, **fields: Any) -> RewardModel:
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"a rule must be one of {', '.join(map(repr, RULES))}, got {name!r}. Choose one.")
    _check_names(f"rule {name!r}", fields, RULES[name])
    return RULES[name](**fields)


def _weighted(parts: Mapping[str, Any], how: Loading) -> RewardModel:
    """``{name: weight}`` of named models, or ``{any name: {"model": …, "weight": …}}``."""
    out: dict[str, Part] = {}
    for name, part in parts.items():
        given = part if isinstance(part, Mapping) else {"weight": part}
        unknown = given.keys() - {"model", "weight"}
        if unknown:
            rule = f"part {name!r} of 'weighted' must be a weight, or an object of 'model' and 'weight'"
            raise ValueError(f"{rule}, got the unknown keys {sorted(unknown)}. Remove them.")
        out[name] = Part(registry.reward_model(given.get("model", name), *how), given.get("weight", 1.0))
    return WeightedSum(out)


def _ensemble(
    members: list[Spec], how: Loading, *, combine: Combine = "mean", coefficient: float | None = None
) -> RewardModel:
    named = {f"{i}: {spec if isinstance(spec, str) else json.dumps(spec)}": spec for i, spec in enumerate(members)}
    models = {name: registry.reward_model(spec, *how) for name, spec in named.items()}
    return Ensemble(models, combine=combine, coefficient=coefficient)


def _http(url: str, how: Loading, **options: Any) -> RewardModel:
    return HTTPRewardModel(url, **options)


def _cache(path: str, how: Loading, *, of: Spec, version: str | None = None) -> RewardModel:
    return CachedRewardModel(registry.reward_model(of, *how), path, version=version)


def _classifier(
    name: str,
    how: Loading,
    *,
    batch_size: PositiveInt = 64,
    dtype: Precision | None = None,
    label: str | None = None,
) -> RewardModel:
    how = how._replace(dtype=dtype or how.dtype)
    if label is not None:
        arguments = how.arguments()
        device = arguments.pop("device")
        model, tokenizer = load_classifier(name, **arguments)
        return LabelProbability(model.to(device), tokenizer, label, batch_size=batch_size)
    loaded = load_reward_model(name, **how.arguments(), batch_size=batch_size)
    share_matrices(loaded.model)
    return loaded


KINDS: dict[str, Callable[..., RewardModel]] = {
    "rule": _rule,
    "weighted": _weighted,
    "ensemble": _ensemble,
    "http": _http,
    "cache": _cache,
    "classifier": _classifier,
}
"""``(value under the key, how to load, **other keys) -> reward model``."""


def _check_names(what: str, options: Mapping[str, Any], build: Callable[..., Any]) -> None:
    parameters = inspect.signature(build).parameters.values()
    known = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"an option of {what} must be one of {names}, got {name!r}. Leave it out.")
    missing = [name for name, required in known.items() if required and name not in options]
    if missing:
        raise ValueError(f"{what} must have the option {missing[0]!r}, got {dict(options)}. Add it.")


@contextlib.contextmanager
def _not_inside_itself(spec: str) -> Iterator[None]:
    outer = _under_way.get()
    if spec in outer:
        raise ValueError(f"a reward model must not hold itself, got {spec}. Give the part a name.")
    token = _under_way.set((*outer, spec))
    try:
        yield
    finally:
        _under_way.reset(token)
