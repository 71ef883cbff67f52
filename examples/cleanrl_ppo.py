"""PPO of a language model in one file, in the style of CleanRL, without any of ``agents``.

It differs from PPO on any other environment in three places: the policy reads tokens (−1 is padding) and answers at the
last real one; ``report_logprobs`` tells the environment the log-probability of each action, so that the reward contains
the KL to the reference; and the discount is 1, since only the last token is paid.

Command: ``python examples/cleanrl_ppo.py`` (half a minute on one core; prints the regret ratio on the exact world,
1 at the reference and 0 at the optimum).
"""

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical

import textenv
from textenv.tasks.exact import exact_world


@dataclass(frozen=True, kw_only=True)
class Args:
    seed: int = 0
    num_envs: int = 256
    """Episodes side by side."""
    num_steps: int = 8
    """Tokens per slot in each rollout."""
    updates: int = 30
    """Number of rollouts."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatch_size: int = 512
    """Tokens in one optimiser step."""
    learning_rate: float = 1.5e-3
    """Learning rate of Adam; falls linearly to 0."""
    gae_lambda: float = 0.95
    """λ of the advantage estimate (GAE)."""
    clip_coef: float = 0.2
    """How far a ratio may move from 1 before its gradient stops."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this one."""


class Agent(nn.Module):
    """A causal language model with a value head. The task draws at temperature 1 and masks no token."""

    def __init__(self, reference: str) -> None:
        super().__init__()
        language_model = textenv.fresh_language_model(reference)
        self.model = language_model.model
        self.critic = nn.Linear(language_model.hidden_size, 1)
        nn.init.zeros_(self.critic.weight)

    def forward(self, tokens: Tensor) -> tuple[Categorical, Tensor]:
        real = tokens >= 0
        positions = (real.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=tokens.clamp(min=0), attention_mask=real.long(), position_ids=positions, output_hidden_states=True
        )
        rows, last = torch.arange(len(tokens)), (real * torch.arange(tokens.shape[1])).argmax(1)
        return Categorical(logits=out.logits[rows, last]), self.critic(out.hidden_states[-1][rows, last])[:, 0]


def train(args: Args) -> float:
    """Train on ``textenv/Micro-v0``; returns the regret ratio."""
    torch.manual_seed(args.seed)
    envs: Any = gym.make_vec("textenv/Micro-v0", num_envs=args.num_envs, obs_mode="tokens")
    agent = Agent(envs.unwrapped.task.config.reference)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    observation, _ = envs.reset(seed=args.seed)
    next_obs, next_done = torch.from_numpy(observation), torch.zeros(args.num_envs)
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, next_obs.shape[1], dtype=torch.int64)
    actions = torch.zeros(shape, dtype=torch.int64)
    logprobs, rewards, dones, values, advantages = (torch.zeros(shape) for _ in range(5))
    start = time.perf_counter()

    for update in range(args.updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - update / args.updates)
        scores, kls = [], []
        for step in range(args.num_steps):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                distribution, values[step] = agent(next_obs)
            actions[step] = distribution.sample()
            logprobs[step] = distribution.log_prob(actions[step])
            envs.unwrapped.report_logprobs(logprobs[step].numpy())
            observation, reward, terminated, _, infos = envs.step(actions[step].numpy())
            rewards[step] = torch.from_numpy(reward)
            next_obs, next_done = torch.from_numpy(observation), torch.from_numpy(terminated).float()
            if "final_info" in infos:
                scores.extend(infos["final_info"]["rm_score"][terminated])
                kls.extend(infos["final_info"]["kl"][terminated])

        with torch.no_grad():
            next_value = agent(next_obs)[1]
        running = torch.zeros(args.num_envs)
        for step in reversed(range(args.num_steps)):
            following_done = next_done if step == args.num_steps - 1 else dones[step + 1]
            following_value = next_value if step == args.num_steps - 1 else values[step + 1]
            delta = rewards[step] + (1.0 - following_done) * following_value - values[step]
            running = advantages[step] = delta + args.gae_lambda * (1.0 - following_done) * running
        returns = advantages + values

        flat = [x.flatten(0, 1) for x in (obs, actions, logprobs, advantages, returns)]
        for _ in range(args.epochs):
            for index in torch.randperm(len(flat[0])).split(args.minibatch_size):
                mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns = (x[index] for x in flat)
                distribution, new_values = agent(mb_obs)
                ratio = (distribution.log_prob(mb_actions) - mb_logprobs).exp()
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
                policy_loss = -torch.min(ratio * mb_advantages, clipped * mb_advantages).mean()
                loss = policy_loss + args.vf_coef * (new_values - mb_returns).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        if update % 5 == 4:
            mean_score, mean_kl = sum(scores) / len(scores), sum(kls) / len(kls)
            print(f"update {update + 1}: score {mean_score:.3f}, KL {mean_kl:.3f}, {time.perf_counter() - start:.0f} s")
    envs.close()
    return exact_world(envs).measure(agent.model).regret_ratio


if __name__ == "__main__":
    print(f"regret ratio: {train(tyro.cli(Args)):.3f}")
