"""A language model rolled out through TorchRL.

``attach_policy`` lets the environment compute the policy's log-probabilities, so that the reward contains the KL to the
reference although TorchRL passes on nothing but actions. (The policy here is a copy of the reference, whose KL is 0.)

Command: ``python examples/torchrl_env.py`` (``pip install torchrl``; seconds).
"""

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs import GymEnv
from transformers import PreTrainedModel

import textenv
from textenv.stats import mean_ci95


def token_policy(model: PreTrainedModel) -> TensorDictModule:
    """Draws the next token of one observation. The task draws at temperature 1 and masks no token."""

    def draw(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = input_ids[attention_mask.bool()][None]
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1]
        return torch.distributions.Categorical(logits=logits).sample()

    return TensorDictModule(draw, in_keys=["input_ids", "attention_mask"], out_keys=["action"])


def episode_rewards(tokens: int, seed: int = 0) -> Tensor:
    """Rewards of the episodes that end within ``tokens`` steps."""
    torch.manual_seed(seed)
    env = GymEnv("textenv/Micro-v0", categorical_action_encoding=True)
    model = textenv.fresh_language_model(env.unwrapped.task.config.reference).model
    env.unwrapped.attach_policy(model)
    env.set_seed(seed)
    with torch.no_grad():
        rollout = env.rollout(tokens, token_policy(model), break_when_any_done=False)
    assert not rollout["next", "truncated"].any()
    return rollout["next", "reward"][rollout["next", "terminated"]]


if __name__ == "__main__":
    rewards = episode_rewards(1000)
    mean, ci95 = mean_ci95(rewards)
    print(f"{len(rewards)} episodes, mean reward {mean:.3f} ± {ci95:.3f}")
