"""Summary of the cells of :mod:`benchmarks.overoptimisation`: peaks, fitted forms, ensembles beside members.

A curve is a list of points ``{"kl", "proxy", "gold", …}`` in the order of optimisation, gains in standard deviations
within a prompt. Over seeds: mean and 95 % interval by Student's t.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from reward_models.benchmark.overoptimisation import Form, fit_bend
from textenv.stats import mean_ci95

Curve = list[dict[str, float]]
FIT_UP_TO = 3.5
"""√nats: PPO without a penalty goes on to 60 nats, where gold has long reached its floor and no form bends that far."""


def summarise(
    selected: dict[str, dict[str, Any]], paths: list[dict[str, Any]], word_count: dict[str, Any], true: Curve
) -> dict[str, Any]:
    """All that goes into the JSON: curves, and what was read off them."""
    ppo = [{**path["cell"], "path": gains(path["path"])} for path in paths]
    return {
        "peaks": best_of_n_peaks(selected),
        "ensembles": ensemble_peaks(selected),
        "ppo": ppo_peaks(ppo),
        "ppo_ensembles": ppo_ensemble_peaks(ppo),
        "word_count": exact_peaks(word_count),
        "frontier": frontier(ppo),
        "curves": rounded(
            {
                "best_of_n": {name: cell["best_of_n"] for name, cell in selected.items()},
                "tilted": {name: cell["tilted"] for name, cell in selected.items() if "tilted" in cell},
                "word_count": word_count,
                "true_frontier": true,
                "ppo": ppo,
            }
        ),
    }


def rounded(value: Any) -> Any:
    """Floats to five significant digits, wherever they stand: finer than any picture, and half the file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def gains(path: Curve) -> Curve:
    """A run of PPO as gains over where it started, by KL ≥ 0 (a sampled KL may be just below)."""
    first = path[0]
    return [
        {
            **point,
            "kl": max(point["kl"], 0.0),
            "proxy": point["proxy"] - first["proxy"],
            "gold": point["gold"] - first["gold"],
        }
        for point in path
    ]


def peak(curve: Curve) -> dict[str, float]:
    """The point of highest gold, and how gold and proxy change after it."""
    top = int(np.argmax([point["gold"] for point in curve]))
    return {
        "gold": curve[top]["gold"],
        "root_kl": math.sqrt(max(curve[top]["kl"], 0.0)),
        "last_gold": curve[-1]["gold"],
        "proxy_after": curve[-1]["proxy"] - curve[top]["proxy"],
    }


def averaged(curves: Sequence[Curve]) -> Curve:
    """Point by point, over members and data sets."""
    return [{key: float(np.mean([c[i][key] for c in curves])) for key in curves[0][i]} for i in range(len(curves[0]))]


def bend(form: Form, curve: Curve, up_to: float = math.inf) -> dict[str, Any]:
    """The fitted form, up to a distance."""
    d = np.sqrt([max(point["kl"], 0.0) for point in curve])
    near = d <= up_to
    fitted = fit_bend(form, d[near], np.array([point["gold"] for point in curve])[near])
    return {**fitted._asdict(), "peak_at": fitted.peak if math.isfinite(fitted.peak) else None}


def by_size(selected: dict[str, dict[str, Any]], world: str) -> dict[int, list[dict[str, Any]]]:
    """The data sets of each size."""
    out: dict[int, list[dict[str, Any]]] = {}
    for name, cell in selected.items():
        its_world, size, _ = name.split("-")
        if its_world == world:
            out.setdefault(int(size), []).append(cell["best_of_n"])
    return dict(sorted(out.items()))


def singles(data_set: dict[str, Curve]) -> list[Curve]:
    return [curve for name, curve in data_set.items() if name.isdigit()]


