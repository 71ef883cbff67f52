"""Best-of-n: draw n responses to each prompt and keep the one that the reward model scores highest.

No policy is trained. The KL between the chosen responses and the policy that they are drawn from is at most
``log n − (n − 1)/n`` nats, with equality only if no two responses to a prompt tie; so it is reported as a bound.

References: Stiennon et al. 2020; on the bound, Beirami et al. 2024.
"""

from collections.abc import Mapping
from typing import Annotated, Any, final

import numpy as np
import torch

from agents.core.agent import LanguageModelAgent
from agents.core.job import Algorithm, Job, Trained
from textenv import registry
from textenv.episode import Episodes, as_batch, observation_tokens
from textenv.evaluation import Evaluation
from textenv.lm import LanguageModel, Responses, Sampled
from textenv.scoring import call_reward_model
from textenv.settings import PositiveInt, check_value
from textenv.task import Task
from textenv.vector import make_vec


@final
class BestOfN(LanguageModelAgent, Algorithm):
    """Draws n responses from a policy and returns the one that the task's reward model scores highest."""

    knows_logprobs = False
    """Being chosen is likelier than being drawn, so no log-probability is reported and no KL is known."""

    def __init__(self, task: Task, policy: LanguageModel, n: int, *, seed: int = 0) -> None:
        self.check({"n": n})
        super().__init__(policy, task, seed=seed)
        self.n = n
        self._reward_model = registry.reward_model(task.config.reward_model, *task.config.loading)
        self._index = prompt_index(task)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return ("n",)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        check_value("n", options.get("n", 4), Annotated[PositiveInt, "1 is the policy itself."])

    @classmethod
    def train(cls, job: Job) -> Trained:
        task = make_vec(job.env_id, 1, **(job.evaluation or {})).task  # it learns nothing from other prompts
        policy = registry.fresh_language_model(task.config.reference, *task.config.loading)
        return Trained(cls(task, policy, job.options.get("n", 4), seed=job.seed), None, [], 0)

    def respond(self, observation: Any, deterministic: bool = False) -> Sampled:
        """The best of n responses to each fresh observation (the first on ties)."""
        batch = observation_tokens(observation, self.task.prompt_width)
        count = len(batch.prompt_ids)
        drawn = Responses(*(field.repeat_interleave(self.n, dim=0) for field in batch))
        sampled = self.task.respond(self.policy.model, drawn, generator=self.generator, greedy=deterministic)
        best = self._scores(drawn, sampled).reshape(count, self.n).argmax(1)
        rows = torch.arange(count) * self.n + torch.from_numpy(best)
        return Sampled(*(field[rows] for field in sampled))

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """The next token of each observation, from the response chosen at its first token.

        The chosen responses travel in ``state``, like a recurrent policy's memory: pass back what was returned last.

        Raises:
            ValueError: an episode has begun and ``state`` does not hold its response.
        """
        observation, single = as_batch(observation)
        steps = observation_tokens(observation, self.task.prompt_width).response_lengths.numpy()
        new = np.flatnonzero(steps == 0)
        if state is None and len(new) < len(steps):
            raise ValueError(
                "state must be what the previous call of predict returned, since best-of-n chooses a whole response at "
                "its first token, got None in the middle of a response. Pass state=state, or start a new episode."
            )
        empty = np.zeros((len(steps), self.task.config.max_new_tokens), dtype=np.int64)
        plan = empty if state is None else state.copy()
        if len(new):
            fresh = {k: v[new] for k, v in observation.items()} if isinstance(observation, dict) else observation[new]
            chosen = self.respond(fresh, deterministic).response_ids.numpy()
            plan[new, : chosen.shape[1]] = chosen
        tokens = plan[np.arange(len(steps)), steps]
        return (tokens[0] if single else tokens), plan

    def _scores(self, batch: Responses, sampled: Sampled) -> np.ndarray:
        episodes = Episodes(len(batch.prompt_ids), self.task)
        rng = np.random.default_rng(0)  # unused, since every prompt is named
        for slot, (row, length) in enumerate(zip(batch.prompt_ids.tolist(), batch.prompt_lengths.tolist())):
            ids = tuple(row[len(row) - length :])
            if ids not in self._index:
                rule = "best-of-n needs prompts of the environment's prompt set"
                raise ValueError(f"{rule}, got {self.task.reference.decode(list(ids))!r}. Add it to prompts.")
            episodes.begin(slot, rng, {"prompt_id": self._index[ids]})
        episodes.fill(sampled.response_ids.numpy(), sampled.response_lengths.numpy(), None)
        return call_reward_model(self._reward_model, episodes.finished(np.arange(len(batch.prompt_ids))))


def prompt_index(task: Task) -> dict[tuple[int, ...], int]:
    """Prompt tokens → index of the prompt: an agent knows its prompt only from the observation.

    Raises:
        ValueError: two prompts with the same tokens differ in text or columns, so their scores may differ.
    """
    prompts = task.prompts
    index: dict[tuple[int, ...], int] = {}
    for number, ids in enumerate(prompts.ids):
        first = index.setdefault(tuple(ids), number)
        kinds = (prompts.texts, *prompts.columns.values())
        if any(values[first] != values[number] for values in kinds):
            raise ValueError(
                f"prompts must differ in their tokens for best-of-n, got {prompts.texts[first]!r} and "
                f"{prompts.texts[number]!r} (prompts {first} and {number}). Drop one of them."
            )
    return index


def best_responses(samples: list[Evaluation]) -> Evaluation:
    """Each prompt's response with the highest ``rm_score`` among n evaluations of the same prompts (first on ties)."""
    assert samples
    assert all((sample.prompt_ids == samples[0].prompt_ids).all() for sample in samples)
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
        response_ids=pick("response_ids"),
        kl_per_token=None,
    )
