"""Names → environment ids, prompt sets, reward models and language models.

Everything an environment is built from is named by JSON values (a registered name, ``"module:attribute"``, a path, a
list of strings), so that a Gymnasium spec can be copied and written down. Models behind a name are loaded on first use,
once a process and device, and shared.
"""

import difflib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from textenv.lm import LanguageModel

RewardFunction = Callable[..., Sequence[float]]
"""``(prompts: list[str], completions: list[str], **columns) -> list[float]``."""

SEQUENCE_CLASSIFIER = "reward_models.transformer:load_reward_model"
"""What turns a folder or hub id into a reward model. Named, not imported: that package builds on this one."""

REWARD_SPEC = "reward_models.spec:build_reward_model"
"""What turns a JSON object into a reward model."""


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts in a fixed order, with the columns that reward models may ask for."""

    prompts: tuple[Any, ...]
    """Strings, or chats (lists of ``{"role", "content"}``)."""
    columns: dict[str, tuple[Any, ...]]
    """Other fields of the records, one value a prompt."""


_sources: dict[str, dict[str, Any]] = {"prompts": {}, "reward model": {}, "language model": {}}
_loaded: dict[tuple[str, str, str], Any] = {}
_descriptions: dict[str, str] = {}


def register(
    id: str,
    *,
    prompts: Any,
    reference: str,
    reward_model: str,
    max_prompt_tokens: int,
    max_new_tokens: int,
    description: str = "",
    **defaults: Any,
) -> None:
    """Register a text-generation environment, single and vector, under a Gymnasium id.

    ``prompts``, ``reference`` and ``reward_model`` are what :class:`textenv.env.TextEnv` takes; ``defaults`` are more
    of its keyword arguments. All of them can be overridden in ``gym.make``.
    """
    _descriptions[id] = description
    gymnasium.register(
        id=id,
        entry_point="textenv.env:TextEnv",
        vector_entry_point="textenv.vector:TextVectorEnv",
        kwargs={
            "prompts": prompts,
            "reference": reference,
            "reward_model": reward_model,
            "max_prompt_tokens": max_prompt_tokens,
            "max_new_tokens": max_new_tokens,
            **defaults,
        },
        # No max_episode_steps: the length budget belongs to the task, which scores what it ends.
    )


def registered_ids() -> dict[str, str]:
    """Ids registered through :func:`register`, with their descriptions."""
    return dict(_descriptions)


def register_prompts(name: str, source: Any) -> None:
    """Name a prompt set: a list, a JSONL path, ``"module:function"`` or a function that returns a list."""
    _register("prompts", name, source)


def register_reward_model(name: str, source: RewardFunction | str | Mapping[str, Any]) -> None:
    """Name a reward model: a callable, ``"module:callable"``, the folder or hub id of a sequence classifier, or a JSON
    object (:mod:`reward_models.spec`)."""
    _register("reward model", name, source)


def register_language_model(name: str, source: Any) -> None:
    """Name a language model: a folder, a hub id, or (``"module:``)``function`` that returns a ``LanguageModel``."""
    _register("language model", name, source)


def prompt_set(source: Any) -> PromptSet:
    """Resolve ``prompts=``: a registered name, a JSONL path, ``"module:function"`` or a list.

    Records are strings, chats, or objects with a ``prompt`` (further fields become columns).
    """
    if isinstance(source, str | Path):
        return _once("prompts", str(source), "", lambda value: _prompt_set(_prompt_records(value)))
    return _prompt_set(source)


def language_model(name: str, device: str = "cpu") -> "LanguageModel":
    """The shared language model behind ``name``."""
    return _once("language model", name, device, lambda source: _language_model(source, device))


def fresh_language_model(name: str, device: str = "cpu") -> "LanguageModel":
    """A copy of the language model behind ``name`` that nobody else holds: what a learner trains."""
    return _language_model(_source("language model", name), device)


def reward_model(name: str | Mapping[str, Any], device: str = "cpu") -> RewardFunction:
    """The shared reward model behind a name, or behind a JSON object that says how to build one.

    The object (a mapping, or its JSON text) is one of those in :mod:`reward_models.spec`, like ``{"rule": "length"}``.
    """
    spec = _json_object(name)
    if spec is not None:
        try:
            key = ("reward model", json.dumps(spec, sort_keys=True), device)
        except TypeError as error:
            raise ValueError(
                f"a reward model must be made of JSON values, with reward_model (={name!r}): {error}. Register a "
                "callable under a name and give the name."
            ) from None
        if key not in _loaded:
            _loaded[key] = _attribute(REWARD_SPEC)(spec, device)
        return _loaded[key]
    if not isinstance(name, str):
        raise ValueError(
            f"reward_model must be a name or a JSON object, with reward_model (={name!r}). Register a callable first: "
            "textenv.register_reward_model('mine', f), then reward_model='mine'."
        )
    return _once("reward model", name, device, lambda source: _reward_function(source, device))


def _json_object(source: Any) -> dict[str, Any] | None:
    """A mapping, or the text of a JSON object, as a dict; None for anything else."""
    if isinstance(source, str) and source.lstrip().startswith("{"):
        try:
            return json.loads(source)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"a reward model that starts with '{{' must be JSON, with reward_model (={source!r}): {error}."
            ) from None
    return dict(source) if isinstance(source, Mapping) else None


