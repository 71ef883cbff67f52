"""What does the KV cache save when Stable-Baselines3 collects, and what does the environment cost beside the models?

Stock ``PPO.collect_rollouts`` with :class:`agents.sb3.CausalLMPolicy`, 64 environments, 16 prompt + 32 response tokens,
GPT-2 of 6 layers × 384 (vocabulary 1,024), in turn with the cache and without, in one process. Every episode spends its
whole budget (EOS is masked), so both sides handle the same tokens. The reward counts words; the KL takes one pass of a
reference of the same size, on both sides. Bookkeeping is the time in the environment that is neither of the two.

Command: ``python -m benchmarks.sb3_rollout`` (about three minutes on one core).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from transformers.utils import logging as hf_logging

import textenv
from agents.sb3 import CausalLMPolicy, make_vec_env
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


def make_agent(folder: Path) -> PPO:
    """An agent about to collect its first rollout of one episode a slot."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, SIZES["vocab_size"], (EPISODES, PROMPT), generator=generator).tolist()
    textenv.register_reward_model("response-words", response_words)
    env: Any = make_vec_env(
        "textenv/Text-v0",
        EPISODES,
        seed=0,
        prompts=[" ".join(f"w{i}" for i in row) for row in prompts],
        reference=str(folder / "reference"),
        reward_model="response-words",
        max_prompt_tokens=PROMPT,
        max_new_tokens=RESPONSE,
        min_new_tokens=RESPONSE,
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(1)
    step_clock, model_clock = Clock(), Clock()
    scoring.response_logprobs = model_clock.wrap(scoring.response_logprobs)
    scoring.call_reward_model = model_clock.wrap(scoring.call_reward_model)
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as temporary:
        make_models(Path(temporary), SIZES)
        agent = make_agent(Path(temporary))
        assert agent.env is not None
        agent.env.step = step_clock.wrap(agent.env.step)
        agent._setup_learn(EPISODES * RESPONSE)
        for repeat in range(arguments.repeats + 1):
            for use_cache in (True, False):
                run = collect(agent, use_cache=use_cache, step_clock=step_clock, model_clock=model_clock)
                if repeat:  # the first warms up
                    runs[use_cache].append(run)
    tokens = EPISODES * RESPONSE
    seconds = {cached: statistics.median(run["seconds"] for run in part) for cached, part in runs.items()}
    ratio = statistics.median(slow["seconds"] / fast["seconds"] for fast, slow in zip(runs[True], runs[False]))
    share = statistics.median(run["bookkeeping_share"] for run in runs[True])
    figures = {
        "tokens_per_second": {"cached": tokens / seconds[True], "without": tokens / seconds[False]},
        "ratio": ratio,
        "bookkeeping_share": share,
        "repeats": arguments.repeats,
        "sizes": SIZES,
    }
    print(f"with the cache {tokens / seconds[True]:.0f} tokens/s, without {tokens / seconds[False]:.0f}: × {ratio:.1f}")
    print(f"environment and scoring bookkeeping: {100 * share:.1f} % of a cached rollout")
    print(write_result("sb3_rollout", figures))


if __name__ == "__main__":
    main()
