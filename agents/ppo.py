"""Proximal policy optimisation of a language model against a reward model, held near a reference by KL.

Objective: ``max_π E[r(x, y)] − β KL(π ‖ π_ref)`` by the clipped surrogate on token advantages. An action is a token;
the reward, KL included, comes from the environment at the last token.

How this differs from the papers it follows:

1. Log-probabilities and values are captured while decoding; no second pass of the policy over its own samples.
2. γ = 1 and the reward is terminal: GAE only spreads the value function's surprise.
3. The KL is the environment's (k1, summed over the response). ``per_token_kl`` moves each token's share onto that
   token: same return, other credit (Ziegler et al. 2019 do this).
4. Losses are sums over real tokens divided by the minibatch's token count, so micro-batches change nothing.
5. Advantages are whitened over the real tokens of the batch; scores never are, since that would rescale β.
6. Dropout is off, so the first ratio is 1.
7. The value head starts at zero, on the policy's trunk; ``separate_critic`` gives it a trunk of its own.

References: Schulman et al. 2017 (PPO); Ziegler et al. 2019 and Ouyang et al. 2022 (RLHF); Huang et al. 2024 (details).

Command: ``textenv ppo --env-id textenv/Assistant-v0``.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.losses import entropy_loss, ppo_policy_loss, value_loss
from agents.policy import ActorCritic, check_vocabulary, predict
from agents.returns import generalized_advantages, whiten
from agents.rollout import Rollout, Stream
from textenv import registry
from textenv.data import write_json
from textenv.interrupt import deferred_interrupt
from textenv.kl import AdaptiveKL, FixedKL, KLController
from textenv.lm import LanguageModel, Sampled, length_buckets, load_language_model
from textenv.progress import Advance
from textenv.scoring import spread_kl
from textenv.vector import TextVectorEnv

Callback = Callable[[dict[str, float]], Any]
"""Gets the log of each update; returning False stops learning."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO. The KL coefficient is the environment's ``kl_coef``."""

    batch_size: int = 256
    """Episodes an update; a multiple of the environment's slots. More is slower and less noisy."""
    epochs: int = 4
    """Passes over each batch. More reuses samples further from the policy that drew them."""
    minibatches: int = 4
    """Optimiser steps a pass."""
    micro_batch_size: int | None = None
    """Episodes in one forward pass; None takes the whole minibatch. Lower saves memory and changes no gradient."""
    learning_rate: float = 1e-3
    """Of Adam. The default suits the small worlds here; pretrained models want about 1e-5."""
    lr_decay_episodes: int | None = None
    """Episodes over which the learning rate falls linearly to 0; None keeps it constant."""
    clip_range: float = 0.2
    """ε of the surrogate: how far a ratio may leave 1 before its gradient stops."""
    value_clip_range: float | None = None
    """Holds the new value within this distance of the old one; None does not clip."""
    value_coef: float = 0.1
    """Weight of the value loss against the policy loss; matters while they share a trunk."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus. The KL already keeps the policy broad."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """λ of GAE: 1 trusts returns, 0 trusts the value function."""
    whiten_advantages: bool = True
    """Shift and scale advantages over the real tokens of a batch."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    per_token_kl: bool = False
    """Pay each token its own KL instead of paying the sum at the end."""
    kl_target: float | None = None
    """Nats an episode that an adaptive controller steers towards; None keeps the coefficient fixed."""
    kl_horizon: float = 10_000.0
    """Episodes over which the adaptive controller acts; larger is slower."""
    separate_critic: bool = False
    """Give the value function a trunk of its own (one more model in memory, one more forward pass)."""
    seed: int = 0
    """Of the prompts drawn, the tokens sampled and the minibatches."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "minibatches", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, with {name} (={getattr(self, name)}).")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must be ≥ 0, with learning_rate (={self.learning_rate}).")
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"minibatches (={self.minibatches}) must not exceed batch_size (={self.batch_size}): each needs "
                "an episode."
            )
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"gamma and lam must lie in [0, 1], with gamma (={self.gamma}), lam (={self.lam}).")


class PPO:
    """A language model that learns in a :class:`textenv.vector.TextVectorEnv`."""

    def __init__(
        self, env: TextVectorEnv, config: PPOConfig | None = None, policy: LanguageModel | None = None
    ) -> None:
        """``policy`` None starts from a copy of the environment's reference."""
        config = config or PPOConfig()
        self.env, self.config, self.task = env, config, env.task
        device = self.task.config.device
        reference_name = self.task.config.reference
        self.policy = policy or registry.fresh_language_model(reference_name, device)
        check_vocabulary(self.policy, self.task)
        critic = registry.fresh_language_model(reference_name, device).model if config.separate_critic else None
        self.actor = ActorCritic(self.policy.model, self.policy.hidden_size, critic).to(device)
        parameters = [parameter for parameter in self.actor.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.controller: KLController = (
            FixedKL(env.kl_coef)
            if config.kl_target is None
            else AdaptiveKL(env.kl_coef, config.kl_target, config.kl_horizon)
        )
        self.stream = Stream(env, config.seed)
        self.episodes = 0
        self.history: list[dict[str, float]] = []

    def learn(self, total_episodes: int, callback: Callback | None = None) -> "PPO":
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
        config = self.config
        mask = rollout.tokens.response_mask
        rewards = spread_kl(
            rollout.scores,
            rollout.kl_per_token,
            rollout.kl_coef,
            rollout.tokens.response_lengths,
            per_token=config.per_token_kl,
        )
        advantages, returns = generalized_advantages(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        residual = (returns - rollout.values)[mask]
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        logs = []
        for _ in range(config.epochs):
            order = torch.randperm(len(rewards), generator=self.generator)
            for index in order.tensor_split(config.minibatches):
                logs.append(self._step(rollout, advantages, returns, index))
        means = {key: float(np.mean([log[key] for log in logs])) for key in logs[0]}
        variance = returns[mask].var(unbiased=False)
        means["explained_variance"] = float(1.0 - residual.var(unbiased=False) / variance.clamp(min=1e-12))
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
        lengths = rollout.tokens.total_lengths[index]
        total = rollout.tokens.response_lengths[index].sum().item()
        device = self.task.config.device
        log = {"policy_loss": 0.0, "value_loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0}
        self.optimizer.zero_grad(set_to_none=True)
        for part in length_buckets(lengths, config.micro_batch_size or len(index)):
            chosen = index[part]
            batch = rollout.tokens.select(chosen).to(device)
            width = batch.response_ids.shape[1]
            old_logprobs, old_values, advantage, target = (
                x[chosen, :width].to(device) for x in (rollout.logprobs, rollout.values, advantages, returns)
            )
            mask = batch.response_mask
            new = self.actor.evaluate(batch, self.task, entropy=config.entropy_coef > 0)
            policy = ppo_policy_loss(
                new.logprobs, old_logprobs, advantage, mask, clip_range=config.clip_range, normalizer=total
            )
            value = value_loss(
                new.values, old_values, target, mask, clip_range=config.value_clip_range, normalizer=total
            )
            loss = policy.loss + config.value_coef * value.loss
            if new.entropy is not None:
                loss = loss + config.entropy_coef * entropy_loss(new.entropy, mask, normalizer=total)
            loss.backward()
            log["policy_loss"] += policy.loss.item()
            log["value_loss"] += value.loss.item()
            log["clip_fraction"] += policy.clip_fraction.item()
            log["approx_kl"] += policy.approx_kl.item()
        log["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.actor.parameters(), config.max_grad_norm).item()
        self.optimizer.step()
        return log

    def predict(self, observation: Any, state: Any = None, deterministic: bool = False) -> tuple[np.ndarray, Any]:
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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            self.policy.save_pretrained(temporary / "policy")
            save_file(
                {name: tensor for name, tensor in self.actor.state_dict().items() if not name.startswith("model.")},
                temporary / "value.safetensors",
            )
            torch.save(
                {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()},
                temporary / "optimizer.pt",
            )
            state = {
                "config": asdict(self.config),
                "episodes": self.episodes,
                "kl_coef": self.env.kl_coef,
                "prompt_ids": self.stream.prompt_ids.tolist(),
                "random_states": self.env.random_states,
                "history": self.history,
            }
            write_json(temporary / "state.json", state)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, path: str | Path, env: TextVectorEnv) -> "PPO":
        """Go on where :meth:`save` stood: continuing equals never having stopped, bit for bit on the CPU.

        Raises:
            ValueError: the folder is no readable checkpoint, or does not fit ``env``.
        """
        path = Path(path)
        try:
            state = json.loads((path / "state.json").read_text("utf-8"))
            value = load_file(path / "value.safetensors")
            tensors = torch.load(path / "optimizer.pt", weights_only=True)
            config = PPOConfig(**state["config"])
        except Exception as error:
            raise ValueError(
                f"a checkpoint must be a folder written by PPO.save, with path (={str(path)!r}): {error}. "
                "Point to another checkpoint, or train again."
            ) from error
        if len(state["prompt_ids"]) != env.num_envs:
            raise ValueError(
                f"the environment must have the slots of the checkpoint (={len(state['prompt_ids'])}), with num_envs "
                f"(={env.num_envs}). Make it with num_envs={len(state['prompt_ids'])}."
            )
        agent = cls(env, config, load_language_model(path / "policy", device=env.task.config.device))
        agent.actor.load_state_dict(value, strict=False)
        agent.optimizer.load_state_dict(tensors["optimizer"])
        agent.generator.set_state(tensors["generator"])
        agent.episodes, agent.history = state["episodes"], state["history"]
        env.kl_coef = agent.controller.kl_coef = state["kl_coef"]
        agent.stream.observation, infos = env.reset(options={"prompt_id": state["prompt_ids"]})
        agent.stream.prompt_ids = infos["prompt_id"]
        env.random_states = state["random_states"]
        return agent


def learn_with_checkpoints(
    agent: PPO, total_episodes: int, folder: str | Path, *, every: int = 10, advance: Advance | None = None
) -> None:
    """Learn until the agent has played ``total_episodes`` in all, saving on the way and at the end.

    Ctrl-C finishes the running update, saves, and raises KeyboardInterrupt: loading goes on from there.
    """
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


def rollout_log(rollout: Rollout) -> dict[str, float]:
    """Means over a batch of episodes."""
    mask = rollout.tokens.response_mask
    log = {
        "reward": rollout.rewards.mean().item(),
        "rm_score": rollout.rm_scores.mean().item(),
        "kl": rollout.kl_per_token.sum(1).mean().item(),
        "surprise": -rollout.logprobs[mask].mean().item(),
        "response_tokens": rollout.tokens.response_lengths.float().mean().item(),
        "eos_rate": float(np.mean([reason != "length" for reason in rollout.finish_reasons])),
    }
    if rollout.gold is not None:
        log["gold_score"] = rollout.gold.mean().item()
    return log
