"""Names of prompt sets, reward models and language models, and how they are resolved.

An environment is built from JSON values (a registered name, ``"module:attribute"``, a path, a list of strings), so that
a Gymnasium spec can be copied and saved. Models are loaded on first use and shared by process, device and precision.
"""

import copy
import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textenv.config import Loading, Precision, hint
from textenv.data.datasets import check_dataset, read_dataset
from textenv.data.records import PromptSet, as_prompt_set, looks_like_path
from textenv.protocols import RewardModel
from textenv.settings import check_value

if TYPE_CHECKING:
    from textenv.lm import LanguageModel

SEQUENCE_CLASSIFIER = "reward_models.scorers.transformer:load_reward_model"
"""Turns a folder or hub id into a reward model. Named, not imported: that package builds on this one."""

REWARD_SPEC = "reward_models.scorers.spec:build_reward_model"
"""Turns a JSON object into a reward model."""

_sources: dict[str, dict[str, Any]] = {"prompts": {}, "reward model": {}, "language model": {}}
_loaded: dict[tuple[str, str, Any], Any] = {}


def stores() -> list[dict[Any, Any]]:
    """Every dictionary that registering a name may change, so that a failed registration can be undone."""
    return [*_sources.values(), _loaded]


def register_prompts(name: str, source: Any) -> None:
    """Name a prompt set: anything that ``prompts=`` takes (see :func:`prompt_set`), or a function that returns a list.

    Raises:
        ValueError: the name is empty or contains ":".
    """
    register_source("prompts", name, source)


def register_reward_model(name: str, source: RewardModel | str | Mapping[str, Any]) -> None:
    """Name a reward model: a callable, ``"module:callable"``, the folder or hub id of a sequence classifier, or a JSON
    object (:mod:`reward_models.scorers.spec`). Raises as :func:`register_prompts`."""
    register_source("reward model", name, source)


def register_language_model(name: str, source: Any) -> None:
    """Name a language model: a folder, a hub id, or a function (or ``"module:function"``) that returns a
    ``LanguageModel``. Raises as :func:`register_prompts`."""
    register_source("language model", name, source)


def register_source(kind: str, name: str, source: Any) -> None:
    """Name a "prompts", "reward model" or "language model"."""
    if not name or ":" in name:
        raise ValueError(f"the name of a {kind} must be non-empty and without ':', got {name!r}. Choose another.")
    _sources[kind][name] = source
    for key in [key for key in _loaded if key[0] == kind and (key[1] == name or _is_composed(kind, key[1]))]:
        del _loaded[key]


def registered_sources(kind: str) -> dict[str, Any]:
    """The sources of a kind by registered name."""
    return dict(_sources[kind])


def behind_names(kind: str, source: Any) -> dict[str, Any]:
    """What the registered names in a source stand for, and those in that, as JSON; an object as its type and name."""
    found: dict[str, Any] = {}
    waiting = [source]
    while waiting:
        for name in _texts(waiting.pop()):
            if name in _sources[kind] and name not in found:
                waiting.append(_sources[kind][name])
                found[name] = json.loads(json.dumps(waiting[-1], default=_named))
    return found


def _texts(source: Any) -> list[str]:
    """The texts in a name, a path, or a JSON value that is made of them."""
    source = _json_object(source) or source
    if isinstance(source, Mapping):
        return [text for pair in source.items() for part in pair for text in _texts(part)]
    if isinstance(source, list | tuple):
        return [text for part in source for text in _texts(part)]
    return [str(source)] if isinstance(source, str | Path) else []


def _named(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.absolute())
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


def prompt_set(source: Any) -> PromptSet:
    """Resolve ``prompts=``: a name, a file, a folder, a data set, ``"module:function"`` or a list.

    A data set is a mapping of the arguments of :func:`.read_dataset`, like ``{"dataset": folder or hub id, "column":
    "prompt"}``. Records are strings, chats, or objects with a ``prompt`` (further fields become columns).

    Raises:
        ValueError: the source does not exist, or a record is malformed.
    """
    if isinstance(source, str | Path):
        return _once("prompts", str(source), "", lambda value: as_prompt_set(_prompt_records(value)))
    if isinstance(source, Mapping):
        key = ("prompts", json.dumps(source, sort_keys=True), "")
        return _cached(key, lambda: as_prompt_set(_prompt_records(source)))
    return as_prompt_set(_prompt_records(source))


