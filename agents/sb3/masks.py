"""Action masks for sb3-contrib's ``MaskablePPO`` (``pip install 'textenv[sb3]'``).

:class:`agents.sb3.CausalLMPolicy` already draws from the allowed tokens only, so plain PPO needs no masks. The classes
here are for masks of your own and for stock maskable policies::

    MaskablePPO(MaskableCausalLMPolicy, env, rollout_buffer_class=SharedMasksDict)

The stock buffers keep a float32 for every token of every step, ``4 · n_steps · n_envs · V`` bytes, and copy them:
820 MB per copy for 32 steps of 64 environments with 100,000 tokens. The buffers here keep each distinct mask once.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from jaxtyping import Int
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable import buffers
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import BaseBuffer, DictRolloutBuffer, RolloutBuffer

from agents.sb3.policy import CausalLMPolicy
from agents.sb3.training import SB3Algorithm


class MaskableCausalLMPolicy(CausalLMPolicy, MaskableActorCriticPolicy):  # type: ignore[override]
    """A causal language model for ``MaskablePPO``: the given masks apply on top of the environment's own rule.

    The reported log-probabilities are those of the masked distribution, so the KL is that of the acting policy.
    """


class _Shared(BaseBuffer):
    """Stores each distinct mask once, as bits, and its index for each step."""

    without_masks: Any
    """The buffer that does the rest."""
    samples: Any
    """What it returns, with masks."""
    action_masks: Int[np.ndarray, "S N 1"]

    def reset(self) -> None:
        assert isinstance(self.action_space, spaces.Discrete)
        self.mask_dims = int(self.action_space.n)
        everything = np.packbits(np.ones(self.mask_dims, dtype=bool))
        self.masks: dict[bytes, int] = {everything.tobytes(): 0}
        self.action_masks = np.zeros((self.buffer_size, self.n_envs, 1), dtype=np.int32)
        self.without_masks.reset(self)

    def add(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> None:
        if action_masks is not None:
            bits = np.packbits(np.asarray(action_masks, dtype=bool).reshape(self.n_envs, self.mask_dims), axis=1)
            self.action_masks[self.pos, :, 0] = [self.masks.setdefault(row.tobytes(), len(self.masks)) for row in bits]
        self.without_masks.add(self, *args, **kwargs)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        rows = np.frombuffer(b"".join(self.masks), dtype=np.uint8).reshape(len(self.masks), -1)
        table = np.unpackbits(rows, axis=1, count=self.mask_dims)
        masks = self.to_torch(table[self.action_masks[batch_inds, 0]])
        return self.samples(*self.without_masks._get_samples(self, batch_inds, env), action_masks=masks)


class SharedMasks(_Shared, buffers.MaskableRolloutBuffer):
    """``rollout_buffer_class`` of ``MaskablePPO`` for ``obs_mode="tokens"``."""

    without_masks, samples = RolloutBuffer, buffers.MaskableRolloutBufferSamples


class SharedMasksDict(_Shared, buffers.MaskableDictRolloutBuffer):
    """``rollout_buffer_class`` of ``MaskablePPO`` for ``obs_mode="dict"``."""

    without_masks, samples = DictRolloutBuffer, buffers.MaskableDictRolloutBufferSamples


class SB3MaskablePPO(SB3Algorithm):
    kind = MaskablePPO
    policy = MaskableCausalLMPolicy
    settings: ClassVar[Mapping[str, Any]] = {"rollout_buffer_class": SharedMasksDict}
