"""Offline DPO as an agent of an environment: the reference answers, the environment judges, the policy learns once."""

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self, final

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agents.core.agent import LanguageModelAgent
from agents.core.job import Algorithm, Job, Trained
from agents.core.rollout import Stream
from agents.dpo.trainer import Continuations, DPOConfig, fit_pairs
from agents.presets import WORLDS, preset
from reward_models.training.examples import Examples
from textenv.data.folders import replace_folder
from textenv.data.records import atomic_path
from textenv.episode import observation_tokens
from textenv.lm import Sampled
from textenv.settings import PositiveInt, check_value
from textenv.tasks.assistant.annotators import rank
from textenv.training.batches import Ragged
from textenv.training.checkpoint import RunFolder
from textenv.training.memory import MemoryConfig, policy_to_train, saved_policy
from textenv.training.processes import check_groups, link, on_main, own_generator
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
        if env.task.config.kl_source == "reference":
            rule = "kl_source must not be 'reference' for DPO, whose rankings are by the score alone"
            raise ValueError(f"{rule}, got 'reference'. Leave kl_source out.")
        self.check({"group_size": group_size, "num_envs": env.num_envs})
        super().__init__(policy_to_train(MemoryConfig(), env.task), env.task, seed=config.seed)
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
        """Draw ``total_episodes`` responses from the reference, rounded up to whole rounds of the environment's slots,
        rank them, and train on the rankings.

        ``folder`` gets the checkpoint of an interrupted run, which the same call continues, and then the policy. The
        ranked responses lie beside it, so that nothing is judged twice.

        Raises:
            ValueError: the folder holds a finished model or another run.
        """
        if folder is not None and (Path(folder) / "config.json").is_file():
            rule = "a folder to learn in must hold no finished model"
            raise ValueError(f"{rule}, got {str(folder)!r}. Load it, or name another folder.")
        where = RunFolder(folder, resume=folder is not None)
        round_size = self.env.num_envs * link().num_processes
        examples = self._ranked(math.ceil(total_episodes / round_size) * round_size, where)

        def on_progress(step: int, steps: int, latest: Mapping[str, float]) -> None:
            if advance is not None:
                advance(step, steps, {"loss": latest["loss"]})

        options = {"report_to": report_to, "on_progress": on_progress}
        run = fit_pairs(self.policy, examples, self.task.rule, self.config, where, **options)
        self.history = run.history
        return self

    def _ranked(self, total_episodes: int, folder: RunFolder) -> Examples:
        """The responses to each prompt from best to worst; those beside the folder of an interrupted run."""
        identity = {"total_episodes": total_episodes, "group_size": self.group_size, "seed": self.config.seed}
        if folder.path is not None and on_main(lambda: folder.checkpoint is not None):
            texts = _read(_beside(folder.path), identity)
        else:
            texts = self._drawn(total_episodes)
            if folder.path is not None:
                on_main(partial(_write, _beside(folder.path), texts, identity))
        self.tokens = int(texts.responses.lengths.sum())
        groups = len(texts.responses.lengths) // self.group_size
        counts = torch.full((groups,), self.group_size)
        ranks, margins = torch.arange(self.group_size).repeat(groups), torch.zeros(groups)
        return Examples(texts, counts.cumsum(0) - counts, counts, ranks, margins, None)

    def _drawn(self, total_episodes: int) -> Continuations:
        """Responses of the reference, judged and ranked, as the tokens that were drawn."""
        generator, reference = own_generator(self.generator), self.task.reference.model

        def act(observation: Any) -> Sampled:
            batch = observation_tokens(observation, self.task.prompt_width)
            return self.task.respond(reference, batch, generator=generator)

        stream = Stream(self.env, self.config.seed, group_size=self.group_size)
        rollout = stream.collect(total_episodes, act)
        order = plackett_luce(rollout.scores.numpy(), self.group_size, self.config.seed)
        batch = rollout.tokens.select(torch.from_numpy(order.flatten()))
        starts = batch.prompt_ids.shape[1] - batch.prompt_lengths
        prompts = [row[start:] for row, start in zip(batch.prompt_ids.tolist(), starts.tolist(), strict=True)]
        lengths = batch.response_lengths.tolist()
        responses = [row[:length] for row, length in zip(batch.response_ids.tolist(), lengths, strict=True)]
        unknown = Continuations(Ragged(prompts), Ragged(responses), torch.zeros(len(prompts)), rule=self.task.rule)
        return unknown._replace(ref_logprobs=unknown.log_ratios(reference, self.config.batch_size))

    def save(self, path: str | Path) -> None:
        """Write the policy as a plain Hugging Face model, completely or not at all."""
        with replace_folder(path) as folder:
            self.policy.save_pretrained(folder)

    @classmethod
    def load(cls, path: str | Path, env: TextVectorEnv, config: DPOConfig | None = None, group_size: int = 4) -> Self:
        """The agent with the policy of :meth:`save`; without a ``config`` as in a new one, β apart where the
        environment has no KL."""
        if config is None:
            config = DPOConfig(beta=env.kl_coef or DPOConfig.beta)
        agent = cls(env, config, group_size)
        agent.policy = saved_policy(path, env.task)
        return agent

    @classmethod
    def option_names(cls) -> list[str]:
        return [*(field.name for field in fields(DPOConfig) if field.name not in _NOT_HERE), *_OF_JOBS]

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        preset(options.get("preset", "pretrained"), "", 1)
        DPOConfig(**{name: value for name, value in options.items() if name not in _OF_JOBS})
        num_envs, group_size = options.get("num_envs", 64), options.get("group_size", 4)
        check_value("num_envs", num_envs, PositiveInt)
        check_value("group_size", group_size, Annotated[int, Ge(2), "Responses are compared."])
        check_groups(num_envs, group_size)

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
            agent = cls.load(job.folder, env, config, group_size)
            if _beside(job.folder).is_file():
                agent.tokens = int(load_file(_beside(job.folder))["response_lengths"].sum())
        else:
            agent = cls(env, config, group_size)
            agent.learn(job.total_episodes, job.folder, report_to=tuple(job.report_to), advance=job.advance)
        return Trained(agent, agent.policy.model, [], agent.tokens)


