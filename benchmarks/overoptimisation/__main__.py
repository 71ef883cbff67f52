"""Where does optimising a reward model stop helping, and do comparisons, KL penalties or ensembles move that point?

Reward models are trained on 200 … 8,000 comparisons (a comparison is one pair of answers and one simulated label), four
members to a data set that differ in the order of training, three data sets to a size. Each is then optimised

* by best-of-n: on the embedded world from a pool of samples a test prompt (unbiased over subsets; KL as its upper
  bound), on Micro by enumeration (KL exact);
* by PPO with several KL coefficients, single models and ensembles of four (Coste et al. 2023), measured on held-out
  prompts with sampled KL, or on Micro by enumeration.

Gold is the judge that made the labels. Axes are √KL, and gains are fitted with the forms of Gao, Schulman, Hilton
(2022). On Micro no point of PPO may lie above the exact frontier of tilted policies: the run fails if one does.

Command: ``python -m benchmarks.overoptimisation`` (two to three hours on one core; finished cells are not run again,
and several processes may share the work: ``--worlds micro`` in one, ``--worlds assistant`` in another, then both).
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from transformers.utils import logging as hf_logging

import textenv
from agents.core.agent import LanguageModelAgent
from agents.demo.judge import assistant_env, gold_of
from agents.ppo import PPO, PPOConfig
from benchmarks.overoptimisation.summary import summarise
from benchmarks.record import write_result
from reward_models.benchmark.measures.best_of_n import expected_best, kl_bound
from reward_models.benchmark.suites import Pool, sample_pool
from reward_models.scorers.ensemble import combined
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.data.records import write_json
from textenv.evaluation import evaluate
from textenv.protocols import RewardModel
from textenv.stats import standard_error, within_prompt_sd
from textenv.tasks import assistant, micro
from textenv.tasks.exact import ExactWorld, exact_world
from textenv.vector import make_vec

SIZES = (200, 600, 2_000, 8_000)
"""Numbers of comparisons."""
REWARD = RewardConfig(learning_rate=1e-3, epochs=2, batch_size=32)
MEMBERS = 4
ENSEMBLES = ("mean", "min", "mean_minus_std")
POOL = 256
"""Answers per prompt for best-of-n."""
NUM_PROMPTS = 256
"""Test prompts for best-of-n."""
WORD_COUNT = "benchmarks.overoptimisation:count_wanted"
"""Micro's hand-made proxy."""


class World(NamedTuple):
    """Where reward models are trained and optimised."""

    reference: str
    prompts: Callable[[], list[str]]
    gold: RewardModel
    max_new_tokens: int


WORLDS = {
    "assistant": World(
        "assistant-sft",
        lambda: [prompt.text for prompt in assistant.prompts("train")],
        assistant.gold_scores,
        assistant.MAX_NEW_TOKENS,
    ),
    "micro": World("micro-reference", micro.prompts, micro.gold_scores, 4),
}


class PPOCell(NamedTuple):
    """One run of PPO."""

    world: str
    proxy: str
    """``word-count``, or ``<comparisons>-<data seed>/<member or way to combine all>``."""
    kl_coef: float
    seed: int
    updates: int


# -- reward models -------------------------------------------------------------------------------------------------


