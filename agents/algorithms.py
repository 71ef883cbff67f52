"""Algorithms by name. A new one is one file with a class, and one line here.

Everything else follows from the class: flags and options from its config, training from its method ``train``
(:class:`agents.core.job.Algorithm`). Importing this module imports none of them.
"""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from textenv.config import hint
from textenv.registry.experiment import AgentPlan

LEARNERS = {
    "ppo": "agents.ppo:PPO",
    "rloo": "agents.rloo:RLOO",
    "grpo": "agents.grpo:GRPO",
    "reinforce": "agents.reinforce:Reinforce",
    "online-dpo": "agents.online_dpo:OnlineDPO",
}
"""Learners of this package. Each is also a command of ``textenv``, with the first line of its file as help."""

ALGORITHMS = {
    **LEARNERS,
    "dpo": "agents.dpo:DPO",
    "sb3-ppo": "agents.sb3.training:SB3PPO",
    "sb3-a2c": "agents.sb3.training:SB3A2C",
    "sb3-maskable-ppo": "agents.sb3.masks:SB3MaskablePPO",
    "best-of-n": "agents.best_of_n:BestOfN",
    "reference": "agents.baselines:ReferenceAgent",
    "random": "agents.baselines:RandomAgent",
}
"""Everything that an experiment file may name."""


def algorithm(name: str) -> Any:
    """The class behind a name; a subclass of :class:`agents.core.job.Algorithm`.

    Raises:
        ValueError: no algorithm has that name, or a package that it needs is not installed.
    """
    if name not in ALGORITHMS:
        known = f"{hint(name, ALGORITHMS)}Algorithms: {', '.join(ALGORITHMS)}."
        raise ValueError(f"algorithm must be a known name, got {name!r}. {known}")
    module, _, attribute = ALGORITHMS[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != "sb3_contrib":
            raise
        raise ValueError(f"{name} needs sb3-contrib. Install it: pip install 'textenv[sb3]'.") from error


def summary(name: str) -> str:
    """The first line of an algorithm's file, read without importing it."""
    spec = find_spec(ALGORITHMS[name].partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8")))
    assert docstring is not None
    return docstring.splitlines()[0]


def check_plan(plan: AgentPlan) -> None:
    """Refuse an unknown algorithm or option before anything runs.

    Raises:
        ValueError: names the line of the experiment file.
    """
    place = plan.places.get("algorithm", f"agent {plan.name!r}")
    try:
        kind = algorithm(plan.algorithm)
        options = kind.option_names()
        for name in plan.options:
            if name not in options:
                place = plan.places.get(name, place)
                known = f"{hint(name, options)}Options: {', '.join(options) or 'none'}."
                raise ValueError(f"an option must be one that {plan.algorithm} has, got {name!r}. {known}")
        kind.check(plan.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
