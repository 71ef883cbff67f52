"""RLlib's PPO trains a language model on the exact world.

``attach_policy`` lets each environment compute the policy's log-probabilities, so that the reward contains the KL to
the reference although RLlib passes on nothing but actions.

Command: ``python examples/rllib_ppo.py`` (``pip install 'ray[rllib]==2.60.0'``; a minute; prints the regret ratio, 1 at
the reference and 0 at the optimum).
"""

from typing import Any

import gymnasium
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.tune.registry import register_env
from torch import Tensor, nn

import textenv
from textenv.tasks.exact import exact_world
from textenv.vector import make_vec

ENV_ID = "textenv/Micro-v0"


class CausalLM(TorchRLModule, ValueFunctionAPI):
    """A causal language model with a value head. The task draws at temperature 1 and masks no token."""

    def setup(self) -> None:
        language_model = textenv.fresh_language_model("micro-reference")
        self.model = language_model.model
        self.critic = nn.Linear(language_model.hidden_size, 1)
        nn.init.zeros_(self.critic.weight)

    def _hidden(self, batch: dict[str, Any]) -> Tensor:
        """The hidden state at the last token of each row; −1 is padding."""
        tokens = batch[Columns.OBS].long()
        real = tokens >= 0
        context = {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        hidden = self.model.base_model(tokens.clamp(min=0), **context).last_hidden_state
        last = (real * torch.arange(tokens.shape[1])).argmax(1)
        return hidden[torch.arange(len(tokens)), last]

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        hidden = self._hidden(batch)
        return {Columns.ACTION_DIST_INPUTS: self.model.lm_head(hidden), Columns.EMBEDDINGS: hidden}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        hidden = self._hidden(batch) if embeddings is None else embeddings
        return self.critic(hidden.detach()).squeeze(1)


def regret_ratio(updates: int, seed: int = 0) -> float:
    """The exact regret of the policy after so many updates of 1024 tokens, 1 at the reference."""
    register_env("textenv", lambda config: gymnasium.make(ENV_ID, obs_mode="tokens", kl_source="policy"))
    config = (
        PPOConfig()
        .environment("textenv")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=32)
        .learners(num_learners=0)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=CausalLM))
        .training(
            train_batch_size_per_learner=1024,
            minibatch_size=256,
            num_epochs=4,
            lr=1e-3,
            gamma=1.0,
            lambda_=1.0,
            use_kl_loss=False,
            vf_loss_coeff=0.1,
        )
        .debugging(seed=seed)
    )
    algorithm = config.build_algo()
    runner = algorithm.env_runner  # it draws with a module of its own, whose weights follow those of the learner
    for env in runner.env.unwrapped.envs:
        env.unwrapped.attach_policy(runner.module.model)
    for _ in range(updates):
        algorithm.train()
    module = algorithm.get_module()
    measured = exact_world(make_vec(ENV_ID)).measure(module.model)
    algorithm.stop()
    return measured.regret_ratio


if __name__ == "__main__":
    print(f"regret ratio {regret_ratio(20):.3f}")
