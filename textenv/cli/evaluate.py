"""``textenv evaluate``."""

from pathlib import Path
from typing import Annotated

import tyro

import textenv
from agents.best_of_n import best_responses
from agents.core.agent import LanguageModelAgent
from reward_models.benchmark.measures.best_of_n import kl_bound
from textenv.cli.common import EnvArgs, Json, show
from textenv.data.folders import check_writable
from textenv.data.records import write_jsonl
from textenv.evaluation import evaluate as evaluate_agent
from textenv.evaluation import optimum
from textenv.served.config import SamplerConfig
from textenv.settings import Count, PositiveInt, check_value
from textenv.training.progress import progress_bar


def evaluate(
    model: str,
    env: Annotated[EnvArgs, tyro.conf.arg(name="")],
    *,
    best_of: int = 1,
    optimum_samples: int = 0,
    deterministic: bool = False,
    sampler_url: str | None = None,
    sampler_token_variable: str | None = None,
    num_envs: int = 128,
    seed: int = 0,
    output: Path | None = None,
    as_json: Json = False,
) -> None:
    """Answer every prompt of an environment and score the answers: means with 95 % intervals.

    Args:
        model: language model that answers: a registered name, a folder (also a checkpoint of `ppo`, …) or a hub id.
        env: the environment.
        best_of: draw this many answers per prompt and keep the one with the highest reward-model score. Their KL is
            unknown, so the reward is without it.
        optimum_samples: estimate from this many answers of the reference per prompt what the best policy would earn,
            and how far the model has come; 0 does not.
        deterministic: take the most likely token instead of sampling.
        sampler_url: a vLLM or SGLang server that holds the model and draws the answers, like http://127.0.0.1:8000.
        sampler_token_variable: environment variable with the server's bearer token.
        num_envs: prompts answered at once.
        seed: seed of the sampling.
        output: write prompts, answers and scores to this JSONL file.
    """
    check_value("best_of", best_of, PositiveInt)
    check_value("optimum_samples", optimum_samples, Count)
    if output is not None:
        check_writable(output.parent)
        if output.is_dir():
            raise ValueError(f"output must be a file, got the folder {str(output)!r}. Name a file in it.")
    vector = env.make(num_envs)
    folder = Path(model) / "policy"
    policy = textenv.fresh_language_model(str(folder) if folder.is_dir() else model, *vector.task.config.loading)
    served = SamplerConfig(sampler_url=sampler_url, sampler_token_variable=sampler_token_variable).sampler()
    agent = LanguageModelAgent(policy, vector.task, seed=seed, served=served)
    agent.knows_logprobs = best_of == 1  # being chosen is likelier than being drawn
    best = optimum(vector, optimum_samples, seed=seed) if optimum_samples else None
    samples = []
    with progress_bar("evaluation") as advance:
        for k in range(best_of):
            samples.append(evaluate_agent(agent, vector, deterministic=deterministic))
            advance(k + 1, best_of)
    result = best_responses(samples) if best_of > 1 else samples[0]
    if output is not None:
        names = ("prompts", "responses", "rm_scores", "rewards", "finish_reasons")
        columns = [list(getattr(result, name)) for name in names]
        write_jsonl(output, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])
    figures = result.summary() | ({"kl_bound": kl_bound(best_of)} if best_of > 1 else {})
    if best is not None:
        figures |= {"reference_reward": best.reference, "optimum": best.value, "optimum_ci95": list(best.ci95)}
        figures |= {"unclear_prompts": best.unclear_prompts}
        if best_of == 1:
            figures |= {"share_of_the_way": best.share(float(result.rewards.mean()))}
    if served is not None:
        figures |= served.gap.log()
    show(figures, as_json)