def language_model(
    name: str, device: str = "cpu", dtype: Precision = "float32", attn_implementation: str | None = None
) -> "LanguageModel":
    """The language model behind ``name``, shared by all who ask for it.

    Raises:
        ValueError: the name stands for no language model.
    """
    how = _how(device, dtype, attn_implementation)

    def load(source: Any) -> "LanguageModel":
        loaded = _language_model(source, how)
        has_those_of_its_base = hasattr(loaded.model, "peft_config")
        return loaded if has_those_of_its_base else _sharing(loaded, source)

    return _once("language model", name, how, load)


def fresh_language_model(
    name: str, device: str = "cpu", dtype: Precision = "float32", attn_implementation: str | None = None
) -> "LanguageModel":
    """A new copy of the language model behind ``name``, to train. Raises as :func:`language_model`."""
    how = _how(device, dtype, attn_implementation)
    source = _source("language model", name)
    shared = _loaded.get(("language model", name, how))
    if shared is None or not str(source).endswith(".gguf"):  # de-quantising takes longer than copying
        shared = _language_model(source, how)
        if not callable(_attribute(source)):
            return shared
    return dataclasses.replace(shared, model=copy.deepcopy(shared.model))  # a function may return one that it keeps


def portable_name(name: str) -> str:
    """What to call a language model in a file: the absolute path of a folder or file, else the name itself."""
    source = _sources["language model"].get(name, name)
    is_path = isinstance(source, str | Path) and Path(source).exists()
    return str(Path(source).absolute()) if is_path else name


def _how(device: str, dtype: Precision, attn_implementation: str | None) -> Loading:
    check_value("dtype", dtype, Precision)
    return Loading(device, dtype, attn_implementation)


def reward_model(
    name: str | Mapping[str, Any],
    device: str = "cpu",
    dtype: Precision = "float32",
    attn_implementation: str | None = None,
) -> RewardModel:
    """The shared reward model behind a name, or behind a JSON object that says how to build one.

    The object (a mapping, or its JSON text) is described in :mod:`reward_models.scorers.spec`.

    Raises:
        ValueError: the name stands for no reward model, or the object describes none.
    """
    how = _how(device, dtype, attn_implementation)
    spec = _json_object(name)
    if spec is not None:
        try:
            key = ("reward model", json.dumps(spec, sort_keys=True), how)
        except TypeError as error:
            raise ValueError(
                f"a reward model must be made of JSON values, got {name!r}: {error}. Register a "
                "callable under a name and give the name."
            ) from None
        return _cached(key, lambda: _attribute(REWARD_SPEC)(spec, how))
    if not isinstance(name, str):
        raise ValueError(
            f"reward_model must be a name or a JSON object, got {name!r}. Register a callable first: "
            "textenv.register_reward_model('mine', f), then reward_model='mine'."
        )
    return _once("reward model", name, how, lambda source: _reward_function(source, how))


def vocabulary_size(name: str, *, load: bool = False) -> int | None:
    """Number of actions of an environment with this reference; None if only loading the model would tell.

    Without ``load`` it comes from a model already in memory or from the ``config.json`` of a folder.
    """
    for (kind, loaded, _), model in _loaded.items():
        if (kind, loaded) == ("language model", name):
            return model.vocab_size
    if load:
        return language_model(name).vocab_size
    source = _source("language model", name)
    file = Path(source) / "config.json" if isinstance(source, str | Path) else None
    if file is None or not file.is_file():
        return None
    config = json.loads(file.read_text("utf-8"))
    return config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))


def _json_object(source: Any) -> dict[str, Any] | None:
    """A mapping, or a JSON object as text, as a dict; None for anything else."""
    if isinstance(source, str) and source.lstrip().startswith("{"):
        try:
            return json.loads(source)
        except json.JSONDecodeError as error:
            raise ValueError(f"a reward model in braces must be JSON, got {source!r}: {error}. Correct it.") from None
    return dict(source) if isinstance(source, Mapping) else None


