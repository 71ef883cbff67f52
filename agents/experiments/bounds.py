"""Where the agents of an environment stand on the way from its reference to its optimum."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from matplotlib.axes import Axes

from agents.core.checkpoint import UNCLEAR
from textenv.data.records import write_json
from textenv.evaluation import optimum
from textenv.pages.figures import INK
from textenv.vector import TextVectorEnv, make_vec

SAMPLES = 8_192
"""Responses of the reference from which an optimum is estimated, over all prompts, unless a number is given."""


OptimumSamples = Literal[0] | Annotated[int, Ge(2), "One response has no spread."]
"""Responses of the reference to each prompt; 0: no estimate."""


def with_bounds(results: list[dict[str, Any]], output: str | Path) -> list[dict[str, Any]]:
    """The results with the ``bounds`` of their environment, and their ``share`` of the way where the KL is known.

    Bounds are estimated once and kept in ``bounds.json``. An environment without a KL penalty has none.
    """
    path = Path(output) / "bounds.json"
    known: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    out = []
    for result in results:
        settings, figures = result["settings"], result["figures"]
        key = _key(settings)
        if key not in known:
            known[key] = bounds_of(make_vec(settings["env_id"], 128, **settings["evaluation"]))
            write_json(path, known)
        bounds = known[key]
        if bounds is not None and "kl" in figures:
            gain = figures["reward"] - bounds["reference"]
            figures = {**figures, "share": gain / (bounds["optimum"] - bounds["reference"])}
        out.append({**result, "figures": figures, "bounds": bounds})
    return out


def known_bounds(output: Path, settings: Mapping[str, Any]) -> dict[str, float] | None:
    """What :func:`with_bounds` has kept for the environment of a cell; None if nothing."""
    path = output / "bounds.json"
    return json.loads(path.read_text("utf-8")).get(_key(settings)) if path.is_file() else None


def _key(settings: Mapping[str, Any]) -> str:
    world = json.dumps([settings["env_id"], settings["evaluated"]], sort_keys=True)
    return f"{settings['env_id']} {hashlib.sha256(world.encode()).hexdigest()[:16]}"


def bounds_of(env: TextVectorEnv, samples: int | None = None) -> dict[str, float] | None:
    """Objective of the reference and of the best policy, as :func:`textenv.evaluation.optimum` estimates them from so
    many ``samples`` a prompt; None without a KL penalty."""
    if env.kl_coef <= 0:
        return None
    best = optimum(env, samples or max(8, SAMPLES // len(env.task.prompts.ids)))
    low, high = best.ci95
    figures = {"reference": best.reference.mean, "optimum": best.value, "low": low, "high": high}
    return {**figures, "unclear_prompts": best.unclear_prompts}


def draw_bounds(axes: Axes, bounds: Mapping[str, float]) -> None:
    """Reference and optimum as dotted lines; the optimum as "≥" where the samples show too little of it."""
    sign = "≥" if bounds["unclear_prompts"] > UNCLEAR else "≈"
    for key, name in {"reference": "reference", "optimum": f"optimum {sign} {bounds['optimum']:.2f}"}.items():
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.axhline(bounds[key], color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
        axes.annotate(name, (0.99, bounds[key]), fontsize=9, **place)
