"""Offline DPO as an agent of an environment: the reference answers, the environment judges, the policy learns once."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Self, final

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Int

from agents.core.agent import LanguageModelAgent
from agents.core.job import Algorithm, Job, Trained
from agents.core.rollout import Rollout, Stream
from agents.dpo.trainer import Continuations, DPOConfig, fit_pairs
from agents.presets import WORLDS, preset
from reward_models.training.examples import Examples
from textenv import registry
from textenv.data.folders import replace_folder
from textenv.lm import load_language_model
from textenv.settings import PositiveInt, check_value
from textenv.training.batches import Ragged
from textenv.training.checkpoint import RunFolder
from textenv.training.processes import own_generator
from textenv.training.progress import Advance
from textenv.training.trackers import Tracker
from textenv.vector import TextVectorEnv, make_vec

_OF_JOBS = ("group_size", "num_envs", "preset")
_NOT_HERE = ("seed", "max_length")
"""Settings of DPO that an experiment does not give: the environment bounds lengths."""


@final
class DPO(LanguageModelAgent, Algorithm):
    """Direct preference optimisation on responses of the environment's reference, judged by its reward model.

    ``group_size`` responses to each prompt are ranked by the environment's score before the KL, r, with an annotator's
    noise: the ranking is a draw from the Plackett–Luce model of r, so each of its pairs follows Bradley–Terry. With
    ``config.beta`` equal to the environment's ``kl_coef`` the optimum, where pairs are many enough, is that of the
    environment's objective (:mod:`agents.dpo`).
    """

    def __init__(self, env: TextVectorEnv, config: DPOConfig | None = None, group_size: int = 4) -> None:
        """``config`` None: the defaults, with the environment's ``kl_coef`` as β.

        Raises:
            ValueError: the environment has no KL to give β its value, or a setting does not fit it.
        """
        if config is None:
            config = DPOConfig(beta=_beta(env))
        if config.max_length is not None:
            rule = "max_length must be None in an environment, which bounds prompts and responses itself"
            raise ValueError(f"{rule}, got {config.max_length}. Leave it out.")
        self.check({"group_size": group_size})
        policy = registry.fresh_language_model(env.task.config.reference, *env.task.config.loading)
        super().__init__(policy, env.task, seed=config.seed)
        self.env, self.config, self.group_size = env, config, group_size
        self.history: list[dict[str, float]] = []
        """As of :class:`agents.dpo.DPOResult`."""
        self.tokens = 0
        """Response tokens drawn from the reference."""

    def learn(
        self,
        total_episodes: int,
        folder: str | Path | None = None,
        *,
        report_to: tuple[Tracker, ...] = (),
        advance: Advance | None = None,
    ) -> Self:
        """Draw ``total_episodes`` responses from the reference, rank them, and train on the rankings.

        ``folder`` gets the checkpoint of an interrupted run, which the same call continues, and then the policy.

        Raises:
            ValueError: the episodes are no whole number of rounds of the environment's slots, or the folder holds
                another run.
        """
        stream = Stream(self.env, self.config.seed, group_size=self.group_size)
        shared, self.generator = self.generator, own_generator(self.generator)
        rollout = stream.collect(total_episodes, self.respond)
        self.generator = shared
        self.tokens = int(rollout.tokens.response_lengths.sum())
        where = RunFolder(folder, resume=folder is not None)

        def on_progress(step: int, steps: int, latest: Mapping[str, float]) -> None:
            if advance is not None:
                advance(step, steps, {"loss": latest["loss"]})

        options = {"report_to": report_to, "on_progress": on_progress}
        data = self._ranked(rollout), self.task.rule
        self.history = fit_pairs(self.policy, *data, self.config, where, **options).history
        return self

    def _ranked(self, rollout: Rollout) -> Examples:
        """The responses to each prompt from best to worst, as the tokens that were drawn."""
        order = plackett_luce(rollout.scores.numpy(), self.group_size, self.config.seed)
        batch = rollout.tokens.select(torch.from_numpy(order.flatten()))
        starts = batch.prompt_ids.shape[1] - batch.prompt_lengths
        prompts = [row[start:] for row, start in zip(batch.prompt_ids.tolist(), starts.tolist(), strict=True)]
        lengths = batch.response_lengths.tolist()
        responses = [row[:length] for row, length in zip(batch.response_ids.tolist(), lengths, strict=True)]
        unknown = Continuations(Ragged(prompts), Ragged(responses), torch.zeros(len(prompts)), rule=self.task.rule)
        texts = unknown._replace(ref_logprobs=unknown.log_ratios(self.policy.model, self.config.batch_size))
        counts = torch.full((len(order),), self.group_size)
        ranks, margins = torch.arange(self.group_size).repeat(len(order)), torch.zeros(len(order))
        return Examples(texts, counts.cumsum(0) - counts, counts, ranks, margins, None)

    def save(self, path: str | Path) -> None:
        """Write the policy as a plain Hugging Face model, completely or not at all."""
        with replace_folder(path) as folder:
            self.policy.save_pretrained(folder)

    @classmethod
    def load(cls, path: str | Path, env: TextVectorEnv, config: DPOConfig | None = None) -> Self:
        """The agent with the policy of :meth:`save`."""
        agent = cls(env, config)
        agent.policy = load_language_model(path)
        return agent

    @classmethod
    def option_names(cls) -> list[str]:
        return [*(field.name for field in fields(DPOConfig) if field.name not in _NOT_HERE), *_OF_JOBS]

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        preset(options.get("preset", "pretrained"), "", 1)
        DPOConfig(**{name: value for name, value in options.items() if name not in _OF_JOBS})
        check_value("num_envs", options.get("num_envs", 64), PositiveInt)
        check_value("group_size", options.get("group_size", 4), Annotated[int, Ge(2), "Responses are compared."])

    @classmethod
    def train(cls, job: Job) -> Trained:
        """Train on a job, continuing from the checkpoint in its folder if there is one."""
        options: dict[str, Any] = dict(job.options)
        name = options.pop("preset", WORLDS.get(job.env_id, "pretrained"))
        options = {**preset(name, "dpo", job.total_episodes), **options}
        group_size = options.pop("group_size", 4)
        env = make_vec(job.env_id, int(options.pop("num_envs", None) or 64))
        options = {"beta": options["beta"] if "beta" in options else _beta(env), **options}
        config = DPOConfig(**options, seed=job.seed)
        if (job.folder / "config.json").is_file():  # trained before, and interrupted while it was measured
            agent = cls.load(job.folder, env, config)
        else:
            agent = cls(env, config, group_size)
            agent.learn(job.total_episodes, job.folder, report_to=tuple(job.report_to), advance=job.advance)
        return Trained(agent, agent.policy.model, [], agent.tokens)


def _beta(env: TextVectorEnv) -> float:
    if env.kl_coef <= 0:
        rule = "kl_coef must be above 0 for DPO, whose β it is"
        raise ValueError(f"{rule}, got {env.kl_coef}. Raise it, or give DPO a beta of its own.")
    return env.kl_coef


def plackett_luce(scores: Any, group_size: int, seed: int) -> Int[np.ndarray, "G K"]:
    """Rankings of consecutive groups, best first, drawn with weights ``exp(score)``, as numbers of the responses.

    A response is placed first with its share of the group's weights, then the next one among those left (Plackett
    1975): the order of the scores with independent Gumbel noise (Yellott 1977).
    """
    rng = np.random.default_rng(seed)
    noisy = np.reshape(scores, (-1, group_size)) + rng.gumbel(size=(len(scores) // group_size, group_size))
    return np.argsort(-noisy, axis=1, kind="stable") + np.arange(0, len(scores), group_size)[:, None]
