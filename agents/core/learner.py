"""What the policy-gradient algorithms of this package share: the loop and the gradient step.

An algorithm is its config, its :meth:`Learner.advantages` and its :meth:`Learner.loss`. Everything else is here, once:
whole responses are collected; each of ``epochs`` passes splits the batch into ``minibatches``; each of those is one
optimiser step, whose gradient is summed over micro-batches of episodes of similar length.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from agents.core.actor import ActorCritic, Evaluated
from agents.core.agent import LanguageModelAgent
from agents.core.config import CriticConfig, LearnerConfig
from agents.core.losses import Loss
from agents.core.returns import Advantages
from agents.core.rollout import Rollout, Stream
from agents.logs.alarms import alarms
from agents.logs.figures import add_figures, explained_variance, machine_log, pass_log, rollout_log, totals, update_log
from textenv.lm import LanguageModel
from textenv.lm.frozen import kept_activations
from textenv.lm.packing import packed
from textenv.scoring import ReturnUnit
from textenv.training.memory import critic_to_train, frozen_to_offload, policy_to_train
from textenv.training.memory.sharding import shard
from textenv.training.optimizer import clip_gradients, make_adamw, set_rates
from textenv.training.processes import own_generator, same_weights
from textenv.vector import TextVectorEnv


class MicroBatch(NamedTuple):
    """Episodes of one forward pass, as they were collected."""

    logprobs: Float[Tensor, "n t"]
    values: Float[Tensor, "n t"]
    advantages: Float[Tensor, "n t"]
    returns: Float[Tensor, "n t"]
    mask: Bool[Tensor, "n t"]
    tokens: int
    """Real tokens of the whole minibatch, by which a loss divides, so that micro-batches change nothing."""
    episodes: int
    """Episodes of the whole minibatch."""


Config = TypeVar("Config", bound=LearnerConfig)


class Learner(LanguageModelAgent, ABC, Generic[Config]):
    """A language model that learns in a :class:`textenv.vector.TextVectorEnv`."""

    config_type: type[LearnerConfig]

    def __init__(self, env: TextVectorEnv, config: Config | None = None, policy: LanguageModel | None = None) -> None:
        """``policy`` is trained in place (with ``lora_rank``, adapters on its weights); by default it is a copy of the
        environment's reference. ValueError: see :func:`policy_to_train`; or the environment is not SameStep, ``policy``
        has another vocabulary, or sizes do not fit."""
        config = config or cast(Config, self.config_type())
        super().__init__(policy_to_train(config, env.task, policy), env.task, seed=config.seed)
        self.env, self.config = env, config
        place, rates, self.policy_starts = "head", [config.learning_rate], 0
        if isinstance(config, CriticConfig):
            place, self.policy_starts = config.value_function, config.critic_warmup * config.batch_size
            rates.append(config.value_learning_rate or 10 * config.learning_rate)
        critic = critic_to_train(config, env.task, place)
        self.actor = ActorCritic(self.policy, critic, shared=place == "shared", seed=config.seed)
        same_weights(self.actor.to(env.task.config.device))
        self.shards = shard(self.actor, (self.policy.model, self.actor.critic))
        self.parts = self.shards.parts("value_head")[: len(rates)]
        self.optimizer = make_adamw(config, self.parts, rates, eight_bit=config.adam_8bit)
        self.offload = frozen_to_offload(config, env.task, self.actor)
        self.sampler = config.sampler()
        self.controller = config.controller(env.kl_coef)
        self.stream = Stream(env, config.seed, group_size=config.group_size)
        self.return_unit = ReturnUnit()
        self.episodes = 0
        self.history: list[dict[str, float]] = []

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Advantages:
        """How much better each token of a batch was than expected, and the targets of the value function."""

    @abstractmethod
    def loss(self, new: Evaluated, old: MicroBatch) -> Loss:
        """The loss to minimise: a sum over the real tokens of these episodes, divided by ``old.tokens``."""

    def learn(self, total_episodes: int, callback: Callable[[dict[str, float]], Any] | None = None) -> Self:
        """Learn from ``total_episodes`` more episodes, rounded up to whole batches. ``callback`` receives the log of
        each update, and stops the training by returning False."""
        for _ in range(math.ceil(total_episodes / self.config.batch_size)):
            start = time.perf_counter()
            with self.shards.sharing(self.policy.model, self.task.reference.model):
                rollout, collected = self.collect(), time.perf_counter()
                log = rollout_log(rollout, self.sampler) | self.update(rollout)
            if self.episodes >= self.policy_starts:
                self.env.kl_coef = self.controller.update(log["kl"], self.config.batch_size)
            self.episodes += self.config.batch_size
            log |= {"kl_coef": rollout.kl_coef, "episodes": float(self.episodes)}
            log |= machine_log(log, rollout, (start, collected, time.perf_counter()), self.task.config.device)
            log |= alarms(log, self.history, self.task.config)
            self.history.append(log)
            if callback is not None and callback(log) is False:
                break
        return self

    def collect(self) -> Rollout:
        """One batch of episodes with the current policy; the server at ``sampler_url`` draws its responses."""
        self.optimizer.zero_grad(set_to_none=True)  # a rollout can use the memory of the last gradient
        self.offload.before_a_rollout()
        served = self.sampler and partial(self.sampler.holding(self.policy).act, score=self.actor.evaluate)
        act = partial(served or self.actor.act, task=self.task, generator=own_generator(self.generator))
        return self.stream.collect(self.config.batch_size, partial(act, slots=self.config.rollout_slots))

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy on a batch; returns the log of its optimiser steps."""
        config = self.config
        if config.scale_rewards:
            unit = self.return_unit.after(rollout.rewards)
            rollout = rollout._replace(rewards=rollout.rewards / unit, kl_coef=rollout.kl_coef / unit)
        targets = self.advantages(rollout)
        rate = set_rates(self.optimizer, config, self.episodes, config.lr_decay_episodes, ahead=config.batch_size)
        logs = []
        kept = (self.policy.model, self.actor.critic) if config.epochs > 1 else ()
        with kept_activations(*kept), self.offload.away(), self.shards.scattered():
            for _ in range(config.epochs):
                logs += [self.step(rollout, targets, index) for index in self.minibatches(rollout)]
                if config.target_kl is not None and logs[-1].get("approx_kl", 0.0) > config.target_kl:
                    break
        log = update_log(logs) | {"learning_rate": config.learning_rate * rate}
        return log | (explained_variance(rollout, targets) if isinstance(config, CriticConfig) else {})

    def minibatches(self, rollout: Rollout) -> Sequence[Int[Tensor, " n"]]:
        """The episodes of each optimiser step of one pass, in random order."""
        return torch.randperm(len(rollout.rewards), generator=self.generator).tensor_split(self.config.minibatches)

    def step(self, rollout: Rollout, targets: Advantages, index: Int[Tensor, " n"]) -> dict[str, float]:
        """One optimiser step on the episodes of ``index``, in micro-batches of the share of this process."""
        config, device = self.config, self.task.config.device
        columns = (rollout.logprobs, rollout.values, *targets)
        tokens = int(rollout.tokens.response_lengths[index].sum())
        log: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for chosen, counts in self.shards.passes(index, rollout.tokens.total_lengths, **config.limits):
            batch = rollout.tokens.select(chosen).to(device)
            mask = batch.response_mask
            logprobs, values, advantages, returns = (x[chosen, : mask.shape[1]].to(device) for x in columns)
            old = MicroBatch(logprobs, values, advantages, returns, mask, tokens, len(index))
            new = self.shards(partial(self.actor.evaluate, batch, self.task, entropy=config.entropy_coef > 0))
            loss, figures = self.loss(new, old)
            if new.entropy is not None:
                figures["entropy"] = new.entropy.detach().sum() / tokens
                loss = loss - config.entropy_coef * (new.entropy.sum() / tokens)
            (loss if counts else 0 * loss).backward()
            if counts:
                with self.task.precision():
                    unpadded = packed(self.policy.model, batch)
                add_figures(log, {**figures, **pass_log(new, logprobs, batch, unpadded)})
        if self.episodes < self.policy_starts:  # until then the value function learns alone
            self.policy.model.zero_grad(set_to_none=True)
        norm, *_ = clip_gradients(self.parts, config.max_grad_norm)
        self.optimizer.step()
        return {**totals(log), "grad_norm": norm}
