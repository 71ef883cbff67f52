"""Text generation as a Gymnasium environment: one token per step."""

from typing import Any

import gymnasium
import numpy as np

from textenv.episode import Episodes, whole_numbers
from textenv.task import ScoredByTask
from textenv.vector import entry, unbatch


class TextEnv(ScoredByTask, gymnasium.Env):
    """Write a response to a prompt, token by token.

    **State**: a prompt and the response so far. **Action** ``Discrete(V)``: the next token, where V is the number of
    rows of the reference's LM head; ``action_masks()`` says which are allowed.

    **Observation** (``obs_mode="dict"``): ``input_ids (P+T,)`` with the prompt left-padded in the first P columns and
    the response from column P; ``attention_mask (P+T,)``; ``prompt_length (1,)``; ``response_length (1,)``.
    ``obs_mode="tokens"``: one ``Box`` of ids ``(P+T,)`` with −1 on padding.

    **Reward**: 0 until the last token, then the sum of ``info["reward_terms"]``: the reward model's score of the text,
    ``−kl_coef · KL(policy ‖ reference)`` (k1, summed over the response), and any declared penalty. The agent passes its
    log-probabilities to ``report_logprobs``, or the environment computes them after ``attach_policy``.

    **End**: ``terminated`` on EOS, a stop token, or the length budget (``info["finish_reason"]``). Never truncated: the
    budget is part of the task, and the observation shows how much of it is left.

    Keyword arguments are those of :class:`textenv.config.TaskConfig`, plus ``render_mode`` (None or "ansi").
    """

    def __init__(self, *, render_mode: str | None = None, **options: Any) -> None:
        self._set_up(render_mode, options)
        self.observation_space = self.task.observation_space
        self.action_space = self.task.action_space
        self._episodes = Episodes(1, self.task)
        self._ending = ""

    def report_logprobs(self, logprobs: Any) -> None:
        """Report the policy's log-probability of the action that the next ``step`` takes."""
        self._episodes.report(np.asarray(logprobs, dtype=np.float32).reshape(1))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode. ``options``: ``{"prompt": text}`` or ``{"prompt_id": int}``; else a prompt is drawn."""
        super().reset(seed=seed)
        info = self._episodes.begin(0, self.np_random, options)
        self._ending = ""
        return self._observation(), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        ended = self._episodes.append(np.ones(1, dtype=bool), whole_numbers("an action", action).reshape(1))
        if not ended[0]:
            return self._observation(), 0.0, False, False, {}
        outcome = self.task.outcome(self._episodes.finished(np.zeros(1, dtype=np.int64)))
        info = entry(outcome.infos, 0)
        reward = float(outcome.rewards[0])
        self._ending = f" [{info['finish_reason']}] reward {reward:.3f}"
        return self._observation(), reward, True, False, info

    def action_masks(self) -> np.ndarray:
        """Bool ``(V,)``: True where an action is allowed now."""
        return self._episodes.action_masks()[0]

    def render(self) -> str | None:  # type: ignore[override]
        return None if self.render_mode is None else self._episodes.text(0) + self._ending

    def _observation(self) -> Any:
        return unbatch(self._episodes.observe(), 1)[0]
