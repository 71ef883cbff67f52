"""``textenv ppo`` and its kin: one command for each of :data:`agents.algorithms.LEARNERS`."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from agents.algorithms import algorithm
from agents.core.kept import Figure, Keep
from agents.experiments.bounds import OptimumSamples, bounds_of
from agents.presets import PRESETS, WORLDS
from agents.presets import preset as preset_settings
from textenv.cli.common import EnvArgs, Json, PushToHub, publish, show
from textenv.data.cards import Card, check_push
from textenv.data.folders import check_replaceable
from textenv.pages.terminal import print_table, shorten
from textenv.settings import PositiveInt, check_value
from textenv.training.processes import is_main, on_main
from textenv.training.progress import progress_bar
from textenv.training.trackers import Tracker, check_trackers

_NUMBERS = ("reward", "rm_score", "kl")
EPISODES = 15_360
"""As many as the presets need in the worlds that they are for."""


def value_of(flag: str, arguments: Sequence[str], default: str = "") -> str:
    """The value of a flag in the arguments of a command that are not parsed yet."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else following
    return default


def learner_command(name: str, arguments: Sequence[str]) -> Callable[..., None]:
    """The command of one learner; its flags are those of its config, with the defaults of the preset."""
    learner = algorithm(name)
    world = WORLDS.get(value_of("--env-id", arguments, EnvArgs.env_id), "pretrained")
    chosen = value_of("--preset", arguments, "pretrained" if value_of("--reference", arguments) else world)
    episodes = value_of("--total-episodes", arguments)
    settings = preset_settings(chosen, name, max(int(episodes), 1) if episodes.isdigit() else EPISODES)
    defaults = learner.config_type(**settings)

    def train(
        output: Path,
        env: Annotated[EnvArgs, tyro.conf.arg(name="")],
        config: Annotated[learner.config_type, tyro.conf.arg(name="")] = defaults,
        *,
        preset: Literal[tuple(PRESETS)] = chosen,
        total_episodes: int = EPISODES,
        num_envs: int = 256,
        save_every: int = 10,
        keep_last: int = 1,
        keep_best: Figure | None = None,
        sample_every: int = 10,
        optimum_samples: int = 0,
        report_to: tuple[Tracker, ...] = (),
        resume: bool = False,
        merge_into: Path | None = None,
        push_to_hub: PushToHub = None,
        as_json: Json = False,
    ) -> None:
        """Train a policy in an environment; the result is a checkpoint with a Hugging Face model in it.

        ALGORITHM

        Args:
            output: folder for the checkpoint and the logs. Ctrl-C or SIGTERM finishes the update and saves; --resume
                continues from there.
            env: the environment.
            config: how to train.
            preset: settings that the other flags change: those of the id, or "pretrained" for a reference of yours.
            total_episodes: episodes to play in total, those before a resume included.
            num_envs: episodes that all processes play at once; divides batch-size, is a multiple of group-size.
            save_every: updates between checkpoints.
            keep_last: checkpoints to keep; those before the newest are in OUTPUT/checkpoints, by their updates.
            keep_best: keep in OUTPUT/best the policy at whose checkpoint the mean of this figure over the last 10
                updates was highest.
            sample_every: updates between sample texts on the terminal and in OUTPUT/samples.jsonl.
            optimum_samples: responses of the reference to each prompt from which its objective and that of the best
                policy are estimated before the training; they stand beside the objective and in the picture of
                `textenv plot`. 64 tell more than 8, and take longer.
            report_to: trackers that get the figures of each update as well.
            resume: continue from the checkpoint in the output folder, if there is one. What is trained, and how, must
                be as before, apart from memory, the sampler and the length of the run.
            merge_into: write the policy to this folder too, adapters of --lora-rank added to its weights.
        """
        check_value("total_episodes", total_episodes, PositiveInt)
        check_value("save_every", save_every, PositiveInt)
        check_value("keep_last", keep_last, PositiveInt)
        check_value("sample_every", sample_every, PositiveInt)
        check_value("optimum_samples", optimum_samples, OptimumSamples)
        if optimum_samples and config.kl_target is not None:
            rule = "optimum_samples must be 0 with a kl_target, which changes β and with it the optimum"
            raise ValueError(f"{rule}, got {optimum_samples}. Leave one of them out.")
        check_trackers(report_to)
        check_push(push_to_hub)
        keep = Keep(last=keep_last, best=keep_best)
        on_main(lambda: _check_folders(output, merge_into, resume))
        vector = env.make(num_envs)
        agent = learner.resume(output, vector, config) if resume else learner(vector, config)
        how = f"{learner.__name__}, {'continued' if agent.history else f'preset {preset}'}"
        if is_main():
            print(_plan(agent, how, total_episodes), file=sys.stderr)
        bounds = on_main(lambda: _bounds(env, num_envs, optimum_samples))
        with progress_bar(learner.__name__) as advance:
            options = {"every": save_every, "keep": keep, "sample_every": sample_every}
            options |= {"bounds": bounds, "on_samples": _show_samples}
            agent.learn_with_checkpoints(total_episodes, output, **options, report_to=report_to, advance=advance)
        if merge_into is not None:
            agent.save_merged(merge_into)
            publish(merge_into, _card(agent), None)
        pushed = publish(output, _card(agent), push_to_hub, "policy")
        show({**agent.history[-1], "output": str(output), **pushed}, as_json)

    train.__doc__ = str(train.__doc__).replace("ALGORITHM", str(learner.__doc__))
    return train


