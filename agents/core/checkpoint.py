"""Learners that can be saved, loaded and continued, by hand or in an experiment."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file, save_file

from agents.core.job import Algorithm, Job, Trained
from agents.core.kept import Keep, keep_best, keep_earlier
from agents.core.learner import Config, Learner
from agents.core.rollout import Rollout
from agents.logs.files import BOUNDS, CURVES, SAMPLES, append, drop_after, read_bounds, sample_texts
from agents.presets import WORLDS, preset
from textenv.data.folders import add_file, check_replaceable, is_of_writing, recover, replace_folder
from textenv.data.records import write_json
from textenv.lm.adapters import adapters
from textenv.registry import changed, described
from textenv.served.config import SamplerConfig
from textenv.settings import PositiveInt, check_value
from textenv.training.interrupt import deferred_interrupt
from textenv.training.memory import PassConfig, saved_policy
from textenv.training.memory.sharding import load_optimizer, whole
from textenv.training.processes import any_process, check_groups, is_main, on_main, own_part, rounds_of, together
from textenv.training.progress import Advance
from textenv.training.trackers import Tracker, tracking
from textenv.training.trainable import trainable_weights
from textenv.vector import TextVectorEnv, make_vec

MAY_CHANGE = (
    "lr_decay_episodes",
    "gradient_checkpointing",
    *PassConfig.__annotations__,
    *SamplerConfig.__annotations__,
)
"""Settings that may change when a run is resumed: the length of its schedule, memory, and who samples."""
_SHOWN = ("rm_score", "kl", "gold_score")
"""Figures beside the objective on a progress bar."""
UNCLEAR = 0.1
"""Share of prompts from which an estimated optimum is a lower bound: their samples cannot tell."""
_OF_THE_MACHINE = ("device", "attn_implementation", "score_batch_size", "obs_mode")
"""Options of an environment that may."""


class CheckpointedLearner(Learner[Config], Algorithm):
    """A learner with checkpoints: a resumed run equals one that never stopped, bit for bit on the CPU."""

    def collect(self) -> Rollout:
        self._played = super().collect()  # for samples of its texts
        return self._played

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder, completely or not at all.

        ``policy/`` is a plain Hugging Face model, or an adapter folder of ``peft``. The rest is for resuming: value
        function, optimiser, random states, KL coefficient and the prompts of the next batch. ``curves.jsonl`` repeats
        the history.

        Raises:
            ValueError: the folder holds files that are not of a checkpoint, or cannot be written.
            OSError: the disk is full; an earlier checkpoint stays.
        """
        self._save(Path(path), Keep(), beside=False)

    def _save(self, path: Path, keep: Keep, *, beside: bool = True, compare: bool = True) -> None:
        """Save; ``beside``: keep the samples, earlier checkpoints and best policy of the folder's earlier state."""
        slots = together((self.stream.prompt_indices.tolist(), self.env.random_states))
        states = slots, whole(self.optimizer.state_dict())
        on_main(lambda: self._replace(path, keep, states, beside=beside, compare=compare))

    def _replace(self, path: Path, keep: Keep, states: tuple[list, dict], *, beside: bool, compare: bool) -> None:
        try:
            with replace_folder(path) as folder:
                self._write(folder, *states)
                if beside:
                    keep_earlier(path, folder, len(self.history), keep.last)
                    if keep.best is not None:
                        keep_best(path, folder, self.history, keep.best, compare=compare)
                    for name in (SAMPLES, BOUNDS):
                        if (path / name).is_file():
                            shutil.copy2(path / name, folder / name)
        except Exception as error:
            if not is_of_writing(error):
                raise
            left = "The earlier checkpoint is whole" if (path / "state.json").is_file() else "There is none yet"
            rule = f"a checkpoint must fit on its disk and be writable, got {str(path)!r}: {error}"
            raise OSError(f"{rule}. {left}. Free space, or lower keep_last; then resume.") from error

    def _write(self, folder: Path, slots: list[tuple[list, list]], optimizer: dict[str, Any]) -> None:
        """Write a checkpoint; ``slots``: next prompts and random states of the slots of each process."""
        self.policy.save_pretrained(folder / "policy")
        trained = trainable_weights(self.actor)
        value = {name: tensor.detach() for name, tensor in trained.items() if not name.startswith("model.")}
        save_file(value, folder / "value.safetensors")
        tensors = {"optimizer": optimizer, "generator": self.generator.get_state()}
        torch.save(tensors, folder / "optimizer.pt")
        state = {
            "algorithm": type(self).__name__,
            "config": dataclasses.asdict(self.config),
            "environment": _world(self.env),
            "episodes": self.episodes,
            "kl_coef": self.env.kl_coef,
            "prompt_indices": [index for indices, _ in slots for index in indices],
            "random_states": [state for _, states in slots for state in states],
            "history": self.history,
            "return_unit": {name: float(value) for name, value in vars(self.return_unit).items()},
        }
        write_json(folder / "state.json", state)
        append(folder / CURVES, self.history)
        append(folder / SAMPLES, [])

    def save_merged(self, path: str | Path) -> None:
        """Write the policy alone, its adapters in its weights: a plain Hugging Face model. Raises as :meth:`save`."""

        def write() -> None:
            policy = self.policy.merged() if adapters(self.policy.model) else self.policy
            with replace_folder(path) as folder:
                policy.save_pretrained(folder)

        on_main(write)

    @classmethod
    def load(cls, path: str | Path, env: TextVectorEnv, config: Config | None = None) -> Self:
        """The learner that :meth:`save` wrote, ready to continue in ``env``; with ``config``, which must be that of the
        checkpoint but for :data:`MAY_CHANGE`.

        Raises:
            ValueError: the folder is not a readable checkpoint of this algorithm, or does not fit ``env`` or
                ``config``.
        """
        path = Path(path)
        on_main(lambda: recover(path))
        try:
            state = json.loads((path / "state.json").read_text("utf-8"))
            algorithm = state["algorithm"]
            if algorithm != cls.__name__:
                raise ValueError(f"it was written by {algorithm}.save")
            value = load_file(path / "value.safetensors")
            tensors = torch.load(path / "optimizer.pt", weights_only=True)
            saved = cls.config_type(**state["config"])
            world = state["environment"]
        except Exception as error:
            rule = f"a checkpoint must be a folder written by {cls.__name__}.save"
            raise ValueError(f"{rule}, got {str(path)!r}: {error}. Name another checkpoint, or train again.") from error
        slots, found = len(state["prompt_indices"]), sum(together(env.num_envs))
        if slots != found:
            raise ValueError(f"num_envs must be that of the checkpoint, {slots}, got {found}. Use {slots}.")
        config = config or cast(Config, saved)
        free = dict.fromkeys(MAY_CHANGE)
        _check_same(dataclasses.asdict(saved) | free, dataclasses.asdict(config) | free)
        _check_same(world, _world(env))
        agent = cls(env, config, saved_policy(path / "policy", env.task))
        agent.actor.load_state_dict(value, strict=False)
        load_optimizer(agent.optimizer, tensors["optimizer"])
        agent.generator.set_state(tensors["generator"])
        agent.episodes, agent.history = state["episodes"], state["history"]
        vars(agent.return_unit).update(state["return_unit"])
        env.kl_coef = agent.controller.kl_coef = state["kl_coef"]
        agent.stream.restart(own_part(state["prompt_indices"]))
        env.random_states = own_part(state["random_states"])
        return agent

    @classmethod
    def resume(cls, path: str | Path, env: TextVectorEnv, config: Config) -> Self:
        """The learner saved in ``path``, or a new one if nothing is saved there. Raises as :meth:`load`."""
        on_main(lambda: recover(Path(path)))
        return cls.load(path, env, config) if (Path(path) / "state.json").is_file() else cls(env, config)

    def learn_with_checkpoints(
        self,
        total_episodes: int,
        folder: str | Path,
        *,
        every: int = 10,
        keep: Keep | None = None,
        sample_every: int = 10,
        report_to: Sequence[Tracker] = (),
        name: str | None = None,
        advance: Advance | None = None,
        on_samples: Callable[[list[dict[str, Any]]], None] | None = None,
        bounds: Mapping[str, float] | None = None,
    ) -> None:
        """Learn until ``total_episodes`` have been played in total, saving every ``every`` updates and at the end.

        Each update adds a line to ``curves.jsonl`` in the folder, and the first and every ``sample_every``-th one a few
        texts to ``samples.jsonl``, and to ``on_samples``; ``report_to`` names trackers that get figures and texts too,
        for a run called ``name``. ``bounds``, or those that the folder has, stand beside the objective on a progress
        bar; without them, what it was at the first update, when the policy was still the reference.
        Ctrl-C or SIGTERM finishes the running update, saves, and raises KeyboardInterrupt; :meth:`load` continues from
        there. Of several processes the main one alone writes and reports; a signal to any of them stops all.
        """
        folder, keep, size = Path(folder), keep or Keep(), self.config.batch_size
        if keep.best == "gold_score" and self.task.config.gold is None:
            rule = "keep_best must be a figure that the environment has, got 'gold_score' without a gold judge"
            raise ValueError(f"{rule}. Choose reward or rm_score, or give the environment its gold.")
        self._open_logs(folder)
        if bounds is not None:
            on_main(lambda: add_file(folder, BOUNDS, json.dumps(bounds)))
        bounds = read_bounds(folder) if self.config.kl_target is None else None  # they are those of one β
        total = math.ceil(total_episodes / size)

        def after_update(log: dict[str, float]) -> bool:
            done = len(self.history)
            if is_main():
                append(folder / CURVES, [log])
                report(log, done)
                if done == 1 or done % sample_every == 0:
                    samples = sample_texts(self._played, self.task.reference, done, self.episodes)
                    append(folder / SAMPLES, samples)
                    report.table("samples", samples, done)
                    if on_samples is not None:
                        on_samples(samples)
                if advance is not None:
                    objective = {_objective(self.history[0]["reward"], bounds): log["reward"]}
                    advance(done, total, objective | {key: log[key] for key in _SHOWN if key in log})
            stop = any_process(stopped.is_set())
            if done % every == 0 and done < total and not stop:
                self._save(folder, keep)
            return not stop

        settings = {"algorithm": type(self).__name__, **dataclasses.asdict(self.config)}
        tracked = tracking(report_to, folder, settings, len(self.history), name=name)
        with deferred_interrupt() as stopped, tracked as report:
            self.learn(max(0, total - len(self.history)) * size, callback=after_update)
            done = len(self.history)
            self._save(folder, keep, compare=done % every == 0 or done >= total)
        if any_process(stopped.is_set()) and len(self.history) < total:
            raise KeyboardInterrupt

    def _open_logs(self, folder: Path) -> None:
        """Logs that end where the learner stands."""

        def opened() -> bool:
            check_replaceable(folder)
            if not self.history:
                with replace_folder(folder) as new:
                    append(new / CURVES, [])
                    append(new / SAMPLES, [])
            elif (folder / CURVES).is_file() and (folder / SAMPLES).is_file():
                for name in (CURVES, SAMPLES):
                    drop_after(folder / name, self.episodes)
            else:
                return False
            return True

        if not on_main(opened):
            self.save(folder)

    @classmethod
    def option_names(cls) -> list[str]:
        fields = (field.name for field in dataclasses.fields(cls.config_type) if field.name != "seed")
        return [*fields, "num_envs", "preset"]

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        preset(options.get("preset", "pretrained"), "", 1)
        config = cls.config_type(**{name: options[name] for name in options if name not in ("num_envs", "preset")})
        if "num_envs" in options:
            check_value("num_envs", options["num_envs"], PositiveInt)
            rounds_of(config.batch_size, options["num_envs"])
            check_groups(options["num_envs"], config.group_size)

    @classmethod
    def train(cls, job: Job) -> Trained:
        """Train on a job, continuing from the checkpoint in its folder if there is one."""
        options = dict(job.options)
        num_envs, name = options.pop("num_envs", None), options.pop("preset", WORLDS.get(job.env_id, "pretrained"))
        learner = re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()  # OnlineDPO: online-dpo
        options = {**preset(name, learner, job.total_episodes), **options}
        config = cast(Config, cls.config_type(**options, seed=job.seed))
        agent = cls.resume(job.folder, make_vec(job.env_id, int(num_envs or config.batch_size)), config)
        where = {"report_to": job.report_to, "name": job.name, "advance": job.advance}
        agent.learn_with_checkpoints(job.total_episodes, job.folder, **where)
        tokens = round(sum(log["response_tokens"] * config.batch_size for log in agent.history))
        return Trained(agent, agent.policy.model, agent.history, tokens)


def _objective(first: float, bounds: Mapping[str, float] | None) -> str:
    """The name of the objective on a progress bar, with what it is to be compared with."""
    if bounds is None:
        return f"objective (began at {first:.3g})"
    sign = "≥" if bounds.get("unclear_prompts", 1.0) > UNCLEAR else "≈"
    return f"objective (reference {bounds['reference']:.3g}, optimum {sign} {bounds['optimum']:.3g})"


def _world(env: TextVectorEnv) -> dict[str, Any]:
    """The environment that a learner depends on, as JSON."""
    return described({name: value for name, value in vars(env.task.config).items() if name not in _OF_THE_MACHINE})


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = changed(saved, now)
    if names:
        name = names[0].split(".")[0]
        rule = f"a run must be resumed with the {name} it started with, {saved.get(name)!r}, got {now.get(name)!r}"
        raise ValueError(f"{rule}. Restore it, or train in another folder.")
