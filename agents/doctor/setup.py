"""From names to the parts of a set-up: models are loaded, data is read, the environment is made."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError

from agents.doctor.checks.environment import EnvironmentPart
from agents.doctor.checks.reward import RewardPart
from agents.doctor.data import Demonstrations, Preferences, read_data, read_prompts
from agents.doctor.finding import Finding
from agents.doctor.parts import ModelPart, Text, refusal
from reward_models.benchmark.layout import Inputs
from textenv import registry
from textenv.config import OptionError
from textenv.lm import LanguageModel
from textenv.protocols import RewardModel

T = TypeVar("T")

TEXT_ENV = "textenv/Text-v0"
SOME = 64
"""Texts of the data that other parts are tried on."""
PROBES = (
    Text("What is a good name for a cat?", "Momo is a good name."),
    Text("What is a good name for a cat?", "I do not know, and I would rather not say."),
    Text("How do I boil an egg?", "Seven minutes in boiling water, then cold water."),
    Text("How do I boil an egg?", "No."),
)
"""What a reward model is tried on where nothing else is given."""

UNREADABLE = (
    "Everything after it would run on something else or not at all.",
    "Follow the message; a folder needs config, safetensors weights and the tokenizer with its EOS token.",
)
UNUSABLE = (
    "Training on it would stop here, and nothing of it is examined.",
    "Follow the message: correct or drop the record, rename the columns, or save the file anew.",
)


class Setup(NamedTuple):
    """Part → what there is of it, and why a part that was named is not there."""

    parts: dict[str, list[Any]]
    findings: list[Finding]


def gather(
    model: LanguageModel | str | None,
    reward_model: RewardModel | str | Mapping[str, Any] | None,
    data: Sequence[str | Path],
    held_out: str | Path | None,
    env_id: str | None,
    options: Mapping[str, Any],
) -> Setup:
    """Raises ValueError where nothing is named, or a name stands for nothing."""
    if model is None and reward_model is None and not data and env_id is None:
        raise ValueError("a part of a set-up must be named, got none. Give a model, reward model, data or environment.")
    if options and env_id is None:
        raise ValueError(f"options must go with an environment, got {sorted(options)}. Give env_id too.")
    findings: list[Finding] = []
    prompts = None if held_out is None else _read("held-out prompts", held_out, read_prompts, findings)
    named = None if model is None else _model_part(model, findings)
    lm = None if named is None else named.lm
    found = [_read("data", source, lambda name: read_data(name, lm, prompts), findings) for source in data]
    read = [part for part in found if part is not None]
    texts = [text for part in read for text in part.texts[:SOME]]
    written = texts if lm is None else [text for text in texts if not refusal(lm, text.prompt)]
    environment = None
    if named is not None or model is None:
        environment = _environment(model, reward_model, written, env_id, options, prompts, findings)
    if environment is not None:
        config = environment.vector.task.config
        named = named or ModelPart(environment.vector.task.reference, _file_source(config.reference))
        reward_model = config.reward_model if reward_model is None else reward_model
    if named is not None:
        named.texts = texts or ([] if environment is None or named.broken else environment.texts)
    parts = {
        "model": [] if named is None else [named],
        "demonstrations": [part for part in read if isinstance(part, Demonstrations)],
        "preferences": [part for part in read if isinstance(part, Preferences)],
        "reward model": [] if reward_model is None else _reward_parts(reward_model, environment, texts, findings),
        "environment": [] if environment is None else [environment],
    }
    return Setup(parts, findings)


def _read(part: str, source: str | Path, reader: Callable[[str | Path], T], findings: list[Finding]) -> T | None:
    """What ``reader`` makes of a source; where that is no data, a finding instead. Raises where nothing is there."""
    try:
        return reader(source)
    except ValueError as error:
        if not Path(source).exists():
            raise
        what = str(error) if str(source) in str(error) else f"{source}: {error}"
        findings.append(Finding(f"{part}: loading", "error", what, *UNUSABLE))
        return None


def _model_part(model: LanguageModel | str, findings: list[Finding]) -> ModelPart | None:
    if isinstance(model, LanguageModel):
        return ModelPart(model)
    try:
        return ModelPart(registry.language_model(model), _file_source(model))
    except ValueError as error:
        if not Path(model).exists() and model not in registry.registered_sources("language model"):
            raise
        findings.append(Finding("model: loading", "error", str(error), *UNREADABLE))
        return None


def _file_source(name: str) -> str | None:
    """The folder or hub id behind the name of a language model; None where it is made by a function."""
    source = registry.registered_sources("language model").get(name, name)
    is_file = isinstance(source, str | Path) and (Path(source).exists() or ":" not in str(source))
    return str(source) if is_file else None


def _environment(
    model: Any,
    reward_model: Any,
    texts: list[Text],
    env_id: str | None,
    options: Mapping[str, Any],
    held_out: list[Any] | None,
    findings: list[Finding],
) -> EnvironmentPart | None:
    """The id with what was named put in its place; without an id, one made of model, reward model and data."""
    given: dict[str, Any] = {"reference": model, "reward_model": reward_model}
    given = {name: value for name, value in given.items() if isinstance(value, str | Mapping)}
    if env_id is None:
        if len(given) < 2 or not texts:
            return None
    else:
        registry.environment_spec(env_id)
    try:
        options = options if env_id is not None else _fitting(registry.language_model(given["reference"]), texts)
        part = EnvironmentPart(env_id or TEXT_ENV, {**given, **options}, held_out)
        part.vector  # noqa: B018
    except OptionError:
        raise
    except (ValueError, TemplateError) as error:
        findings.append(Finding("environment: making", "error", str(error), *UNREADABLE))
        return None
    return part


def _fitting(lm: LanguageModel, texts: list[Text]) -> dict[str, Any]:
    """The prompts of texts, as options of an environment in which all of them fit."""
    prompts = list({str(text.prompt): text.prompt for text in texts}.values())
    width = max(len(lm.encode_prompt(prompt)) for prompt in prompts)
    longest = max(len(lm.encode_response(text.response, eos=True)) for text in texts)
    return {"prompts": prompts, "max_prompt_tokens": width, "max_new_tokens": longest}


def _reward_parts(
    reward_model: Any, environment: EnvironmentPart | None, texts: list[Text], findings: list[Finding]
) -> list[RewardPart]:
    name = reward_model if isinstance(reward_model, str) else getattr(reward_model, "__name__", "reward model")
    try:
        is_name = isinstance(reward_model, str | Mapping)
        model = registry.reward_model(reward_model) if is_name else reward_model
    except ValueError as error:
        if not (isinstance(reward_model, str) and Path(reward_model).exists()):
            raise
        findings.append(Finding("reward model: loading", "error", str(error), *UNREADABLE))
        return []
    if environment is not None and not environment.reference.broken:
        return [RewardPart(model, name, environment.inputs)]
    tried = texts or list(PROBES)
    columns = {"finish_reason": ["eos"] * len(tried)}
    return [RewardPart(model, name, Inputs([t.prompt for t in tried], [t.response for t in tried], columns))]
