"""Best-of-n: draw n responses a prompt, keep the one that the reward model likes best.

The chosen response follows no policy that was trained. Its KL to the policy it was drawn from is at most
``log n − (n − 1)/n`` nats, and equals that only when no two responses to a prompt tie; so it is reported as a bound.

References: Stiennon et al. 2020; on the bound, Beirami et al. 2024.
"""

from typing import Any, final

import numpy as np
import torch

from agents.core.actor import check_vocabulary, observation_tokens, respond
from textenv import registry
from textenv.episode import Episodes, Task
from textenv.evaluation import Evaluation
from textenv.lm import LanguageModel, Responses, Sampled
from textenv.scoring import call_reward_model


@final
class BestOfN:
    """An agent that draws n responses of a model and gives the one that the task's reward model likes best."""

    knows_logprobs = False
    """The log-probability of a chosen response is not that of drawing it, so none is reported and no KL is known."""

    def __init__(self, task: Task, model: LanguageModel, n: int, *, seed: int = 0) -> None:
        if n < 1:
            raise ValueError(f"best-of-n needs n ≥ 1, with n (={n}).")
        check_vocabulary(model, task)
        self.task, self.model, self.n = task, model, n
        self.generator = torch.Generator().manual_seed(seed)
        self._reward_model = registry.reward_model(task.config.reward_model, task.config.device)
        self._index = prompt_index(task)

    def respond(self, observation: Any, deterministic: bool = False) -> Sampled:
        """The best of n responses to each fresh observation (the first on ties)."""
        batch = observation_tokens(observation, self.task)
        count = len(batch.prompt_ids)
        drawn = Responses(*(field.repeat_interleave(self.n, dim=0) for field in batch))
        sampled = respond(self.model.model, drawn, self.task, generator=self.generator, greedy=deterministic)
        best = self._scores(drawn, sampled).reshape(count, self.n).argmax(1)
        rows = torch.arange(count) * self.n + torch.from_numpy(best)
        return Sampled(*(field[rows] for field in sampled))

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """The next token of each observation, from the response chosen at its first token.

        The chosen responses travel in ``state``, as a recurrent policy's memory does: pass back what the last call
        returned.

        Raises:
            ValueError: an episode is under way and ``state`` does not hold its response.
        """
        flat = observation["input_ids"] if isinstance(observation, dict) else observation
        single = np.ndim(flat) == 1
        if single:
            is_dict = isinstance(observation, dict)
            observation = {k: v[None] for k, v in observation.items()} if is_dict else observation[None]
        steps = observation_tokens(observation, self.task).response_lengths.numpy()
        new = np.flatnonzero(steps == 0)
        if state is None and len(new) < len(steps):
            raise ValueError(
                "best-of-n chooses a whole response at the first token, so predict needs the state of the call before, "
                "got state None in the middle of a response. Pass state=state, or start with fresh observations."
            )
        plan = (
            np.zeros((len(steps), self.task.config.max_new_tokens), dtype=np.int64) if state is None else state.copy()
        )
        if len(new):
            fresh = {k: v[new] for k, v in observation.items()} if isinstance(observation, dict) else observation[new]
            chosen = self.respond(fresh, deterministic).response_ids.numpy()
            plan[new, : chosen.shape[1]] = chosen
        tokens = plan[np.arange(len(steps)), steps]
        return (tokens[0] if single else tokens), plan

    def _scores(self, batch: Responses, sampled: Sampled) -> np.ndarray:
        episodes = Episodes(len(batch.prompt_ids), self.task)
        rng = np.random.default_rng(0)  # draws nothing: every prompt is named
        for slot, (row, length) in enumerate(zip(batch.prompt_ids.tolist(), batch.prompt_lengths.tolist())):
            ids = tuple(row[len(row) - length :])
            if ids not in self._index:
                raise ValueError(
                    "best-of-n scores prompts of the environment's prompt set, with prompt "
                    f"(={self.task.reference.decode(list(ids))!r}). Add it to prompts."
                )
            episodes.begin(slot, rng, {"prompt_id": self._index[ids]})
        episodes.fill(sampled.response_ids.numpy(), sampled.response_lengths.numpy(), None)
        return call_reward_model(self._reward_model, episodes.finished(np.arange(len(batch.prompt_ids))))


def prompt_index(task: Task) -> dict[tuple[int, ...], int]:
    """Number of the prompt that tokens stand for: an observation is all that an agent knows of it.

    Raises:
        ValueError: two prompts share their tokens and differ in text or columns: a score could be the other's.
    """
    prompts = task.prompts
    index: dict[tuple[int, ...], int] = {}
    for number, ids in enumerate(prompts.ids):
        first = index.setdefault(tuple(ids), number)
        kinds = (prompts.texts, *prompts.columns.values())
        if any(values[first] != values[number] for values in kinds):
            raise ValueError(
                f"best-of-n must tell prompts apart by their tokens, with prompts {first} and {number} "
                f"(={prompts.texts[first]!r}, {prompts.texts[number]!r}) alike. Drop one of them."
            )
    return index


def best_of_n(samples: list[Evaluation]) -> Evaluation:
    """Of n evaluations of the same prompts, each prompt's response with the highest ``rm_score`` (first on ties)."""
    if not samples or any((s.prompt_ids != samples[0].prompt_ids).any() for s in samples):
        raise ValueError(f"best_of_n needs n ≥ 1 evaluations of the same prompts, with n (={len(samples)}).")
    best = np.argmax([s.rm_scores for s in samples], axis=0)
    rows = np.arange(len(best))

    def pick(name: str) -> np.ndarray:
        return np.asarray([getattr(s, name) for s in samples])[best, rows]

    return samples[0]._replace(
        responses=list(pick("responses")),
        rewards=pick("rewards"),
        rm_scores=pick("rm_scores"),
        kl=None,
        gold=None if samples[0].gold is None else pick("gold"),
        lengths=pick("lengths"),
        finish_reasons=list(pick("finish_reasons")),
    )
