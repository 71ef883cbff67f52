"""Environment ids: registering them with Gymnasium, checking their options, and looking them up."""

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from textenv.config import REQUIRED, TaskConfig, hint
from textenv.data.datasets import check_dataset
from textenv.data.records import as_prompt_set
from textenv.registry import sources

OPTION_KINDS = {"prompts": "prompts", "reference": "language model"}
OPTION_KINDS |= {"reward_model": "reward model", "gold": "reward model"}
"""Options of an environment that are names or paths."""

_descriptions: dict[str, str] = {}


def register(
    id: str,
    *,
    prompts: Any,
    reference: str | None,
    reward_model: str | Mapping[str, Any] | None,
    max_prompt_tokens: int,
    max_new_tokens: int,
    description: str = "",
    **defaults: Any,
) -> None:
    """Register a text-generation environment, single and vector, under a Gymnasium id.

    ``gym.make`` can override all options. An existing id is replaced, with a warning; an error registers nothing.

    Args:
        id: like ``"myteam/Polite-v0"``; a changed task is a new version.
        prompts, reference, reward_model, max_prompt_tokens, max_new_tokens, defaults: the options of
            :class:`textenv.config.TaskConfig`; None leaves a required one to ``gym.make``.
        description: one line, which ``textenv envs`` lists.

    Raises:
        ValueError: an option does not exist, has a wrong value, or is not JSON.
    """
    given = {"prompts": prompts, "reference": reference, "reward_model": reward_model}
    given |= {"max_prompt_tokens": max_prompt_tokens, "max_new_tokens": max_new_tokens, **defaults}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    check_options(options)
    if id in gymnasium.registry:
        gymnasium.logger.warn(
            "%s", f"id {id!r} was registered before and is replaced. A changed task is a new version: raise its -v."
        )
    with all_or_nothing():
        gymnasium.registry.pop(id, None)
        gymnasium.register(
            id=id,
            entry_point="textenv.env:TextEnv",
            vector_entry_point="textenv.vector:TextVectorEnv",
            kwargs=json.loads(json.dumps(options)),  # a copy: the caller may change its lists later
            # No max_episode_steps: the length budget belongs to the task, which scores the episodes that it ends.
        )
        _descriptions[id] = description


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse unknown options, wrong values and values that are not JSON. Loads no model."""
    task = {name: value for name, value in options.items() if name != "render_mode"}
    TaskConfig.check_names(task)
    if all(task.get(name) is not None for name in REQUIRED):
        TaskConfig(**task)
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"option {name} must be a JSON value, so that the spec can be written down, got {value!r}. "
                "Register the object under a name (textenv.register_prompts, register_reward_model, "
                "register_language_model) and give the name."
            ) from None
    prompts = options.get("prompts")
    if isinstance(prompts, Mapping):
        check_dataset(prompts)
    elif isinstance(prompts, list | tuple):
        as_prompt_set(prompts)


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Undo the registrations of a block that fails."""
    stores: list[dict[Any, Any]] = [*sources.stores(), _descriptions, gymnasium.registry]
    before = [dict(store) for store in stores]
    try:
        yield
    except BaseException:
        for store, content in zip(stores, before, strict=True):
            store.clear()
            store.update(content)
        raise


def environment_spec(env_id: str) -> EnvSpec:
    """The spec of a registered id; ``"module:id"`` imports the module first.

    Raises:
        ValueError: the id does not exist; suggests the closest one.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    except (ImportError, gymnasium.error.Error) as error:
        raise ValueError(
            f"an environment must be a registered id, got {env_id!r}. {hint(name, gymnasium.registry)}"
            f"`textenv envs` lists the ids of this package. ({error})"
        ) from None


def described(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an environment as JSON that says what they mean: with what their names stand for, absolute paths, and
    a digest of prompts that are listed.

    What files hold is not looked at.
    """
    out = dict(options)
    for name, kind in OPTION_KINDS.items():
        if isinstance(options.get(name), str) and Path(options[name]).exists():
            out[name] = str(Path(options[name]).absolute())
        out |= {f"{kind} {key!r}": value for key, value in sources.behind_names(kind, options.get(name)).items()}
    out = json.loads(json.dumps(out))
    listed = {name: _digest(value) for name, value in out.items() if "prompts" in name and isinstance(value, list)}
    return out | listed


def _digest(prompts: list[Any]) -> str:
    return f"{len(prompts)} prompts, SHA-256 {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]}"


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names under which two JSON objects differ; of an object inside, the names in it."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    inner = [name for name in names if isinstance(before.get(name), dict) and isinstance(now.get(name), dict)]
    return [f"{name}.{part}" for name in inner for part in changed(before[name], now[name])] + [
        name for name in names if name not in inner
    ]


def is_registered(env_id: str, options: Mapping[str, Any]) -> bool:
    """Whether an id is registered with exactly these options, apart from its description."""
    spec = gymnasium.registry.get(env_id)
    return spec is not None and spec.kwargs == {key: value for key, value in options.items() if key != "description"}


def registered_ids() -> dict[str, str]:
    """Ids registered through :func:`register`, with their descriptions, that Gymnasium still knows."""
    return {env_id: text for env_id, text in _descriptions.items() if env_id in gymnasium.registry}