def best_of_n_peaks(selected: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a world and size: single models, over data sets."""
    rows = []
    for world in sorted({name.split("-")[0] for name in selected}):
        for size, data_sets in by_size(selected, world).items():
            curves = [averaged(singles(data_set)) for data_set in data_sets]
            found = [peak(curve) for curve in curves]
            figures = {key: mean_ci95([each[key] for each in found])._asdict() for key in found[0]}
            rows.append({"world": world, "comparisons": size, **figures, "bend": bend("best-of-n", averaged(curves))})
    return rows


def ensemble_peaks(selected: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Peak of each kind of ensemble minus the mean peak of its members, a row a world, size and kind."""
    rows = []
    for world in sorted({name.split("-")[0] for name in selected}):
        for size, data_sets in by_size(selected, world).items():
            for way in (name for name in data_sets[0] if not name.isdigit()):
                peaks = [peak(each[way])["gold"] for each in data_sets]
                members = [float(np.mean([peak(curve)["gold"] for curve in singles(each)])) for each in data_sets]
                kind = {"world": world, "comparisons": size, "combine": way}
                rows.append({**kind, **against_members(peaks, members)})
    return rows


def against_members(ensembles: list[float], members: list[float]) -> dict[str, Any]:
    """Peaks of ensembles beside the mean peaks of their members, one entry a data set."""
    pairs = list(zip(ensembles, members, strict=True))
    return {
        "peak": mean_ci95(ensembles)._asdict(),
        "mean_member": mean_ci95(members)._asdict(),
        "difference": mean_ci95([ensemble - member for ensemble, member in pairs])._asdict(),
        "data_sets_at_or_above": sum(ensemble >= member for ensemble, member in pairs),
    }


def ppo_peaks(ppo: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a world, proxy and KL coefficient, over seeds; members of one data set count as that data set's mean."""
    groups: dict[tuple[str, str, float], dict[int, list[Curve]]] = {}
    for run in ppo:
        key = (run["world"], kind_of(run["proxy"]), run["kl_coef"])
        groups.setdefault(key, {}).setdefault(run["seed"], []).append(run["path"])
    rows = []
    for (world, proxy, kl_coef), seeds in sorted(groups.items()):
        found = [averaged([[peak(curve)] for curve in curves])[0] for curves in seeds.values()]
        every = [point for curves in seeds.values() for curve in curves for point in curve]
        figures = {key: mean_ci95([each[key] for each in found])._asdict() for key in found[0]}
        last = mean_ci95([np.mean([math.sqrt(c[-1]["kl"]) for c in curves]) for curves in seeds.values()])._asdict()
        row = {"world": world, "proxy": proxy, "kl_coef": kl_coef, "seeds": len(seeds), **figures, "last_root_kl": last}
        near = {math.sqrt(point["kl"]) for point in every if 0 < math.sqrt(point["kl"]) <= FIT_UP_TO}
        rows.append({**row, "bend": bend("rl", every, FIT_UP_TO) if len(near) > 2 else None})
    return rows


def kind_of(proxy: str) -> str:
    """``2000-1/3`` is a single model of 2,000 comparisons; ``2000-1/min`` an ensemble; others are named."""
    data, slash, which = proxy.partition("/")
    if not slash:
        return proxy
    return f"{data.split('-')[0]} {'single' if which.isdigit() else which}"


def ppo_ensemble_peaks(ppo: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peak gold of PPO on an ensemble minus the mean peak on its members, without a penalty, a row a kind."""
    peaks: dict[tuple[str, str, str], float] = {}
    for run in ppo:
        if run["world"] == "assistant" and run["kl_coef"] == 0:
            data, _, which = run["proxy"].partition("/")
            peaks[data.split("-")[0], data, which] = peak(run["path"])["gold"]
    rows = []
    for size, way in sorted({(size, which) for size, _, which in peaks if not which.isdigit()}):
        data_sets = sorted({data for s, data, which in peaks if s == size and which == way})
        members = [
            [gold for (_, d, which), gold in peaks.items() if d == data and which.isdigit()] for data in data_sets
        ]
        kind = {"comparisons": int(size), "combine": way, "members": min(map(len, members))}
        means = [float(np.mean(golds)) for golds in members]
        rows.append({**kind, **against_members([peaks[size, data, way] for data in data_sets], means)})
    return rows


def exact_peaks(word_count: dict[str, Any]) -> dict[str, Any]:
    """Micro's hand-made proxy, without any estimate."""
    return {
        "best_of_n": {**peak(word_count["best_of_n"]), "bend": bend("best-of-n", word_count["best_of_n"])},
        "tilted": {**peak(word_count["tilted"]), "bend": bend("rl", word_count["tilted"], FIT_UP_TO)},
    }


def frontier(ppo: list[dict[str, Any]]) -> dict[str, float]:
    """How far below the exact frontiers PPO's points on Micro lie, the reference itself left out; both must be ≥ 0."""
    points = [point for run in ppo if run["world"] == "micro" for point in run["path"][1:]]
    return {
        "points": float(len(points)),
        "least_below_proxy_frontier": min((point["below_frontier"] for point in points), default=math.nan),
        "least_below_gold_frontier": min((point["gold_below_frontier"] for point in points), default=math.nan),
    }
