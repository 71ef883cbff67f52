"""An answer token by token: KL, and the value and advantage that the algorithm which trained the policy sees."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file

from agents.core.actor import ActorCritic
from agents.core.config import CriticConfig
from agents.core.returns import generalized_advantages
from agents.ppo import PPOConfig
from agents.reinforce import ReinforceConfig
from textenv.chat.stream import token_texts
from textenv.evaluation import Evaluation
from textenv.lm import LanguageModel, Responses, pad_left
from textenv.scoring import spread_kl
from textenv.task import Task
from textenv.training.memory import critic_to_train

CONFIGS: dict[str, type[CriticConfig]] = {"PPO": PPOConfig, "Reinforce": ReinforceConfig}
"""Algorithms that save a value function."""


class Critic(NamedTuple):
    """The value function of a checkpoint."""

    actor: ActorCritic
    config: CriticConfig
    unit: float
    """Reward of one unit of its values (``scale_rewards``)."""


class TokenFigures(NamedTuple):
    """One answer, an entry for each of its tokens, the ending one included."""

    pieces: list[str]
    """What each token adds to the text; its name where that is nothing."""
    kl: list[float] | None
    """log π − log π_ref, nats; None where the KL is unknown."""
    values: list[float] | None
    """Expected reward before the token; None without a value function."""
    advantages: list[float] | None
    """How much better the token was than expected, before whitening; None without values or KL."""


def saved_critic(folder: str | Path, policy: LanguageModel, task: Task) -> Critic | None:
    """The value function in a checkpoint of PPO or REINFORCE, on its ``policy``; None in any other folder.

    Raises:
        ValueError: it does not fit the models of the task.
    """
    file = Path(folder) / "state.json"
    state = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if state.get("algorithm") not in CONFIGS:
        return None
    config = CONFIGS[state["algorithm"]](**state["config"])
    place = config.value_function
    actor = ActorCritic(policy, critic_to_train(config, task, place), shared=place == "shared")
    try:
        actor.load_state_dict(load_file(file.with_name("value.safetensors")), strict=False)
    except RuntimeError as error:
        rule = "a value function must fit the environment's models, which it was trained on"
        raise ValueError(f"{rule}, got {str(folder)!r}: {error}. Evaluate it with those, or without a page.") from None
    deviation = state["return_unit"]["var"] ** 0.5 if config.scale_rewards else 1.0
    return Critic(actor.to(task.config.device), config, deviation if deviation > 1e-6 else 1.0)


@torch.no_grad()
def token_figures(
    evaluation: Evaluation, rows: Int[np.ndarray, " n"], task: Task, critic: Critic | None = None
) -> list[TokenFigures]:
    """The answers in ``rows`` of an evaluation on ``task``, token by token."""
    prompts, prompt_lengths = pad_left([task.prompts.ids[i] for i in evaluation.prompt_ids[rows]], 0)
    ids, lengths = torch.from_numpy(evaluation.response_ids[rows]), torch.from_numpy(evaluation.lengths[rows])
    batch = Responses(prompts, prompt_lengths, ids, lengths)
    kl = None if evaluation.kl_per_token is None else torch.from_numpy(evaluation.kl_per_token[rows])
    values = advantages = None
    if critic is not None:
        device = task.config.device
        values = critic.actor.evaluate(batch.to(device), task).values.cpu() * critic.unit
    if critic is not None and values is not None and kl is not None:
        beta, config = task.scorer.kl_coef, critic.config
        scores = torch.from_numpy(evaluation.rewards[rows]).float() + beta * kl.sum(1)
        rewards = spread_kl(scores, kl, beta, lengths, per_token=config.per_token_kl)
        gamma, lam = (config.gamma, config.lam) if isinstance(config, PPOConfig) else (1.0, 1.0)
        advantages = generalized_advantages(rewards, values, batch.response_mask, gamma=gamma, lam=lam).advantages
    columns = [None if c is None else c.tolist() for c in (kl, values, advantages)]
    return [
        TokenFigures(
            token_texts(task.reference.tokenizer, ids[i, :length].tolist()),
            *(None if column is None else column[i][:length] for column in columns),
        )
        for i, length in enumerate(lengths.tolist())
    ]
