"""An experiment as one YAML file: names, environments, agents, and what to run. See docs/experiments.md."""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.envs.registration import parse_env_id

from textenv import registry
from textenv.config import REQUIRED, TaskConfig, hint
from textenv.data.datasets import check_dataset
from textenv.data.records import looks_like_path
from textenv.registry.ids import OPTION_KINDS

if TYPE_CHECKING:
    from textenv.registry.yaml_file import Keys, YamlFile

KINDS = {"language_models": "language model", "reward_models": "reward model", "prompts": "prompts"}
"""Sections that define names, and the kind of thing each names."""

BUILT_IN_AGENTS = ("reference", "random")
"""Agents that a run may list without describing them: the environment's reference, and random tokens."""


@dataclass(frozen=True, kw_only=True)
class AgentPlan:
    """A named agent: its algorithm and that algorithm's options."""

    name: str
    algorithm: str
    options: Mapping[str, Any]
    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """The place of each option in the file ("exp.yaml, line 12"), for errors when the agent is run."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What to run: every agent in every environment with every seed."""

    environments: tuple[str, ...]
    """Ids of this file, or registered before."""
    agents: tuple[str, ...]
    """Names from the section ``agents``, or ``BUILT_IN_AGENTS``."""
    seeds: tuple[int, ...]
    total_episodes: int
    """Episodes per run."""
    output: str
    """Folder of the results."""
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Id → options that differ in the environment where agents are measured after training, such as ``prompts``."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A checked experiment file, with absolute paths. Nothing is registered until :meth:`register`."""

    path: str
    """The file."""
    language_models: Mapping[str, str]
    reward_models: Mapping[str, str]
    prompts: Mapping[str, Any]
    environments: Mapping[str, Mapping[str, Any]]
    """Id → keyword arguments of :func:`textenv.register`."""
    agents: Mapping[str, AgentPlan]
    run: RunPlan | None

    def register(self) -> None:
        """Register all names and ids, or none if there is an error. Repeating it changes nothing."""
        with registry.all_or_nothing():
            for section, kind in KINDS.items():
                for name, source in getattr(self, section).items():
                    if registry.registered_sources(kind).get(name) != source:
                        registry.register_source(kind, name, source)
            for env_id, options in self.environments.items():
                if not registry.is_registered(env_id, options):
                    registry.register(env_id, **options)
        folder = str(Path(self.path).parent)
        if folder not in sys.path:
            sys.path.append(folder)  # modules beside the file; last, so that they shadow no others


def load_experiment(path: str | Path) -> Experiment:
    """Read and check an experiment file; register nothing and load no model.

    Raises:
        ValueError: names the file, the line, the key and the remedy.
    """
    from textenv.registry.yaml_file import YamlFile

    return _Reading(YamlFile(Path(path).absolute())).experiment()


