"""What the policy-gradient algorithms of this package share: the loop, the gradient step, the checkpoint.

An algorithm is its config, its :meth:`Learner.advantages` and its :meth:`Learner.loss`. All else is here, once: whole
responses are collected; each of ``epochs`` passes splits the batch into ``minibatches``; each of those is one optimiser
step, whose gradient is added up over micro-batches of episodes of similar length.
"""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.core.actor import ActorCritic, Evaluated, check_vocabulary, predict
from agents.core.config import LearnerConfig
from agents.core.losses import entropy_loss, ppo_policy_loss
from agents.core.returns import Advantages
from agents.core.rollout import Rollout, Stream, rollout_log
from textenv import registry
from textenv.data.folders import check_replaceable, recover, replace_folder
from textenv.data.records import write_json
from textenv.kl import AdaptiveKL, FixedKL, KLController
from textenv.lm import LanguageModel, Sampled, length_buckets, load_language_model
from textenv.training.interrupt import deferred_interrupt
from textenv.training.progress import Advance
from textenv.vector import TextVectorEnv

Callback = Callable[[dict[str, float]], Any]
"""Gets the log of each update; returning False stops learning."""


class MicroBatch(NamedTuple):
    """Episodes of one forward pass, as they were when they were collected."""

    logprobs: Float[Tensor, "n t"]
    values: Float[Tensor, "n t"]
    advantages: Float[Tensor, "n t"]
    returns: Float[Tensor, "n t"]
    mask: Bool[Tensor, "n t"]
    tokens: int
    """Real tokens of the whole minibatch: what a loss divides by, so that micro-batches change nothing."""
    episodes: int
    """Of the whole minibatch."""


class Loss(NamedTuple):
    loss: Float[Tensor, ""]
    log: dict[str, Float[Tensor, ""]]
    """Figures that add up over the micro-batches of a minibatch."""


def clipped_loss(new: Evaluated, old: MicroBatch, *, clip_range: float, normalizer: int) -> Loss:
    """The clipped surrogate alone, divided by ``normalizer``; its figures are means over tokens all the same."""
    policy = ppo_policy_loss(
        new.logprobs, old.logprobs, old.advantages, old.mask, clip_range=clip_range, normalizer=normalizer
    )
    share = normalizer / old.tokens
    log = {"clip_fraction": policy.clip_fraction * share, "approx_kl": policy.approx_kl * share}
    return Loss(policy.loss, {"policy_loss": policy.loss, **log})


Config = TypeVar("Config", bound=LearnerConfig)


