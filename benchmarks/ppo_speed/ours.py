"""Our side: :class:`agents.ppo.PPO` on a registered environment, text in and text out."""

from typing import Any

import torch
from transformers.utils import logging as hf_logging

from agents.ppo import PPO, PPOConfig
from benchmarks.ppo_speed.talk import answers, asked, now, peak_rss_mb, phases, told
from textenv.vector import make_vec


def make_agent(spec: dict[str, Any]) -> PPO:
    """A learner whose environment has a slot for each prompt."""
    length: dict[str, Any] = {"max_new_tokens": spec["response"]}
    if spec["stop"] is None:
        length["min_new_tokens"] = spec["response"]
    elif spec["stop"] != "<eos>":
        length["stop_tokens"] = (spec["stop"],)
    env = make_vec(
        "textenv/Text-v0",
        spec["batch"],
        prompts=spec["prompts"],
        reference=spec["reference"],
        reward_model=spec["reward"],
        dtype=spec["dtype"],
        max_prompt_tokens=spec["prompt"],
        **length,
    )
    config = PPOConfig(
        batch_size=spec["batch"],
        epochs=spec["epochs"],
        minibatches=spec["minibatches"],
        learning_rate=spec["learning_rate"],
        lora_rank=spec["lora_rank"],
        value_function=spec["value_function"],
        gradient_checkpointing=spec["gradient_checkpointing"],
        offload_frozen=spec["offload_frozen"],
    )
    return PPO(env, config)


def iteration(agent: PPO) -> dict[str, Any]:
    """Seconds and tokens of one batch, whose prompts are all prompts, each once."""
    agent.stream.restart(list(range(agent.env.num_envs)))
    start = now()
    rollout = agent.collect()
    collected = now()
    log = agent.update(rollout)
    end = now()
    lengths = rollout.tokens.response_lengths
    return {
        **phases(start, collected, end),
        "response_tokens": int(lengths.sum()),
        "tokens": int(rollout.tokens.total_lengths.sum()),
        "padding": log["padding_share"],
        "peak_rss_mb": peak_rss_mb(),
    }


def main(spec: dict[str, Any]) -> None:
    say = answers()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(spec["threads"])
    agent = make_agent(spec)
    while asked():
        say(iteration(agent))


if __name__ == "__main__":
    main(told())
