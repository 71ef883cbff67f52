"""Learners that can be saved, loaded and continued, by hand or in an experiment."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file, save_file

from agents.core.job import Algorithm, Job, Trained
from agents.core.learner import Config, Learner
from agents.presets import WORLDS, preset
from textenv.data.folders import check_replaceable, recover, replace_folder
from textenv.data.records import write_json
from textenv.lm import load_language_model
from textenv.training.interrupt import deferred_interrupt
from textenv.training.progress import Advance
from textenv.vector import TextVectorEnv, make_vec


class CheckpointedLearner(Learner[Config], Algorithm):
    """A learner with checkpoints: a resumed run equals one that never stopped, bit for bit on the CPU."""

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder, completely or not at all.

        ``policy/`` is a plain Hugging Face model. The rest is for resuming: value function, optimiser, random states,
        KL coefficient and the prompts of the next batch.

        Raises:
            ValueError: the folder holds files that are not of a checkpoint, or cannot be written.
        """
        with replace_folder(path) as folder:
            self.policy.save_pretrained(folder / "policy")
            value = {name: tensor for name, tensor in self.actor.state_dict().items() if not name.startswith("model.")}
            save_file(value, folder / "value.safetensors")
            tensors = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
            torch.save(tensors, folder / "optimizer.pt")
            state = {
                "algorithm": type(self).__name__,
                "config": dataclasses.asdict(self.config),
                "episodes": self.episodes,
                "kl_coef": self.env.kl_coef,
                "prompt_indices": self.stream.prompt_indices.tolist(),
                "random_states": self.env.random_states,
                "history": self.history,
            }
            write_json(folder / "state.json", state)

    @classmethod
    def load(cls, path: str | Path, env: TextVectorEnv) -> Self:
        """The learner that :meth:`save` wrote, ready to continue in ``env``.

        Raises:
            ValueError: the folder is not a readable checkpoint of this algorithm, or does not fit ``env``.
        """
        path = Path(path)
        recover(path)
        try:
            state = json.loads((path / "state.json").read_text("utf-8"))
            algorithm = state["algorithm"]
            if algorithm != cls.__name__:
                raise ValueError(f"it was written by {algorithm}.save")
            value = load_file(path / "value.safetensors")
            tensors = torch.load(path / "optimizer.pt", weights_only=True)
            config = cls.config_type(**state["config"])
        except Exception as error:
            rule = f"a checkpoint must be a folder written by {cls.__name__}.save"
            raise ValueError(f"{rule}, got {str(path)!r}: {error}. Name another checkpoint, or train again.") from error
        slots = len(state["prompt_indices"])
        if slots != env.num_envs:
            raise ValueError(f"num_envs must be that of the checkpoint, {slots}, got {env.num_envs}. Use {slots}.")
        where = {"device": env.task.config.device, "attn_implementation": env.task.config.attn_implementation}
        agent = cls(env, cast(Config, config), load_language_model(path / "policy", **where))
        agent.actor.load_state_dict(value, strict=False)
        agent.optimizer.load_state_dict(tensors["optimizer"])
        agent.generator.set_state(tensors["generator"])
        agent.episodes, agent.history = state["episodes"], state["history"]
        env.kl_coef = agent.controller.kl_coef = state["kl_coef"]
        agent.stream.restart(state["prompt_indices"])
        env.random_states = state["random_states"]
        return agent

    @classmethod
    def resume(cls, path: str | Path, env: TextVectorEnv, config: Config) -> Self:
        """The learner saved in ``path``, or a new one with ``config`` if nothing is saved there."""
        recover(path)
        return cls.load(path, env) if (Path(path) / "state.json").is_file() else cls(env, config)

    def learn_with_checkpoints(
        self, total_episodes: int, folder: str | Path, *, every: int = 10, advance: Advance | None = None
    ) -> None:
        """Learn until ``total_episodes`` have been played in total, saving every ``every`` updates and at the end.

        Ctrl-C finishes the running update, saves, and raises KeyboardInterrupt; :meth:`load` continues from there.
        """
        check_replaceable(folder)
        size = self.config.batch_size
        total = math.ceil(total_episodes / size)

        def after_update(log: dict[str, float]) -> bool:
            done = len(self.history)
            if advance is not None:
                advance(done, total, {key: log[key] for key in ("rm_score", "kl", "gold_score") if key in log})
            if done % every == 0 and done < total and not stopped.is_set():
                self.save(folder)
            return not stopped.is_set()

        with deferred_interrupt() as stopped:
            self.learn(max(0, total - len(self.history)) * size, callback=after_update)
            self.save(folder)
        if stopped.is_set() and len(self.history) < total:
            raise KeyboardInterrupt

    @classmethod
    def option_names(cls) -> list[str]:
        fields = (field.name for field in dataclasses.fields(cls.config_type) if field.name != "seed")
        return [*fields, "num_envs", "preset"]

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        preset(options.get("preset", "pretrained"), "", 1)
        cls.config_type(**{name: value for name, value in options.items() if name not in ("num_envs", "preset")})

    @classmethod
    def train(cls, job: Job) -> Trained:
        """Train on a job, continuing from the checkpoint in its folder if there is one."""
        options = dict(job.options)
        num_envs, name = options.pop("num_envs", None), options.pop("preset", WORLDS.get(job.env_id, "pretrained"))
        learner = re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()  # OnlineDPO: online-dpo
        options = {**preset(name, learner, job.total_episodes), **options}
        config = cast(Config, cls.config_type(**options, seed=job.seed))
        agent = cls.resume(job.folder, make_vec(job.env_id, int(num_envs or config.batch_size)), config)
        agent.learn_with_checkpoints(job.total_episodes, job.folder, advance=job.advance)
        tokens = round(sum(log["response_tokens"] * config.batch_size for log in agent.history))
        return Trained(agent, agent.policy.model, agent.history, tokens)