class _Reading:
    """One pass over a file: names, environments, agents, run."""

    def __init__(self, file: "YamlFile") -> None:
        self.file, self.folder = file, file.path.parent
        self.names: dict[str, set[str]] = {kind: set(registry.registered_sources(kind)) for kind in KINDS.values()}

    def experiment(self) -> Experiment:
        sections = [field.name for field in dataclasses.fields(Experiment) if field.name != "path"]
        content = self.mapping((), self.file.value, sections)
        given = {section: self.mapping((section,), content.get(section) or {}) for section in sections[:-1]}
        named = {section: self.sources(section, kind, given[section]) for section, kind in KINDS.items()}
        environments = {env_id: self.environment(env_id, value) for env_id, value in given["environments"].items()}
        agents = {name: self.agent(name, value) for name, value in given["agents"].items()}
        run = self.run(content["run"], environments, agents) if content.get("run") is not None else None
        path = str(self.file.path)
        return Experiment(path=path, **named, environments=environments, agents=agents, run=run)

    def mapping(self, keys: "Keys", value: Any, allowed: list[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            what = f"the keys {', '.join(allowed)}" if allowed else "names and their values"
            raise self.file.error(keys, f"must be a mapping of {what}, got {value!r}.")
        for key in value:
            if allowed and key not in allowed:
                known = f"{hint(key, allowed)}Keys: {', '.join(allowed)}."
                raise self.file.error((*keys, key), f"unknown key {key!r}. {known}")
        return value

    def sources(self, section: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
        """Named sources of one section. A name never changes its meaning."""
        out = {}
        for name, value in given.items():
            keys = (section, name)
            if not name or ":" in name:
                raise self.file.error(keys, f"a name must be non-empty and without ':', got {name!r}. Rename it.")
            if isinstance(value, str) and value in self.names[kind]:
                raise self.file.error(keys, f"must not be a registered name, got {value!r}. Use it directly.")
            out[name] = self.source(kind, value, keys)
            if registry.registered_sources(kind).get(name, out[name]) != out[name]:
                raise self.file.error(keys, f"a {kind} must keep its source, got another. Choose another name.")
        self.names[kind] |= out.keys()
        return out

    def source(self, kind: str, value: Any, keys: "Keys") -> Any:
        """A name unchanged, a path made absolute; anything else is refused."""
        if kind == "prompts" and isinstance(value, list | dict):
            return self.prompts(value, keys)
        if kind == "reward model" and isinstance(value, dict):
            return value  # a JSON object, checked when it is built
        if not isinstance(value, str) or not value:
            raise self.file.error(keys, f"must be a registered name, path or 'module:attribute', got {value!r}.")
        if value in self.names[kind]:
            return value
        path = self.folder / value
        if path.exists():
            return os.path.abspath(path)
        if looks_like_path(value):
            raise self.file.error(keys, f"must exist, got {value!r}, which is not at {str(path)!r}. Check the path.")
        if ":" in value:
            return self.attribute(value, keys)
        if kind != "prompts" and value.count("/") == 1:
            return value  # a hub id, which only loading can check
        rule = f"{kind} must be a registered name, an existing path or 'module:attribute', got {value!r}"
        known = f"{hint(value, self.names[kind])}Names: {', '.join(sorted(self.names[kind])) or 'none'}."
        raise self.file.error(keys, f"{rule}. {known}")

    def prompts(self, value: list[Any] | dict[str, Any], keys: "Keys") -> Any:
        try:
            if isinstance(value, list):
                registry.prompt_set(value)
                return value
            check_dataset(value)
        except ValueError as error:
            raise self.file.error(keys, str(error)) from None
        path = self.folder / value["dataset"]
        if not path.exists() and looks_like_path(value["dataset"]):
            raise self.file.error((*keys, "dataset"), f"must exist, got {value['dataset']!r}. Check the path.")
        return {**value, "dataset": os.path.abspath(path) if path.exists() else value["dataset"]}

    def attribute(self, value: str, keys: "Keys") -> str:
        """``module:attribute`` whose module can be found, installed or beside the file. It is not imported yet."""
        top = value.partition(":")[0].partition(".")[0]
        found = top in sys.modules or importlib.util.find_spec(top) or PathFinder.find_spec(top, [str(self.folder)])
        if not found:
            remedy = f"Install {top!r} or put it into {str(self.folder)!r}."
            raise self.file.error(keys, f"'module:attribute' must be importable, got {value!r}. {remedy}")
        return value

    def environment(self, env_id: str, value: Any) -> dict[str, Any]:
        keys: Keys = ("environments", env_id)
        options = dict(self.mapping(keys, value, [*TaskConfig.option_names(), "description"]))
        try:
            parse_env_id(env_id)
        except gymnasium.error.Error as error:
            raise self.file.error(keys, str(error)) from None
        for name in REQUIRED:
            if options.get(name) is None:
                raise self.file.error(keys, f"{name} must be given. Needed are {', '.join(REQUIRED)}.")
        for name, kind in OPTION_KINDS.items():
            if options.get(name) is not None:
                options[name] = self.source(kind, options[name], (*keys, name))
        described = options.pop("description", "")
        try:
            registry.check_options(options)
        except ValueError as error:
            option = str(error).split(maxsplit=1)[0]
            raise self.file.error((*keys, option) if option in options else keys, str(error)) from None
        if env_id in gymnasium.registry and not registry.is_registered(env_id, options):
            raise self.file.error(keys, "an id must keep its options, got others. Raise its -v for a new version.")
        return {**options, "description": str(described)}

    def agent(self, name: str, value: Any) -> AgentPlan:
        keys: Keys = ("agents", name)
        options = dict(self.mapping(keys, value))
        algorithm = options.pop("algorithm", None)
        if not isinstance(algorithm, str):
            raise self.file.error(keys, f"algorithm must be a name, got {algorithm!r}. Name one, like ppo.")
        places = {key: f"{self.file.path}, line {self.file.lines[*keys, key]}" for key in value}
        return AgentPlan(name=name, algorithm=algorithm, options=options, places=places)

    def run(self, value: Any, environments: Mapping[str, Any], agents: Mapping[str, Any]) -> RunPlan:
        names = [field.name for field in dataclasses.fields(RunPlan)]
        given = self.mapping(("run",), value, names)
        for name in names[:-1]:
            if given.get(name) is None:
                raise self.file.error(("run",), f"{name} must be given. Needed are {', '.join(names[:-1])}.")
        known = {"environments": {*environments, *gymnasium.registry}, "agents": {*agents, *BUILT_IN_AGENTS}}
        for name, choices in known.items():
            for i, item in enumerate(self.items(name, given[name], str)):
                if item not in choices:
                    raise self.file.error(
                        ("run", name, i),
                        f"must be one that exists, got {item!r}. {hint(item, choices)}"
                        f"This file has: {', '.join(environments if name == 'environments' else agents) or 'none'}.",
                    )
        self.items("seeds", given["seeds"], int)
        episodes, output = given["total_episodes"], given["output"]
        if type(episodes) is not int or episodes < 1:
            raise self.file.error(("run", "total_episodes"), f"must be a whole number, 1 or more, got {episodes!r}.")
        if not isinstance(output, str):
            raise self.file.error(("run", "output"), f"must be a folder, got {output!r}. Name one.")
        lists = {name: tuple(given[name]) for name in ("environments", "agents", "seeds")}
        measured = self.evaluation(given.get("evaluation") or {}, given["environments"])
        return RunPlan(**lists, total_episodes=episodes, output=str(self.folder / output), evaluation=measured)

    def evaluation(self, value: Any, environments: list[str]) -> dict[str, dict[str, Any]]:
        """Options by environment id, with names and paths resolved."""
        out = {}
        for env_id, options in self.mapping(("run", "evaluation"), value, environments).items():
            keys: Keys = ("run", "evaluation", env_id)
            given = dict(self.mapping(keys, options, TaskConfig.option_names()))
            for name, kind in OPTION_KINDS.items():
                if given.get(name) is not None:
                    given[name] = self.source(kind, given[name], (*keys, name))
            out[env_id] = given
        return out

    def items(self, name: str, value: Any, kind: type) -> list[Any]:
        """A list of distinct items of one type."""
        what = "names" if kind is str else "whole numbers"
        if not isinstance(value, list) or not value or any(type(item) is not kind for item in value):
            raise self.file.error(("run", name), f"must be a list of {what}, got {value!r}. Write it like [a, b].")
        for i, item in enumerate(value):
            if item in value[:i]:
                raise self.file.error(("run", name, i), f"an item must appear once, got {item!r} twice. Remove one.")
        return value