def _bounds(env: EnvArgs, num_envs: int, samples: int) -> dict[str, float] | None:
    """In an environment of its own, so that the training draws the same."""
    if samples == 0:
        return None
    vector = env.make(num_envs)
    if vector.kl_coef <= 0:
        raise ValueError(f"optimum_samples must be 0 without a KL penalty, got {samples}. Raise kl_coef.")
    print("Estimating the optimum from responses of the reference …", file=sys.stderr)
    return bounds_of(vector, samples)


def _show_samples(samples: list[dict[str, Any]]) -> None:
    """The texts of an update above the progress bar."""
    header = ("prompt", "response", "objective", "score", "KL")
    rows = [
        (*(shorten(sample[key]) for key in ("prompt", "response")), *(f"{sample[key]:.2f}" for key in _NUMBERS))
        for sample in samples
    ]
    print_table(f"update {samples[0]['update']}", header, rows, Console(stderr=True, highlight=False))


def _card(agent: Any) -> Card:
    task = agent.task.config
    named = task.prompts["dataset"] if isinstance(task.prompts, dict) else task.prompts
    data = named if isinstance(named, str) else f"{len(named)} prompts"
    environment = {"environment": agent.env.spec.id if agent.env.spec else None, "reward_model": task.reward_model}
    settings = {**environment, "kl_coef": task.kl_coef, "temperature": task.temperature, **asdict(agent.config)}
    return Card(type(agent).__name__, "text-generation", task.reference, data, settings, agent.history[-1])


def _check_folders(output: Path, merge_into: Path | None, resume: bool) -> None:
    for folder in (output, *([merge_into] if merge_into else [])):
        check_replaceable(folder)
    if not resume and (output / "state.json").exists():
        rule = f"output must be a folder without a checkpoint, got {str(output)!r}"
        raise ValueError(f"{rule}. Continue it with --resume, or name another folder.")


def _plan(agent: Any, how: str, total_episodes: int) -> str:
    """What is going to be trained on what."""
    config, task = agent.config, agent.task
    parameters = sum(weight.numel() for weight in agent.policy.model.parameters() if weight.requires_grad)
    reward = task.config.reward_model
    reward = reward if isinstance(reward, str) else json.dumps(reward)
    updates = math.ceil(total_episodes / config.batch_size)
    learner = f"an adapter of rank {config.lora_rank} on" if config.lora_rank else "a copy of"
    return (
        f"{how}: {learner} {task.config.reference} ({parameters:,} parameters) learns on {len(task.prompts.ids):,} "
        f"prompts from the reward of {reward} minus {agent.env.kl_coef:g} per nat of KL; {updates:,} updates of "
        f"{config.batch_size:,} episodes, learning rate {config.learning_rate:g}"
    )