def clear_cache() -> None:
    """Forget every loaded model and prompt set (the names stay)."""
    _loaded.clear()


def _register(kind: str, name: str, source: Any) -> None:
    if not name or ":" in name:
        raise ValueError(f"the name of a {kind} must be non-empty and without ':', with name (={name!r}).")
    _sources[kind][name] = source
    for key in [key for key in _loaded if key[0] == kind and (key[1] == name or _is_composed(kind, key[1]))]:
        del _loaded[key]


def _is_composed(kind: str, name: str) -> bool:
    """Whether a loaded reward model was built from a JSON object, and so may hold others by name."""
    return kind == "reward model" and _json_object(_sources[kind].get(name, name)) is not None


def _once(kind: str, name: str, device: str, load: Callable[[Any], Any]) -> Any:
    key = (kind, name, device)
    if key not in _loaded:
        _loaded[key] = load(_source(kind, name))
    return _loaded[key]


def _source(kind: str, name: str) -> Any:
    """What a name stands for; a path, hub id or ``module:attribute`` stands for itself."""
    names = _sources[kind]
    if name in names:
        return names[name]
    if ":" in name or Path(name).exists() or (kind != "prompts" and name.count("/") == 1):
        return name
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"{kind} must be a registered name, an existing path or 'module:attribute', with {kind} (={name!r}).{hint} "
        f"Registered: {', '.join(sorted(names)) or 'none'}."
    )


def _attribute(source: Any) -> Any:
    """``"module:attribute"`` → the object; anything else unchanged."""
    if not (isinstance(source, str) and ":" in source) or Path(source).exists():
        return source
    module_name, _, attribute = source.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'module:attribute' must be importable, with name (={source!r}): {error}.") from error


def _language_model(source: Any, device: str) -> "LanguageModel":
    from textenv.lm.load import LanguageModel, load_language_model

    source = _attribute(source)
    if not callable(source):
        return load_language_model(source, device=device)
    loaded = source()
    if not isinstance(loaded, LanguageModel):
        raise ValueError(
            f"a language-model function must return a LanguageModel, with result (={type(loaded).__name__})."
        )
    loaded.model.to(device)  # type: ignore[arg-type]
    return loaded


def _reward_function(source: Any, device: str) -> RewardFunction:
    if _json_object(source) is not None:
        return reward_model(source, device)
    source = _attribute(source)
    if callable(source):
        return source  # type: ignore[return-value]
    return _attribute(SEQUENCE_CLASSIFIER)(source, device=device)


def _prompt_records(source: Any) -> Any:
    source = _attribute(source)
    if callable(source):
        return source()
    if isinstance(source, str | Path):
        from textenv.data import read_jsonl

        return read_jsonl(source)
    return source


def _prompt_set(records: Sequence[Any]) -> PromptSet:
    if isinstance(records, PromptSet):
        return records
    prompts: list[Any] = []
    columns: dict[str, list[Any]] = {}
    for number, record in enumerate(records):
        fields = dict(record) if isinstance(record, Mapping) else {"prompt": record}
        prompt = fields.pop("prompt", None)
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"a prompt must be a non-empty string or list of chat messages, with prompt number {number} "
                f"(={record!r}). Give strings, or objects with a 'prompt'."
            )
        prompts.append(prompt)
        for key in fields.keys() | columns.keys():
            columns.setdefault(key, [None] * number).append(fields.get(key))
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, with prompts (=[]). Give a list or a JSONL file.")
    return PromptSet(tuple(prompts), {key: tuple(values) for key, values in columns.items()})
