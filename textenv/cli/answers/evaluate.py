"""``textenv evaluate``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import textenv
from agents.best_of_n import best_responses
from agents.comparison.page import Answers, write_evaluation
from agents.comparison.tokens import saved_critic, token_figures
from agents.core.agent import LanguageModelAgent
from reward_models.benchmark.measures.best_of_n import kl_bound
from textenv.cli.common import EnvArgs, Json, policy_of, short, show, show_json
from textenv.data.folders import MARKER, check_writable
from textenv.data.records import write_jsonl
from textenv.evaluation import Evaluation, Optimum, optimum
from textenv.evaluation import evaluate as evaluate_agent
from textenv.pages.numbers import number
from textenv.pages.terminal import print_columns
from textenv.registry import vocabulary_size
from textenv.served.config import SamplerConfig
from textenv.settings import Count, PositiveInt, check_value
from textenv.stats import mean_ci95
from textenv.training.progress import progress_bar
from textenv.vector import TextVectorEnv


def evaluate(
    models: tyro.conf.Positional[tuple[str, ...]],
    env: Annotated[EnvArgs, tyro.conf.arg(name="")],
    *,
    model: str | None = None,
    best_of: int = 1,
    optimum_samples: int = 0,
    deterministic: bool = False,
    sampler_url: str | None = None,
    sampler_token_variable: str | None = None,
    num_envs: int = 128,
    seed: int = 0,
    output: Path | None = None,
    page: Path | None = None,
    page_prompts: int = 8,
    as_json: Json = False,
) -> None:
    """Answer every prompt of an environment and score the answers: means with 95 % intervals, model beside model.

    Args:
        models: language models that answer: registered names, folders (also checkpoints of `ppo`, …) or hub ids.
        env: the environment.
        model: one model, the same as to name it first.
        best_of: draw this many answers per prompt and keep the one with the highest reward-model score. Their KL is
            unknown, so the reward is without it.
        optimum_samples: estimate from this many answers of the reference per prompt what the best policy would earn,
            and how far each model has come; 0 does not.
        deterministic: take the most likely token instead of sampling.
        sampler_url: a vLLM or SGLang server that holds the model and draws the answers, like http://127.0.0.1:8000.
        sampler_token_variable: environment variable with the server's bearer token.
        num_envs: prompts answered at once.
        seed: seed of the sampling, the same for each model.
        output: write prompts, answers and scores to this JSONL file.
        page: write report.html to this folder: the figures, and answers side by side with KL, value and advantage of
            each token.
        page_prompts: prompts on the page.
    """
    names = [*([] if model is None else [model]), *models]
    _check(names, best_of, optimum_samples, page_prompts, sampler_url, output, page)
    vector = env.make(num_envs)
    folders = [policy_of(name) for name in names]
    for name, folder in zip(names, folders, strict=True):
        _check_vocabulary(name, folder, vector)
    served = SamplerConfig(sampler_url=sampler_url, sampler_token_variable=sampler_token_variable).sampler()
    best: Optimum | None = None
    shown = np.unique(np.linspace(0, len(vector.task.prompts.ids) - 1, page_prompts).round().astype(int))
    answers: list[Answers] = []
    with progress_bar("evaluation") as advance:
        for name, folder in zip(names, folders, strict=True):
            policy = textenv.fresh_language_model(folder, *vector.task.config.loading)
            critic = None if page is None else saved_critic(name, policy, vector.task)
            agent = LanguageModelAgent(policy, vector.task, seed=seed, served=served)
            agent.knows_logprobs = best_of == 1  # being chosen is likelier than being drawn
            if best is None and optimum_samples:
                best = optimum(vector, optimum_samples, seed=seed)
            samples = []
            for _ in range(best_of):
                samples.append(evaluate_agent(agent, vector, deterministic=deterministic))
                advance(len(answers) * best_of + len(samples), len(names) * best_of)
            result = best_responses(samples) if best_of > 1 else samples[0]
            figures = _figures(result, best, best_of, answers[0].evaluation if answers else None)
            figures |= {} if served is None else served.gap.log()
            tokens = [] if page is None else token_figures(result, shown, vector.task, critic)
            answers.append(Answers(name, figures, result, tokens))
    if output is not None:
        write_jsonl(output, [record for found in answers for record in _records(found, len(names) > 1)])
    if page is not None:
        write_evaluation(
            page / "report.html", answers, shown.tolist(), [env.env_id, *_facts(vector, best, best_of, seed)]
        )
        (page / MARKER).write_text("[]", "utf-8")
    if len(answers) == 1:
        show(answers[0].figures, as_json)
    elif as_json:
        show_json({found.name: found.figures for found in answers})
    else:
        _print(vector, answers)


def _check(
    names: Sequence[str],
    best_of: int,
    optimum_samples: int,
    page_prompts: int,
    sampler_url: str | None,
    output: Path | None,
    page: Path | None,
) -> None:
    """Refuse what cannot be done, before any work."""
    check_value("best_of", best_of, PositiveInt)
    check_value("optimum_samples", optimum_samples, Count)
    check_value("page_prompts", page_prompts, PositiveInt)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"models must be one or several different ones, got {list(names)}. Name each once.")
    if sampler_url is not None and len(names) > 1:
        raise ValueError(f"a server holds one model, got {len(names)}: {', '.join(names)}. Evaluate them one by one.")
    if output is not None:
        check_writable(output.parent)
        if output.is_dir():
            raise ValueError(f"output must be a file, got the folder {str(output)!r}. Name a file in it.")
    if page is not None:
        check_writable(page)
        if (page / "report.html").exists() and not (page / MARKER).is_file():
            rule = "page must be a folder without a report of others"
            raise ValueError(f"{rule}, got {str(page)!r} with report.html. Name another folder.")


def _check_vocabulary(name: str, folder: str, env: TextVectorEnv) -> None:
    """Refuse a model that is not there or cannot be compared, before another one is evaluated."""
    found, own = vocabulary_size(folder, load=True), env.reference.vocab_size
    if found not in (None, own):
        raise ValueError(
            f"a model must have the reference's vocabulary of {own} tokens, got {found} in {name!r}. Name another "
            "--reference, or another model."
        )


def _figures(result: Evaluation, best: Optimum | None, best_of: int, first: Evaluation | None) -> dict[str, Any]:
    """What is known of the answers of one model; ``first`` are those of the model that it is compared with."""
    figures: dict[str, Any] = {**result.summary()} | ({"kl_bound": kl_bound(best_of)} if best_of > 1 else {})
    if first is not None:
        figures |= {"gain": mean_ci95(result.rewards - first.rewards)}
    if best is not None:
        figures |= {"reference_reward": best.reference, "optimum": best.value, "optimum_ci95": list(best.ci95)}
        figures |= {"unclear_prompts": best.unclear_prompts}
        if best_of == 1:
            figures |= {"share_of_the_way": best.share(float(result.rewards.mean()))}
    return figures


def _records(answers: Answers, several: bool) -> list[dict[str, Any]]:
    """The answers of one model as lines of the output; of several models, each line says whose it is."""
    names = ("prompts", "responses", "rm_scores", "rewards", "finish_reasons")
    columns = [list(getattr(answers.evaluation, name)) for name in names]
    model = {"model": answers.name} if several else {}
    return [{**model, **dict(zip(names, row, strict=True))} for row in zip(*columns, strict=True)]


def _facts(env: TextVectorEnv, best: Optimum | None, best_of: int, seed: int) -> list[str]:
    config = env.task.config
    facts = [f"{len(env.task.prompts.ids):,} prompts", f"reference {config.reference}"]
    facts += [f"reward model {config.reward_model}", f"β {env.kl_coef:g}", f"seed {seed}"]
    facts += [f"best of {best_of}"] if best_of > 1 else []
    if best is not None:
        facts += [f"reference earns {number(best.reference.mean, 3)}, optimum {number(best.value, 3)}"]
    return facts


def _print(env: TextVectorEnv, answers: Sequence[Answers]) -> None:
    """A column for each model."""
    names = list(dict.fromkeys(name for found in answers for name in found.figures))

    def column(figures: Mapping[str, Any]) -> list[str]:
        return [short(figures[name]) if name in figures else "–" for name in names]

    title = f"{len(env.task.prompts.ids):,} prompts, mean ± 95 %; gain: reward beyond that of {answers[0].name}"
    header = ["", *(name.replace("_", " ") for name in names)]
    print_columns(title, header, [[found.name, *column(found.figures)] for found in answers])