def _beside(folder: str | Path) -> Path:
    """The file of the ranked responses of a run."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}-responses.safetensors")


def _write(path: Path, texts: Continuations, identity: Mapping[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"ref_logprobs": texts.ref_logprobs}
    for name in ("prompts", "responses"):
        ragged: Ragged = getattr(texts, name)
        tensors |= {name: ragged.flat, f"{name[:-1]}_lengths": ragged.lengths}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {name: str(value) for name, value in identity.items()})


def _read(path: Path, identity: Mapping[str, int]) -> Continuations:
    """Raises ValueError where the file is not there, or not of this run."""
    if not path.is_file():
        rule = "the ranked responses of an interrupted run must lie beside its folder"
        raise ValueError(f"{rule}, got no {str(path)!r}. Put the file back, or learn in another folder.")
    with safe_open(path, "pt") as file:
        saved = file.metadata()
    for name, value in identity.items():
        if saved[name] != str(value):
            rule = f"a run must be resumed with the {name} it started with, {saved[name]}"
            raise ValueError(f"{rule}, got {value}. Restore it, or learn in another folder.")
    found = load_file(path)

    def ragged(name: str) -> Ragged:
        parts = found[name].split(found[f"{name[:-1]}_lengths"].tolist())
        return Ragged([part.tolist() for part in parts])

    return Continuations(ragged("prompts"), ragged("responses"), found["ref_logprobs"])


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
    orders = [rank(group, rng, temperature=1.0) for group in np.reshape(scores, (-1, group_size))]
    return np.asarray(orders) + np.arange(0, len(scores), group_size)[:, None]
