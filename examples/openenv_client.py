"""A client of OpenEnv plays episodes on a server of ours, its own language model drawing the tokens.

Commands: ``python -m textenv.integrations.openenv textenv/Assistant-v0``, and beside it
``python examples/openenv_client.py`` (``pip install openenv-core==0.3.0``).
"""

import torch
from openenv.core import GenericEnvClient

import textenv
from textenv.lm import sample_responses
from textenv.task import token_rule


def play(url: str, model_name: str, episodes: int, seed: int = 0) -> list[dict]:
    """Whole responses of a model; what the server says at the end of each episode."""
    model, generator = textenv.language_model(model_name), torch.Generator().manual_seed(seed)
    ends = []
    with GenericEnvClient(base_url=url).sync() as env:
        for episode in range(episodes):
            start = env.reset(seed=seed + episode).observation
            drawn = sample_responses(
                model.model,
                torch.tensor([start["prompt_ids"]]),
                torch.tensor([len(start["prompt_ids"])]),
                max_new_tokens=start["tokens_left"],
                rule=token_rule(model),
                pad_id=model.pad_id,
                generator=generator,
            )
            length = int(drawn.response_lengths)
            tokens = {"token_ids": drawn.response_ids[0, :length], "logprobs": drawn.logprobs[0, :length]}
            result = env.step({name: values.tolist() for name, values in tokens.items()})
            assert result.done
            ends.append({**result.observation, "reward": result.reward})
    return ends


if __name__ == "__main__":
    for end in play("http://127.0.0.1:8000", "assistant-sft", 5):
        print(f"{end['prompt']} → {end['response']}  reward {end['reward']:.2f}, KL {end['info']['kl']:.2f}")
