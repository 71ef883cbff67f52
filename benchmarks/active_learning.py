"""Does asking first where reward models disagree save labels?

On the embedded world: the shipped SFT model answers 1,600 training prompts four times each, and a simulated annotator
ranks what it is asked. Two orders are compared, from the same first 100 rankings, drawn at random:

* **given**: the next prompts in random order;
* **uncertain**: those on which three reward models disagree most, each trained on a resample of the rankings so far
  (query by bagging, Abe and Mamitsuka 1998), as ``textenv feedback serve --order uncertain`` orders them.

After 100, 200, 400 and 800 rankings a reward model is trained on all of them and measured on held-out prompts, ranked
by four annotators each: accuracy per pair and NLL per pair, over three seeds. Labels are drawn once per seed and item,
so both orders get the same answer to the same question.

Command: ``python -m benchmarks.active_learning`` (about ten minutes on two cores).
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro

from benchmarks.record import write_result
from reward_models.evaluation import evaluate_reward_model
from reward_models.feedback.create import Plan, Sampling, add_sampled
from reward_models.feedback.order import order_by_disagreement
from reward_models.feedback.project import Item, Project
from reward_models.preferences import Ranking, load_rankings
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv import registry
from textenv.data.records import PromptSet
from textenv.pages.terminal import print_table
from textenv.stats import mean_ci95
from textenv.tasks import assistant

K, MEMBERS, ANNOTATORS = 4, 3, 4


def answered(path: Path, prompts: Sequence[str], seed: int) -> Project:
    """A project with K answers of the SFT model to each prompt."""
    project = Project.create(path, "ranking", {"seed": seed})
    model = registry.language_model("assistant-sft")
    sampling = Sampling(max_new_tokens=24, batch_size=512, seed=seed)
    add_sampled(project, PromptSet(tuple(prompts), {}), [model], K, sampling, Plan(overlap=0.0), lambda *_: None)
    return project


def labels(items: Sequence[Item], seed: int) -> list[Ranking]:
    """One simulated annotator's ranking of each item."""
    responses = [[response.text for response in item.responses] for item in items]
    return load_rankings(assistant.sample_rankings([item.prompt for item in items], responses, seed))


def train(rankings: Sequence[Ranking], seed: int) -> TransformerRewardModel:
    """A reward model of the SFT trunk."""
    config = RewardConfig(
        learning_rate=1e-3, epochs=6, batch_size=16, freeze_embeddings=True, loss="listwise", seed=seed
    )
    return train_reward_model(registry.language_model("assistant-sft"), rankings, config).model


def curve(
    project: Project, items: Sequence[Item], said: Sequence[Ranking], held_out: Sequence[Ranking], order: str,
    budgets: Sequence[int], seed: int,
) -> list[dict[str, float]]:  # fmt: skip
    """Figures after each number of rankings."""
    rng = np.random.default_rng(seed)
    queue = list(rng.permutation(len(items)))
    asked: list[int] = []
    figures = []
    for budget in budgets:
        if asked and order == "uncertain":
            resamples = [[said[i] for i in rng.choice(asked, len(asked))] for _ in range(MEMBERS)]
            order_by_disagreement(project, [train(own, seed + number) for number, own in enumerate(resamples)])
            priority = {row["id"]: row["priority"] for row in project.rows("SELECT id, priority FROM items")}
            queue.sort(key=lambda i: -priority[items[i].id])
        new = budget - len(asked)
        asked, queue = [*asked, *queue[:new]], queue[new:]
        measured = evaluate_reward_model(train([said[i] for i in asked], seed), held_out)
        figures.append({"rankings": budget, **{name: measured[name] for name in ("accuracy_per_pair", "nll_per_pair")}})
    return figures


def main(
    pool: int = 1_600, seeds: tuple[int, ...] = (1, 2, 3), budgets: tuple[int, ...] = (100, 200, 400, 800)
) -> None:
    """Compare both orders, print and write the figures.

    Args:
        pool: prompts that may be asked.
        seeds: of answers, annotators, order and training.
        budgets: numbers of rankings after which a model is trained.
    """
    curves: dict[str, list[list[dict[str, float]]]] = {"given": [], "uncertain": []}
    train_prompts = [prompt.text for prompt in assistant.prompts("train")[:pool]]
    test_prompts = [prompt.text for prompt in assistant.prompts("validation")]
    for seed in seeds:
        with TemporaryDirectory() as folder:
            project = answered(Path(folder) / "pool.db", train_prompts, seed)
            with answered(Path(folder) / "held-out.db", test_prompts, seed + 100) as other:
                held_items = [item for item in other.items() if len(item.responses) > 1]
            held_out = [r for annotator in range(ANNOTATORS) for r in labels(held_items, 1_000 * seed + annotator)]
            items = [item for item in project.items() if len(item.responses) > 1]
            said = labels(items, seed)
            for order, own in curves.items():
                own.append(curve(project, items, said, held_out, order, budgets, seed))
                print(f"seed {seed}, {order}:", [round(point["accuracy_per_pair"], 4) for point in own[-1]], flush=True)
            project.close()
    rows, differences = [], []
    for place, budget in enumerate(budgets):
        pairs = [(a[place], b[place]) for a, b in zip(curves["given"], curves["uncertain"], strict=True)]
        accuracy = [[100 * point["accuracy_per_pair"] for point in own] for own in zip(*pairs, strict=True)]
        gain = mean_ci95(np.subtract(accuracy[1], accuracy[0]))
        nll = mean_ci95([b["nll_per_pair"] - a["nll_per_pair"] for a, b in pairs])
        differences.append({"rankings": budget, "accuracy_points": gain._asdict(), "nll": nll._asdict()})
        cells = (*(f"{np.mean(own):.2f}" for own in accuracy), f"{gain.mean:+.2f} ± {gain.ci95:.2f}")
        rows.append((str(budget), *cells, f"{nll.mean:+.4f} ± {nll.ci95:.4f}"))
    print_table(
        f"accuracy per held-out pair, %, mean over seeds {', '.join(map(str, seeds))}; differences with 95 % intervals",
        ("rankings", "given", "uncertain", "difference", "NLL difference"),
        rows,
    )
    write_result("active_learning", {"pool": pool, "seeds": seeds, "curves": curves, "differences": differences})


if __name__ == "__main__":
    tyro.cli(main)
