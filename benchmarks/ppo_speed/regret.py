"""Is learning traded for speed or memory? The regret on the exact world in float32, in bfloat16 and with adapters.

Packed passes, as they come; 38,400 episodes, three seeds. A regret ratio is (J* − J) / (J* − J of the reference).

Command: ``python -m benchmarks.ppo_speed.regret`` (ten minutes on one core).
"""

from typing import Any

import numpy as np
import torch
import tyro
from transformers.utils import logging as hf_logging

from agents.ppo import PPO, PPOConfig
from agents.presets import preset
from benchmarks.record import write_result
from textenv.tasks.exact import exact_world
from textenv.vector import make_vec

EPISODES = 38_400
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "LoRA, rank 32": ({}, {"lora_rank": 32, "learning_rate": 2e-3}),
}
"""What each changes in the environment and in the preset of PPO."""


def regret(mode: str, seed: int) -> float:
    options, changes = MODES[mode]
    env = make_vec("textenv/Micro-v0", 256, **options)
    settings: dict[str, Any] = {**preset("micro", "ppo", EPISODES), **changes, "seed": seed}
    agent = PPO(env, PPOConfig(**settings)).learn(EPISODES)
    exact = exact_world(make_vec("textenv/Micro-v0", 1))  # the world in float32
    return exact.measure(agent.policy.model).regret_ratio


def main(seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    ratios = {}
    for mode in MODES:
        ratios[mode] = [regret(mode, seed) for seed in seeds]
        print(mode, [round(ratio, 4) for ratio in ratios[mode]], flush=True)
    means = {mode: float(np.mean(found)) for mode, found in ratios.items()}
    print(write_result("ppo_speed.regret", {"episodes": EPISODES, "seeds": seeds, "ratios": ratios, "means": means}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
