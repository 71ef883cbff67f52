"""What does the KV cache save for Stable-Baselines3, and what does the environment cost on top of the models?

Stock ``PPO.collect_rollouts`` with :class:`agents.sb3.CausalLMPolicy`, 64 environments, 16 prompt + 32 response tokens,
GPT-2 of 6 layers × 384 (vocabulary 1,024), alternately with and without the cache, in one process. Two cases:

* **together**: every episode spends its whole budget (EOS is masked), so all slots begin and end at the same step;
* **apart**: one token in 24 ends an episode, so slots restart at different steps and have different lengths.

The reward counts words; the KL takes a pass of a reference of the same size, on both sides. Bookkeeping is the rest of
the environment's time. The bytes of sb3-contrib's action masks are compared with those of :mod:`agents.sb3.masks`.

Command: ``python -m benchmarks.sb3_rollout`` (about five minutes on one core).
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from transformers.utils import logging as hf_logging

import textenv
from agents.sb3 import CausalLMPolicy, make_vec_env
from agents.sb3.masks import SharedMasks
from benchmarks.ppo_iteration import EPISODES, PROMPT, RESPONSE, make_models
from benchmarks.record import write_result
from benchmarks.rollout_cost import Clock
from textenv import scoring

SIZES = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 1024}


class Nothing(BaseCallback):
    def _on_step(self) -> bool:
        return True


def response_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion.split())) for completion in completions]


CASES: dict[str, dict[str, Any]] = {
    "together": {"min_new_tokens": RESPONSE},
    "apart": {"stop_tokens": [f"w{i}" for i in range(10, SIZES["vocab_size"], 24)]},
}


def make_agent(folder: Path, case: str) -> PPO:
    """An agent that is ready to collect rollouts of 32 steps per slot."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, SIZES["vocab_size"], (EPISODES, PROMPT), generator=generator).tolist()
    textenv.register_reward_model("response-words", response_words)
    texts = [" ".join(f"w{i}" for i in row) for row in prompts]
    options = {"reference": str(folder / "reference"), "reward_model": "response-words", **CASES[case]}
    options |= {"max_prompt_tokens": PROMPT, "max_new_tokens": RESPONSE}
    env: Any = make_vec_env("textenv/Text-v0", EPISODES, seed=0, prompts=texts, **options)
    return PPO(CausalLMPolicy, env, n_steps=RESPONSE, batch_size=EPISODES * RESPONSE, gamma=1.0, seed=0, device="cpu")


def collect(agent: PPO, *, use_cache: bool, step_clock: Clock, model_clock: Clock) -> dict[str, float]:
    """Seconds of one rollout, and how much of it was neither policy, reference nor reward model."""
    policy: Any = agent.policy
    policy.use_cache = use_cache
    policy._cache.forget()
    step_clock.seconds = model_clock.seconds = 0.0
    assert isinstance(agent.env, VecEnv)
    callback = Nothing()
    callback.init_callback(agent)
    start = time.perf_counter()
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, RESPONSE)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bookkeeping_share": (step_clock.seconds - model_clock.seconds) / seconds}


def compare(folder: Path, case: str, repeats: int, model_clock: Clock) -> dict[str, Any]:
    """Medians over ``repeats`` pairs of rollouts, alternately with and without the cache."""
    step_clock = Clock()
    agent = make_agent(folder, case)
    assert agent.env is not None
    agent.env.step = step_clock.wrap(agent.env.step)
    agent._setup_learn(EPISODES * RESPONSE)
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for use_cache in (True, False):
            run = collect(agent, use_cache=use_cache, step_clock=step_clock, model_clock=model_clock)
            if repeat:  # the first warms up
                runs[use_cache].append(run)
    tokens = EPISODES * RESPONSE
    seconds = {cached: statistics.median(run["seconds"] for run in part) for cached, part in runs.items()}
    return {
        "tokens_per_second": {"cached": tokens / seconds[True], "without": tokens / seconds[False]},
        "ratio": statistics.median(slow["seconds"] / fast["seconds"] for fast, slow in zip(runs[True], runs[False])),
        "bookkeeping_share": statistics.median(run["bookkeeping_share"] for run in runs[True]),
    }


def mask_bytes(vocabulary: int) -> dict[str, int]:
    """Bytes of one rollout's action masks in the stock buffer and in ours; half of the steps forbid one token."""
    box = spaces.Box(0, vocabulary - 1, (PROMPT + RESPONSE,), np.int64)
    stock = MaskableRolloutBuffer(RESPONSE, box, spaces.Discrete(vocabulary), device="cpu", n_envs=EPISODES)
    shared = SharedMasks(RESPONSE, box, spaces.Discrete(vocabulary), device="cpu", n_envs=EPISODES)
    masks = np.ones((EPISODES, vocabulary), dtype=bool)
    masks[::2, 0] = False
    nothing = np.zeros(EPISODES)
    for _ in range(RESPONSE):
        observation, value = np.zeros((EPISODES, PROMPT + RESPONSE)), torch.zeros(EPISODES)
        shared.add(observation, nothing, nothing, nothing, value, value, action_masks=masks)
    ours = shared.action_masks.nbytes + sum(map(len, shared.masks))
    return {"vocabulary": vocabulary, "stock": stock.action_masks.nbytes, "shared": ours}


def main(repeats: int = 3) -> None:
    hf_logging.disable_progress_bar()
    torch.set_num_threads(1)
    model_clock = Clock()
    scoring.response_logprobs = model_clock.wrap(scoring.response_logprobs)
    scoring.call_reward_model = model_clock.wrap(scoring.call_reward_model)
    figures: dict[str, Any] = {"repeats": repeats, "sizes": SIZES, "mask_bytes": mask_bytes(50_000)}
    with tempfile.TemporaryDirectory() as temporary:
        make_models(Path(temporary), SIZES)
        for case in CASES:
            figures[case] = compare(Path(temporary), case, repeats, model_clock)
            speed = figures[case]["tokens_per_second"]
            print(
                f"{case}: with the cache {speed['cached']:.0f} tokens/s, without {speed['without']:.0f}: "
                f"× {figures[case]['ratio']:.1f}; bookkeeping {100 * figures[case]['bookkeeping_share']:.1f} %"
            )
    print(write_result("sb3_rollout", figures))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