def clear_cache() -> None:
    """Forget every loaded model and prompt set, but not their names."""
    _loaded.clear()


def _is_composed(kind: str, name: str) -> bool:
    """Whether a loaded reward model was built from a JSON object, which may contain others by name."""
    return kind == "reward model" and _json_object(_sources[kind].get(name, name)) is not None


def _once(kind: str, name: str, how: Any, load: Callable[[Any], Any]) -> Any:
    return _cached((kind, name, how), lambda: load(_source(kind, name)))


def _cached(key: tuple[str, str, Any], load: Callable[[], Any]) -> Any:
    if key not in _loaded:
        _loaded[key] = load()
    return _loaded[key]


def _source(kind: str, name: str) -> Any:
    """The source of a name; a path, hub id or ``module:attribute`` stands for itself."""
    names = _sources[kind]
    if name in names:
        return names[name]
    hub_id = kind != "prompts" and name.count("/") == 1 and not looks_like_path(name)
    if ":" in name or Path(name).exists() or hub_id:
        return name
    rule = f"{kind} must be a registered name, an existing path or 'module:attribute'"
    raise ValueError(f"{rule}, got {name!r}. {hint(name, names)}Registered: {', '.join(sorted(names)) or 'none'}.")


def _attribute(source: Any) -> Any:
    """``"module:attribute"`` → the object; anything else unchanged."""
    if not (isinstance(source, str) and ":" in source) or Path(source).exists():
        return source
    module_name, _, attribute = source.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'module:attribute' must be importable, got {source!r}: {error}. Correct it.") from error


def _language_model(source: Any, how: Loading) -> "LanguageModel":
    from textenv.lm.adapters import adapter_base
    from textenv.lm.load import LanguageModel, load_language_model, missing_package

    source, arguments = _attribute(source), how.arguments()
    if not callable(source):
        base = adapter_base(source)
        return load_language_model(source, base=_base(base, source, how) if base else None, **arguments)
    loaded = source()
    if not isinstance(loaded, LanguageModel):
        raise ValueError(f"language-model functions must return a LanguageModel, got {type(loaded).__name__}. Wrap it.")
    loaded.model.to(arguments["device"], arguments["dtype"])
    if how.attn_implementation is not None:
        try:
            loaded.model.set_attn_implementation(how.attn_implementation)
        except ImportError as error:
            raise missing_package(error, how.attn_implementation) from error
    return loaded


def _base(name: str, folder: Any, how: Loading) -> "LanguageModel":
    """The shared base of an adapter folder."""
    try:
        return language_model(name, *how)
    except ValueError as error:
        rule = "the base of an adapter must be a registered name, a folder, a hub id or a .gguf file"
        raise ValueError(
            f"{rule}, got {name!r} in the adapter_config.json of {str(folder)!r}: {error} Register it, or correct the "
            "name there."
        ) from error


def _reward_function(source: Any, how: Loading) -> RewardModel:
    if _json_object(source) is not None:
        return reward_model(source, *how)
    source = _attribute(source)
    if callable(source):
        return source  # type: ignore[return-value]
    return _sharing(_attribute(SEQUENCE_CLASSIFIER)(source, **how.arguments()), source)


def _sharing(loaded: Any, source: Any) -> Any:
    """A model that was loaded to be shared; what it has in common with others from files is in memory once."""
    if not callable(_attribute(source)):
        from textenv.registry.sharing import share_matrices

        share_matrices(loaded.model)
    return loaded


def _prompt_records(source: Any) -> Any:
    source = _attribute(source)
    if callable(source):
        return source()
    if isinstance(source, str | Path):
        if not Path(source).exists():
            raise ValueError(
                f"prompts must be an existing file or folder, got {str(source)!r}. Check the path; a data "
                "set of the hub is {'dataset': id, 'column': name}."
            )
        source = {"dataset": str(source)}
    if isinstance(source, Mapping):
        check_dataset(source)
        return read_dataset(**source)
    return source
