"""Exact results for small worlds: every response is enumerated, so nothing is estimated.

A response ends at its first stop token or at the length budget. With a few tokens and steps there are a few thousand,
and each expectation under a policy is a sum over them, in float64. Prompts weigh the same, as the
environment draws them uniformly. With ``r`` the reward without its KL and ``β`` the KL coefficient:

* objective  ``J(π) = mean_x Σ_y π(y|x) (r(x,y) − β (log π(y|x) − log π_ref(y|x)))``
* optimum    ``π*(y|x) ∝ π_ref(y|x) exp(r(x,y)/β)``,  ``J* = mean_x β log Σ_y π_ref(y|x) exp(r(x,y)/β)``
* regret     ``J* − J(π) = β KL(π ‖ π*)``
* frontier   no policy earns more at its KL than ``π_ref exp(r/β')`` of some β' (one β' for all prompts)

Axes: X prompts, Y responses, T steps.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from textenv import registry
from textenv.lm import LanguageModel, Responses, TokenRule, pad_left, pad_right, response_outputs
from textenv.lm.batch import length_mask
from textenv.protocols import RewardModel
from textenv.scoring import Finished, Scorer

MAX_STRINGS = 200_000


class Optimum(NamedTuple):
    """The best possible policy."""

    logprobs: Float[Tensor, "X Y"]
    """log π*(y|x)."""
    objective: float
    """J*."""


class Chosen(NamedTuple):
    """Best-of-n as a distribution over responses."""

    logprobs: Float[Tensor, "X Y"]
    expected_reward: float
    kl: float
    """To the reference, in nats; exact, where ``log n − (n − 1)/n`` is only a bound."""


class Measured(NamedTuple):
    """The exact figures of a policy."""

    objective: float
    """J(π)."""
    expected_reward: float
    """E[r], without the KL."""
    kl: float
    """KL(π ‖ π_ref) of whole responses, in nats, mean over prompts."""
    regret: float
    """J* − J(π) ≥ 0."""
    regret_ratio: float
    """(J* − J(π)) / (J* − J(π_ref)): 1 at the reference, 0 at the optimum."""


def exact_world(env: Any) -> "ExactWorld":
    """Enumerate the task of a :class:`~textenv.env.TextEnv` or :class:`~textenv.vector.TextVectorEnv`, wrapped or not.

    The KL coefficient is the environment's present one.

    Raises:
        ValueError: the world is too large to enumerate (:class:`ExactWorld`).
    """
    env = env.unwrapped
    task, config = env.task, env.task.config
    return ExactWorld(
        task.reference,
        task.prompts.texts,
        registry.reward_model(config.reward_model, config.device),
        kl_coef=env.kl_coef,
        max_new_tokens=config.max_new_tokens,
        rule=task.rule,
        missing_eos_penalty=config.missing_eos_penalty,
        columns=task.prompts.columns,
    )


class ExactWorld:
    """All responses to all prompts, with their rewards and reference log-probabilities."""

    def __init__(
        self,
        reference: LanguageModel,
        prompts: Sequence[str],
        reward_model: RewardModel,
        *,
        kl_coef: float,
        max_new_tokens: int,
        rule: TokenRule,
        missing_eos_penalty: float | None = None,
        columns: dict[str, Any] | None = None,
    ) -> None:
        """``columns``: further fields of the prompts for the reward model, one value per prompt.

        Raises:
            ValueError: there are more than ``MAX_STRINGS`` responses.
        """
        self.reference, self.prompts, self.rule = reference, list(prompts), rule
        self.kl_coef = float(kl_coef)
        strings, trunks = enumerate_responses(reference.vocab_size, max_new_tokens, rule)
        self.response_ids: Int[Tensor, "Y T"]
        self.lengths: Int[Tensor, " Y"]
        self.response_ids, self.lengths = pad_right(strings, reference.pad_id, max_new_tokens)
        self.mask = length_mask(self.lengths, max_new_tokens)
        self.texts = reference.response_texts(strings)

        # Longest unfinished prefixes ("trunks"): one forward pass over them gives every next-token distribution.
        prefixes: dict[tuple[int, ...], int] = {}
        for row, trunk in enumerate(trunks):
            for t in range(max_new_tokens):
                prefixes.setdefault(trunk[:t], row)
        self._trunk_of = torch.tensor([prefixes[y[:-1]] for y in strings])
        prompt_ids, prompt_lengths = pad_left([reference.encode_prompt(p) for p in self.prompts], reference.pad_id)
        self._trunks = _product(prompt_ids, prompt_lengths, trunks)
        # Numbers the prefixes y_<t, the states of the decision process. Padding points to an extra, empty state.
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        self._prefix_of = torch.full(self.response_ids.shape, len(number))
        for row, y in enumerate(strings):
            for t in range(len(y)):
                self._prefix_of[row, t] = number[y[:t]]

        self.rewards: Float[Tensor, "X Y"] = self._rewards(reward_model, missing_eos_penalty, columns or {}, strings)
        self.ref_token_logprobs: Float[Tensor, "X Y T"] = self.token_logprobs(reference.model)
        self.ref_logprobs: Float[Tensor, "X Y"] = self.ref_token_logprobs.sum(2)

    # -- log-probabilities of a model --------------------------------------------------------------------------------

    def token_logprobs(self, model: PreTrainedModel) -> Float[Tensor, "X Y T"]:
        """``log π(y_t | x, y_<t)`` in float64, zeros on padding. Computed on a copy of ``model``."""
        with torch.no_grad():
            return self.differentiable_logprobs(copy.deepcopy(model).cpu().double())

    def sequence_logprobs(self, model: PreTrainedModel) -> Float[Tensor, "X Y"]:
        """``log π(y | x) = Σ_t log π(y_t | x, y_<t)`` in float64."""
        return self.token_logprobs(model).sum(2)

    def differentiable_logprobs(self, model: PreTrainedModel) -> Float[Tensor, "X Y T"]:
        """Like :meth:`token_logprobs`, but with gradient to ``model``'s parameters and in its own precision."""
        logprobs, _ = response_outputs(model, self._trunks.to(model.device), self.rule)
        steps = self.response_ids.shape[1]
        table = logprobs.cpu().view(len(self.prompts), -1, steps, logprobs.shape[-1])
        picked = table[:, self._trunk_of[:, None], torch.arange(steps), self.response_ids]
        return torch.where(self.mask, picked, 0.0)

    # -- a policy, as log π(y|x) -------------------------------------------------------------------------------------

    def objective(self, logprobs: Float[Tensor, "X Y"]) -> Float[Tensor, ""]:
        """``J(π) = mean_x Σ_y π (r − β (log π − log π_ref))``; differentiable."""
        returns = self.rewards - self.kl_coef * (logprobs - self.ref_logprobs)
        return (logprobs.exp() * returns).sum(1).mean()

    def expected_reward(self, logprobs: Float[Tensor, "X Y"]) -> float:
        """``mean_x Σ_y π(y|x) r(x,y)``."""
        return float((logprobs.exp() * self.rewards).sum(1).mean())

    def kl(self, logprobs: Float[Tensor, "X Y"], other: Float[Tensor, "X Y"] | None = None) -> float:
        """``mean_x Σ_y π(y|x) (log π − log π_other)`` in nats; ``other`` is the reference unless given."""
        other = self.ref_logprobs if other is None else other
        # A response that π never gives (log π = −inf) contributes 0 · log 0 = 0.
        terms = torch.where(logprobs > -torch.inf, logprobs.exp() * (logprobs - other), 0.0)
        return float(terms.sum(1).mean())

    def tilted(self, kl_coef: float, rewards: Float[Tensor, "X Y"] | None = None) -> Float[Tensor, "X Y"]:
        """``log π(y|x)`` of ``π ∝ π_ref exp(rewards / kl_coef)``, the best policy for that reward and coefficient."""
        if not kl_coef > 0:
            raise ValueError(f"a tilted policy needs kl_coef > 0, got {kl_coef}. Without KL no one policy is best.")
        return torch.log_softmax(self.ref_logprobs + (self.rewards if rewards is None else rewards) / kl_coef, dim=1)

    def optimum(self) -> Optimum:
        """``π* ∝ π_ref exp(r/β)`` and ``J* = mean_x β log E_ref[exp(r/β)]``."""
        best = self.kl_coef * torch.logsumexp(self.ref_logprobs + self.rewards / self.kl_coef, dim=1).mean()
        return Optimum(self.tilted(self.kl_coef), float(best))

    def regret(self, logprobs: Float[Tensor, "X Y"]) -> float:
        """``J* − J(π)``, which must equal ``β KL(π ‖ π*)``."""
        best = self.optimum()
        gap = best.objective - float(self.objective(logprobs))
        divergence = self.kl_coef * self.kl(logprobs, best.logprobs)
        scale = 1.0 + abs(best.objective) + abs(gap)
        assert abs(gap - divergence) < 1e-9 * scale, f"regret {gap} by objective, {divergence} by divergence"
        return gap

    # -- a model -----------------------------------------------------------------------------------------------------

    def measure(self, model: PreTrainedModel) -> Measured:
        """All figures of a model in one forward pass (a quarter of a second in ``textenv/Micro-v0``)."""
        logprobs = self.sequence_logprobs(model)
        regret = self.regret(logprobs)
        return Measured(
            objective=float(self.objective(logprobs)),
            expected_reward=self.expected_reward(logprobs),
            kl=self.kl(logprobs),
            regret=regret,
            regret_ratio=regret / self.regret(self.ref_logprobs),
        )

    def gradient(self, model: PreTrainedModel) -> Float[Tensor, " D"]:
        """``∇J`` in float64 by autograd through the enumeration, flat, in the order of ``model.parameters()``.

        Tied weights count once. The model's own ``.grad`` does not change.
        """
        double = copy.deepcopy(model).cpu().double()
        parameters = list(double.parameters())
        objective = self.objective(self.differentiable_logprobs(double).sum(2))
        grads = torch.autograd.grad(objective, parameters, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])

    def values(self, token_logprobs: Float[Tensor, "X Y T"], *, per_token_kl: bool) -> Float[Tensor, "X Y T"]:
        """``V^π`` of the state before token t of response y: the expected sum of the rewards from there on.

        With ``KL_k = log π(y_k|·) − log π_ref(y_k|·)``, and zeros on padding:

        * ``per_token_kl``: each token pays its own KL when it is chosen, so only future KL counts,
          ``V(x, y_<t) = E_π[r − β Σ_{k≥t} KL_k | x, y_<t]``;
        * otherwise the last token pays for the whole response, past tokens included,
          ``V(x, y_<t) = E_π[r − β Σ_k KL_k | x, y_<t]``: lower by the KL already spent, ``β Σ_{k<t} KL_k``.
        """
        kl = token_logprobs - self.ref_token_logprobs
        weight = token_logprobs.sum(2).exp()
        returns = self.rewards - self.kl_coef * kl.sum(2)
        shape = (len(self.prompts), int(self._prefix_of.max()) + 1)
        values = torch.zeros_like(kl)
        for t in range(kl.shape[2]):
            state = self._prefix_of[:, t]
            mass = weight.new_zeros(shape).index_add(1, state, weight)
            total = weight.new_zeros(shape).index_add(1, state, weight * returns)
            values[:, :, t] = total[:, state] / mass[:, state]
        if per_token_kl:
            values = values + self.kl_coef * (kl.cumsum(2) - kl)
        return torch.where(self.mask, values, 0.0)

    # -- the best at a given KL --------------------------------------------------------------------------------------

    def frontier_reward_at(self, kl: float) -> float:
        """The highest expected reward of any policy whose KL to the reference is at most ``kl`` nats.

        The tilted policy with exactly that KL, found by bisection of log β'; beyond the KL of always
        choosing the best responses (β' → 0), the highest reward. A negative KL (a noisy estimate) counts as 0.
        """
        spread = float(self.rewards.max() - self.rewards.min()) or 1.0
        low, high = -12.0, 20.0  # β' = e^low · spread is practically 0, e^high · spread practically infinite

        def policy(log_coef: float) -> Float[Tensor, "X Y"]:
            return self.tilted(spread * math.exp(log_coef))

        if self.kl(policy(low)) <= kl:
            return float(self.rewards.max(1).values.mean())
        for _ in range(40):  # to 3e-11 in log β'
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.kl(policy(middle)) > kl else (low, middle)
        return self.expected_reward(policy(high))

    def best_of_n(self, n: int, scores: Float[Tensor, "X Y"] | None = None) -> Chosen:
        """Draw n responses from the reference, keep the one with the highest of ``scores`` (by default the rewards).

        ``q(y) = π_ref(y) / m(s) · (F(s)^n − F(s⁻)^n)`` with ``s`` the score of y, ``m`` the reference's mass of that
        score, ``F(s)`` of scores ≤ s and ``F(s⁻)`` of scores < s. Ties between equal scores
        are broken without looking at the responses (first drawn, or at random: the distribution is the same).
        """
        if n < 1:
            raise ValueError(f"best-of-n needs n ≥ 1, got {n}. Raise it.")
        scores = self.rewards if scores is None else scores
        prompts = zip(self.ref_logprobs, scores, strict=True)
        logprobs = torch.stack([_best_of_n(ref, score, n) for ref, score in prompts])
        return Chosen(logprobs, self.expected_reward(logprobs), self.kl(logprobs))

    def _rewards(
        self, reward_model: RewardModel, penalty: float | None, columns: dict[str, Any], strings: list
    ) -> Float[Tensor, "X Y"]:
        """What the environment pays without the KL: its own scorer with β = 0."""
        scorer = Scorer(
            reference=self.reference, reward_model=reward_model, rule=self.rule, kl_coef=0, missing_eos_penalty=penalty
        )
        stops, ends = self.rule.stop_ids, self.reference.ending_ids
        reasons = ["eos" if y[-1] in ends else "stop" if y[-1] in stops else "length" for y in strings]
        count = len(strings)
        unread = torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, dtype=torch.int64)  # only text is scored
        tokens = Responses(*unread, self.response_ids, self.lengths)
        out = []
        for x, prompt in enumerate(self.prompts):
            fields = {key: [values[x]] * count for key, values in columns.items()} | {"finish_reason": reasons}
            out.append(scorer.score(Finished(tokens, [prompt] * count, self.texts, fields, None)).rewards)
        return torch.stack([torch.from_numpy(row) for row in out])