def comparisons(world: World, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` labelled pairs of different answers of the reference, over the training prompts in turn."""
    prompts = world.prompts()
    width = 2 * math.ceil(1.5 * count / len(prompts)) + 2  # some pairs are equal, and tell nothing
    lm = textenv.language_model(world.reference)
    pool = sample_pool(lm, prompts, world.gold, count=width, max_new_tokens=world.max_new_tokens, seed=seed)
    rng = np.random.default_rng(seed)
    records = []
    for k in range(0, width, 2):
        for x, prompt in enumerate(prompts):
            pair = pool.texts.responses[x * width + k : x * width + k + 2]
            if pair[0] != pair[1] and len(records) < count:
                ranking = assistant.rank(pool.gold[x, k : k + 2].tolist(), rng)
                records.append({"prompt": prompt, "responses": pair, "ranking": ranking})
    assert len(records) == count
    return records


def members(world_name: str, size: int, data_seed: int, folder: Path) -> list[Path]:
    """Folders of the reward models trained on one data set; made where they are missing."""
    world = WORLDS[world_name]
    paths = [folder / world_name / f"{size}-{data_seed}" / f"member-{m}" for m in range(MEMBERS)]
    if not all((path / "config.json").is_file() for path in paths):
        records = comparisons(world, size, 1_000 * data_seed + size)
        for m, path in enumerate(paths):
            config = replace(REWARD, seed=100 * data_seed + m)
            if not (path / "config.json").is_file():
                train_reward_model(start_reward_model(world.reference), records, config, path, resume=True)
    return paths


def proxy_spec(cell: PPOCell, folder: Path) -> Any:
    """The environment's ``reward_model``."""
    if cell.proxy == "word-count":
        return WORD_COUNT
    data, _, which = cell.proxy.partition("/")
    size, data_seed = map(int, data.split("-"))
    paths = [str(path) for path in members(cell.world, size, data_seed, folder)]
    return paths[int(which)] if which.isdigit() else {"ensemble": paths, "combine": which}


# -- best-of-n ------------------------------------------------------------------------------------------------------


@cache
def test_pool() -> Pool:
    """Answers of the reference to distinct test prompts."""
    prompts = list(dict.fromkeys(prompt.text for prompt in assistant.prompts("test")))[:NUM_PROMPTS]
    lm = textenv.language_model("assistant-sft")
    return sample_pool(lm, prompts, assistant.gold_scores, count=POOL, max_new_tokens=assistant.MAX_NEW_TOKENS, seed=5)


def pool_scores(paths: Iterable[Path]) -> np.ndarray:
    """``[M, X, N]``: scores of the pool by every member; equal answers to one prompt are read once."""
    pool = test_pool()
    texts = list(zip(pool.texts.prompts, pool.texts.responses, strict=True))
    unique = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    rows = np.array([place[text] for text in texts])
    prompts, responses = [text[0] for text in unique], [text[1] for text in unique]
    scores = [np.asarray(textenv.reward_model(str(path))(prompts, responses))[rows] for path in paths]
    return np.stack(scores).reshape(len(scores), *pool.gold.shape)


def sampled_best_of_n(scores: np.ndarray, gold: np.ndarray) -> list[dict[str, float]]:
    """Gains over n = 1 in standard deviations within a prompt; KL as its upper bound."""
    prompt = np.repeat(np.arange(len(gold)), gold.shape[1])
    units = within_prompt_sd(scores.ravel(), prompt), within_prompt_sd(gold.ravel(), prompt)
    points = []
    for n in (2**k for k in range(POOL.bit_length())):
        proxy_gain = expected_best(scores, scores, n) - scores.mean(1)
        gold_gain = expected_best(scores, gold, n) - gold.mean(1)
        points.append(
            {
                "n": n,
                "kl": kl_bound(n),
                "proxy": float(proxy_gain.mean()) / units[0],
                "gold": float(gold_gain.mean()) / units[1],
                "gold_se": standard_error(gold_gain) / units[1],
            }
        )
    return points


def best_of_n_cell(world_name: str, size: int, data_seed: int, folder: Path) -> dict[str, Any]:
    """Curves of every member and every ensemble of one data set."""
    paths = members(world_name, size, data_seed, folder)
    if world_name == "assistant":
        gold = test_pool().gold
        scores = pool_scores(paths)
        curve: Callable[[np.ndarray], list[dict[str, float]]] = lambda each: sampled_best_of_n(each, gold)  # noqa: E731
        pairs = None
    else:
        worlds = [micro_world(str(path), 0.0) for path in paths]
        scores = np.stack([world.rewards.numpy() for world in worlds])
        curve = exact_best_of_n
        pairs = [exact_tilted(each) for each in scores]
    named = {str(m): scores[m] for m in range(len(paths))}
    named |= {way: np.stack([combined(row, way, 1.0) for row in scores.swapaxes(0, 1)]) for way in ENSEMBLES}
    out: dict[str, Any] = {"best_of_n": {name: curve(each) for name, each in named.items()}}
    return out if pairs is None else {**out, "tilted": dict(zip(map(str, range(len(paths))), pairs, strict=True))}


# -- Micro, by enumeration ------------------------------------------------------------------------------------------


@cache
def micro_world(reward_model: str, kl_coef: float) -> ExactWorld:
    env = gymnasium.make("textenv/Micro-v0", reward_model=reward_model, kl_coef=kl_coef)
    return exact_world(env)


@cache
def gold_world() -> ExactWorld:
    return exact_world(gymnasium.make("textenv/Micro-v0"))


@cache
def _gold() -> tuple[np.ndarray, float, float]:
    """Gold of every response, its mean under the reference, and its standard deviation within a prompt."""
    world = gold_world()
    gold, ref = world.rewards.numpy(), world.ref_logprobs.exp().numpy()
    mean = (ref * gold).sum(1, keepdims=True)
    return gold, float(mean.mean()), math.sqrt(float((ref * (gold - mean) ** 2).sum(1).mean()))


def exact_point(logprobs: torch.Tensor, kl: float, proxy: np.ndarray) -> dict[str, float]:
    """Gains of a policy over the reference, in standard deviations within a prompt, from log π(y|x)."""
    gold, gold_mean, gold_sd = _gold()
    ref = micro_world(WORD_COUNT, 0.0).ref_logprobs.exp().numpy()
    centre = (ref * proxy).sum(1, keepdims=True)
    sd = math.sqrt(float((ref * (proxy - centre) ** 2).sum(1).mean()))
    p = logprobs.exp().numpy()
    expected = float((p * proxy).sum(1).mean())
    return {
        "kl": kl,
        "proxy": (expected - float(centre.mean())) / sd,
        "gold": (float((p * gold).sum(1).mean()) - gold_mean) / gold_sd,
        "proxy_raw": expected,
    }


def exact_best_of_n(proxy: np.ndarray) -> list[dict[str, float]]:
    world = micro_world(WORD_COUNT, 0.0)
    points = []
    for n in (2**k for k in range(13)):
        chosen = world.best_of_n(n, torch.from_numpy(proxy))
        points.append({"n": n, **exact_point(chosen.logprobs, chosen.kl, proxy)})
    return points


def exact_tilted(proxy: np.ndarray) -> list[dict[str, float]]:
    """Policies ``∝ π_ref exp(proxy / β)``: the best that any agent could make of the proxy at each KL."""
    world = micro_world(WORD_COUNT, 0.0)
    points = []
    for kl_coef in np.geomspace(30.0, 0.02, 60):
        logprobs = world.tilted(float(kl_coef), torch.from_numpy(proxy))
        points.append({"kl_coef": float(kl_coef), **exact_point(logprobs, world.kl(logprobs), proxy)})
    return points


# -- PPO ------------------------------------------------------------------------------------------------------------


def ppo_cell(cell: PPOCell, folder: Path) -> dict[str, Any]:
    """The path of one run: proxy, gold and KL after every few updates, more often at first."""
    spec = proxy_spec(cell, folder)
    if cell.world == "assistant":
        config = PPOConfig(learning_rate=1e-4, per_token_kl=True, seed=cell.seed)
        env = assistant_env("train", reward_model=spec, kl_coef=cell.kl_coef)
        measure = _sampled_measure(spec)
    else:
        config = PPOConfig(learning_rate=3e-4, seed=cell.seed)
        env = make_vec("textenv/Micro-v0", 256, reward_model=spec, kl_coef=cell.kl_coef)
        measure = _exact_measure(exact_world(env))
    agent = PPO(env, config)
    path, done = [], 0
    for update in [u for u in (0, 1, 2, 3, 4, 6, 8, 10, 12, 15, *range(20, 1_000, 10)) if u <= cell.updates]:
        if update > done:
            agent.learn((update - done) * config.batch_size)
        path.append({"update": update, **measure(agent, update)})
        done = update
    return {"cell": cell._asdict(), "path": path}


def _sampled_measure(spec: Any) -> Callable[[PPO, int], dict[str, float]]:
    """Every test prompt answered once. The proxy's unit is a reward model's own: its spread within a prompt."""
    held_out = assistant_env("test", reward_model=spec, kl_coef=0.0)
    pool = test_pool()
    unit = within_prompt_sd(pool.gold.ravel(), np.repeat(np.arange(len(pool.gold)), pool.gold.shape[1]))

    def measure(agent: PPO, done: int) -> dict[str, float]:
        result = evaluate(LanguageModelAgent(agent.policy, agent.task, seed=done), held_out)
        assert result.kl is not None
        gold = gold_of(result) / unit
        return {
            "kl": float(result.kl.mean()),
            "proxy": float(result.rm_scores.mean()),
            "gold": float(gold.mean()),
            "gold_se": standard_error(gold),
        }

    return measure


def _exact_measure(world: ExactWorld) -> Callable[[PPO, int], dict[str, float]]:
    """Exact curves. No policy may have more proxy, or more gold, than the tilted policy of the same KL."""
    proxy, true = world.rewards.numpy(), gold_world()

    def measure(agent: PPO, done: int) -> dict[str, float]:
        logprobs = world.sequence_logprobs(agent.policy.model)
        kl = world.kl(logprobs)
        point = exact_point(logprobs, kl, proxy)
        below = {
            "below_frontier": world.frontier_reward_at(kl) - point["proxy_raw"],
            "gold_below_frontier": true.frontier_reward_at(kl) - true.expected_reward(logprobs),
        }
        if min(below.values()) < -1e-6:  # at KL 0 the bisection of the frontier stops 2e-9 away from it
            raise AssertionError(f"a policy lies above the exact frontier at KL {kl}: {below}. A sum is wrong.")
        return {**point, **below}

    return measure


# -- the plan -------------------------------------------------------------------------------------------------------


def ppo_cells(seeds: Sequence[int], worlds: Sequence[str]) -> list[PPOCell]:
    """Seed by seed, so that an unfinished run has whole comparisons."""
    cells = []
    for seed in seeds:
        if "micro" in worlds:
            for kl_coef in (0.0, 0.1, 0.3, 1.0):
                cells.append(PPOCell("micro", "word-count", kl_coef, seed, 100))
                cells.append(PPOCell("micro", f"200-{seed}/0", kl_coef, seed, 100))
        if "assistant" in worlds:
            kinds = (*map(str, range(MEMBERS)), "mean", "min")
            cells += [PPOCell("assistant", f"2000-{seed}/{kind}", 0.0, seed, 80) for kind in kinds]
            cells += [PPOCell("assistant", f"{size}-{seed}/0", 0.0, seed, 80) for size in (200, 8_000)]
            cells += [PPOCell("assistant", f"2000-{seed}/0", kl_coef, seed, 80) for kl_coef in (0.05, 0.2, 0.5)]
    return cells


def once(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a finished cell, or the work done now."""
    if not path.is_file():
        print(f"… {path.stem}", flush=True)
        write_json(path, work())
    return json.loads(path.read_text("utf-8"))


def main(
    seeds: tuple[int, ...] = (1, 2, 3),
    worlds: tuple[Literal[tuple(WORLDS)], ...] = ("micro", "assistant"),
    output: Path = Path("runs/overoptimisation"),
) -> None:
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    selected: dict[str, Any] = {}
    paths: list[dict[str, Any]] = []
    for world in worlds:
        for seed in seeds:
            for size in SIZES:
                name = f"{world}-{size}-{seed}"
                work = lambda world=world, size=size, seed=seed: best_of_n_cell(world, size, seed, output)  # noqa: E731
                selected[name] = once(output / "best-of-n" / f"{name}.json", work)
    for cell in ppo_cells(seeds, worlds):
        name = f"{cell.world}-{cell.proxy.replace('/', '-')}-beta{cell.kl_coef}-{cell.seed}"
        paths.append(once(output / "ppo" / f"{name}.json", lambda cell=cell: ppo_cell(cell, output)))
    if set(worlds) < set(WORLDS):
        return print("finished; run again with both worlds to write the summary")
    proxy = micro_world(WORD_COUNT, 0.0).rewards.numpy()
    word_count = {"best_of_n": exact_best_of_n(proxy), "tilted": exact_tilted(proxy)}
    true = exact_tilted(_gold()[0])  # no policy has more gold at its KL than these
    figures = summarise(selected, paths, word_count, true)
    print(write_result("overoptimisation", figures))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