class Learner(ABC, Generic[Config]):
    """A language model that learns in a :class:`textenv.vector.TextVectorEnv`."""

    config_type: type[LearnerConfig]

    def __init__(self, env: TextVectorEnv, config: Config | None = None, policy: LanguageModel | None = None) -> None:
        """``policy`` None starts from a copy of the environment's reference."""
        config = config or cast(Config, self.config_type())
        self.env, self.config, self.task = env, config, env.task
        device = self.task.config.device
        reference_name = self.task.config.reference
        self.policy = policy or registry.fresh_language_model(reference_name, device)
        check_vocabulary(self.policy, self.task)
        critic = registry.fresh_language_model(reference_name, device).model if config.critic == "trunk" else None
        self.actor = ActorCritic(self.policy.model, self.policy.hidden_size, critic).to(device)
        self.actor.value_head.requires_grad_(config.critic != "none")  # without a critic it stays at 0
        parameters = [parameter for parameter in self.actor.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.controller: KLController = (
            FixedKL(env.kl_coef)
            if config.kl_target is None
            else AdaptiveKL(env.kl_coef, config.kl_target, config.kl_horizon)
        )
        self.stream = Stream(env, config.seed, group_size=config.group_size)
        self.episodes = 0
        self.history: list[dict[str, float]] = []

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Advantages:
        """What each token of a batch was worth."""

    @abstractmethod
    def loss(self, new: Evaluated, old: MicroBatch) -> Loss:
        """What the optimiser lowers: sums over the real tokens of some episodes, divided by ``old.tokens``."""

    def learn(self, total_episodes: int, callback: Callback | None = None) -> Self:
        """Play and learn from ``total_episodes`` more episodes (rounded up to whole batches)."""
        for _ in range(math.ceil(total_episodes / self.config.batch_size)):
            start = time.perf_counter()
            rollout = self.collect()
            collected = time.perf_counter()
            log = self.update(rollout)
            self.episodes += self.config.batch_size
            log |= rollout_log(rollout)
            log["kl_coef"] = rollout.kl_coef
            self.env.kl_coef = self.controller.update(log["kl"], self.config.batch_size)
            log["episodes"] = float(self.episodes)
            log["rollout_seconds"], log["update_seconds"] = collected - start, time.perf_counter() - collected
            self.history.append(log)
            if callback is not None and callback(log) is False:
                break
        return self

    def collect(self) -> Rollout:
        """One batch of episodes with the current policy."""
        return self.stream.collect(
            self.config.batch_size,
            lambda observation: self.actor.act(observation, self.task, generator=self.generator),
        )

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy on a batch; returns means over its optimiser steps."""
        advantages, returns = self.advantages(rollout)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        logs = []
        for _ in range(self.config.epochs):
            order = torch.randperm(len(rollout.rewards), generator=self.generator)
            for index in order.tensor_split(self.config.minibatches):
                logs.append(self._step(rollout, advantages, returns, index))
        means = {key: float(np.mean([log[key] for log in logs])) for key in logs[0]}
        if self.config.critic != "none":
            mask = rollout.tokens.response_mask
            residual, variance = (x[mask].var(unbiased=False) for x in (returns - rollout.values, returns))
            means["explained_variance"] = float(1.0 - residual / variance.clamp(min=1e-12))
        means["learning_rate"] = self.learning_rate
        return means

    @property
    def learning_rate(self) -> float:
        decay = self.config.lr_decay_episodes
        return self.config.learning_rate * (1.0 if decay is None else max(0.0, 1.0 - self.episodes / decay))

    def _step(
        self,
        rollout: Rollout,
        advantages: Float[Tensor, "B T"],
        returns: Float[Tensor, "B T"],
        index: Int[Tensor, " n"],
    ) -> dict[str, float]:
        """One optimiser step on the episodes of ``index``, micro-batch by micro-batch."""
        config = self.config
        columns = (rollout.logprobs, rollout.values, advantages, returns)
        tokens = int(rollout.tokens.response_lengths[index].sum())
        device = self.task.config.device
        log: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for part in length_buckets(rollout.tokens.total_lengths[index], config.micro_batch_size or len(index)):
            chosen = index[part]
            batch = rollout.tokens.select(chosen).to(device)
            mask = batch.response_mask
            logprobs, values, advantage, target = (x[chosen, : mask.shape[1]].to(device) for x in columns)
            old = MicroBatch(logprobs, values, advantage, target, mask, tokens, len(index))
            new = self.actor.evaluate(batch, self.task, entropy=config.entropy_coef > 0)
            loss, figures = self.loss(new, old)
            if new.entropy is not None:
                loss = loss + config.entropy_coef * entropy_loss(new.entropy, mask, normalizer=tokens)
            loss.backward()
            for name, figure in figures.items():
                log[name] = log.get(name, 0.0) + figure.item()
        log["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.actor.parameters(), config.max_grad_norm).item()
        self.optimizer.step()
        return log

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """The next token of each observation, single or batched."""
        tokens = predict(self.policy.model, observation, self.task, generator=self.generator, greedy=deterministic)
        return tokens, state

    def respond(self, observation: Any, deterministic: bool = False) -> Sampled:
        """A whole response to each fresh observation: the fast path of evaluation."""
        return self.actor.act(observation, self.task, generator=self.generator, greedy=deterministic)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder, whole or not at all.

        ``policy/`` is a plain Hugging Face model. The rest is what going on needs: value function, optimiser, random
        states, KL coefficient, the prompts that wait.
        """
        with replace_folder(path) as folder:
            self.policy.save_pretrained(folder / "policy")
            save_file(
                {name: tensor for name, tensor in self.actor.state_dict().items() if not name.startswith("model.")},
                folder / "value.safetensors",
            )
            tensors = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
            torch.save(tensors, folder / "optimizer.pt")
            state = {
                "algorithm": type(self).__name__,
                "config": asdict(self.config),
                "episodes": self.episodes,
                "kl_coef": self.env.kl_coef,
                "prompt_ids": self.stream.prompt_ids.tolist(),
                "random_states": self.env.random_states,
                "history": self.history,
            }
            write_json(folder / "state.json", state)

    @classmethod
    def load(cls, path: str | Path, env: TextVectorEnv) -> Self:
        """Go on where :meth:`save` stood: continuing equals never having stopped, bit for bit on the CPU.

        Raises:
            ValueError: the folder is no readable checkpoint of this algorithm, or does not fit ``env``.
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
            raise ValueError(
                f"a checkpoint must be a folder written by {cls.__name__}.save, with path (={str(path)!r}): {error}. "
                "Point to another checkpoint, or train again."
            ) from error
        if len(state["prompt_ids"]) != env.num_envs:
            raise ValueError(
                f"the environment must have the slots of the checkpoint (={len(state['prompt_ids'])}), with num_envs "
                f"(={env.num_envs}). Make it with num_envs={len(state['prompt_ids'])}."
            )
        policy = load_language_model(path / "policy", device=env.task.config.device)
        agent = cls(env, cast(Config, config), policy)
        agent.actor.load_state_dict(value, strict=False)
        agent.optimizer.load_state_dict(tensors["optimizer"])
        agent.generator.set_state(tensors["generator"])
        agent.episodes, agent.history = state["episodes"], state["history"]
        env.kl_coef = agent.controller.kl_coef = state["kl_coef"]
        agent.stream.restart(state["prompt_ids"])
        env.random_states = state["random_states"]
        return agent


def learn_with_checkpoints(
    agent: Learner[Any], total_episodes: int, folder: str | Path, *, every: int = 10, advance: Advance | None = None
) -> None:
    """Learn until the agent has played ``total_episodes`` in all, saving on the way and at the end.

    Ctrl-C finishes the running update, saves, and raises KeyboardInterrupt: loading goes on from there.
    """
    check_replaceable(folder)
    size = agent.config.batch_size
    total = math.ceil(total_episodes / size)

    def after_update(log: dict[str, float]) -> bool:
        done = len(agent.history)
        if advance is not None:
            shown = ("rm_score", "kl", "gold_score")
            advance(done, total, {key: log[key] for key in shown if key in log})
        if done % every == 0 and done < total and not stopped.is_set():
            agent.save(folder)
        return not stopped.is_set()

    with deferred_interrupt() as stopped:
        agent.learn(max(0, total - len(agent.history)) * size, callback=after_update)
        agent.save(folder)
    if stopped.is_set() and len(agent.history) < total:
        raise KeyboardInterrupt