def enumerate_responses(
    vocabulary: int, max_new_tokens: int, rule: TokenRule
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Every response that ``rule`` allows, and every unfinished prefix of ``max_new_tokens − 1`` tokens.

    Raises:
        ValueError: there are more than ``MAX_STRINGS`` responses.
    """
    finished: list[tuple[int, ...]] = []
    trunks: list[tuple[int, ...]] = [()]
    for step in range(max_new_tokens):
        tokens = [a for a in range(vocabulary) if a not in rule.stop_ids or step >= rule.min_new_tokens]
        if len(finished) + len(trunks) * len(tokens) > MAX_STRINGS:
            raise ValueError(
                f"an exact world must have at most {MAX_STRINGS} responses, got vocabulary "
                f"{vocabulary} and max_new_tokens {max_new_tokens}. Take a smaller vocabulary or budget."
            )
        grown = [(*prefix, token) for prefix in trunks for token in tokens]
        last = step + 1 == max_new_tokens
        finished += [y for y in grown if last or y[-1] in rule.stop_ids]
        if not last:
            trunks = [y for y in grown if y[-1] not in rule.stop_ids]
    return finished, trunks


def _product(prompt_ids: Tensor, prompt_lengths: Tensor, trunks: list[tuple[int, ...]]) -> Responses:
    """Every prompt with every trunk, and one more arbitrary token, which is predicted but never read."""
    ids, lengths = pad_right([(*trunk, 0) for trunk in trunks], 0)
    count = len(prompt_ids)
    return Responses(
        prompt_ids.repeat_interleave(len(ids), 0),
        prompt_lengths.repeat_interleave(len(ids)),
        ids.repeat(count, 1),
        lengths.repeat(count),
    )


def _best_of_n(ref: Float[Tensor, " Y"], scores: Float[Tensor, " Y"], n: int) -> Float[Tensor, " Y"]:
    """Log-probabilities of best-of-n for one prompt."""
    levels, level = torch.unique(scores, sorted=True, return_inverse=True)
    mass = ref.new_zeros(len(levels)).index_add(0, level, ref.exp())
    below = mass.cumsum(0)  # F(s)
    # F(s)^n − F(s⁻)^n = F(s)^n (1 − (1 − m/F)^n), in a form that keeps the digits of a tiny m.
    share = (mass / below).clamp(max=1.0)
    gain = n * below.log() + torch.log(-torch.expm1(n * torch.log1p(-share)))
    return ref + (gain - mass.log())[level]
