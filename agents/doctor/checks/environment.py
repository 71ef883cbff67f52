"""The environment: what it pays, and whether there is something to learn in it."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from agents.core.agent import LanguageModelAgent
from agents.doctor.checks.model import drawn_otherwise
from agents.doctor.checks.texts import control_words
from agents.doctor.data import LEAKAGE_REMEDY, LEAKAGE_WHY, leaked
from agents.doctor.finding import Check, Seen
from agents.doctor.iteration import Learned, one_iteration
from agents.doctor.parts import ModelPart, Text
from reward_models.benchmark.layout import Inputs
from textenv import conformance, registry
from textenv.conformance.subject import Skipped, Subject
from textenv.episode import observation_tokens
from textenv.lm import Responses, response_logprobs
from textenv.scoring import score_texts
from textenv.stats import wilson, within_prompt_sd
from textenv.vector import TextVectorEnv, make_vec

PROMPTS, EACH = 16, 4
"""Prompts that the reference answers, and answers to each."""
CONTRACT = ("endings", "rewards", "KL", "play")
RAISED = 0.1
"""Nats by which each token's log-probability is reported too high."""
RARE = 0.1
"""Share of responses that end, up to which it is a warning."""
WEAK, STRONG = 0.05, 50.0
"""Nats of KL at the optimum, within which β lets a policy learn and still holds it."""


class Played(NamedTuple):
    """Episodes of the reference."""

    tokens: Responses
    logprobs: Float[np.ndarray, "B T"]
    prompt_ids: Int[np.ndarray, " B"]
    info: Mapping[str, Any]
    """Of the last step, column by column."""


class EnvironmentPart:
    """An environment id with its options."""

    def __init__(self, env_id: str, options: Mapping[str, Any], held_out: list[Any] | None = None) -> None:
        self.env_id, self.options, self.held_out = env_id, dict(options), held_out

    @functools.cached_property
    def vector(self) -> TextVectorEnv:
        vector = make_vec(self.env_id, PROMPTS * EACH, **self.options)
        if vector.task.config.kl_source == "policy":
            vector.attach_policy(vector.reference.model)
        return vector

    @functools.cached_property
    def reference(self) -> ModelPart:
        return ModelPart(self.vector.task.reference)

    @functools.cached_property
    def played(self) -> Played:
        """The reference's own answers, sampled as a policy's are, and what the environment paid for them."""
        self.reference.need_finite()
        task = self.vector.task
        count = len(task.prompts.ids)
        some = np.random.default_rng(0).permutation(count)[:PROMPTS]
        ids = np.repeat(np.resize(some, PROMPTS), EACH)
        observation, _ = self.vector.reset(seed=0, options={"prompt_id": ids})
        sampled = LanguageModelAgent(task.reference, task).respond(observation)
        *_, infos = self.vector.play(sampled.response_ids, sampled.response_lengths, sampled.logprobs)
        prompts = observation_tokens(observation, task.prompt_width)
        tokens = prompts._replace(response_ids=sampled.response_ids, response_lengths=sampled.response_lengths)
        return Played(tokens, sampled.logprobs.numpy(), ids, infos["final_info"])

    @functools.cached_property
    def learned(self) -> Learned:
        """One small iteration of PPO with a single step."""
        self.reference.need_finite()
        if self.vector.task.config.kl_source == "policy":
            raise Skipped("with kl_source='policy' the policy is attached by its owner")
        return one_iteration(self.env_id, self.options, self.vector.task.reference.model)

    def paid(self, logprobs: Float[np.ndarray, "B T"]) -> tuple[Float[np.ndarray, " B"], Mapping[str, Any]]:
        """Rewards and last info of the same episodes, with other log-probabilities reported."""
        tokens = self.played.tokens
        self.vector.reset(options={"prompt_id": self.played.prompt_ids})
        _, rewards, _, _, infos = self.vector.play(tokens.response_ids, tokens.response_lengths, logprobs)
        return rewards, infos["final_info"]

    @property
    def inputs(self) -> Inputs:
        """These episodes as a reward model gets them."""
        info, prompts = self.played.info, self.vector.task.prompts
        columns = {key: [values[i] for i in self.played.prompt_ids] for key, values in prompts.columns.items()}
        columns["finish_reason"] = list(info["finish_reason"])
        chats = [prompts.prompts[i] for i in self.played.prompt_ids]
        if not all(isinstance(chat, str) for chat in chats):
            columns["chat"] = [None if isinstance(chat, str) else chat for chat in chats]
        return Inputs(list(info["prompt"]), list(info["response"]), columns)

    @property
    def texts(self) -> list[Text]:
        prompts = self.vector.task.prompts.prompts
        responses = self.played.info["response"]
        return [Text(prompts[i], response) for i, response in zip(self.played.prompt_ids, responses, strict=True)]


def contract(part: EnvironmentPart) -> Iterator[Seen]:
    """Episodes end, pay and play as the contract says: a reward on the last token alone, step equals play."""
    part.reference.need_finite()
    subject = Subject(part.env_id, part.options)
    for name in CONTRACT:
        try:
            conformance.CHECKS[name](subject)
        except AssertionError as difference:
            yield Seen("error", f"{name}: {difference}")


def reward(part: EnvironmentPart) -> Iterator[Seen]:
    """A reward is the score minus β · KL, both computed again from the text and the tokens."""
    played, task = part.played, part.vector.task
    source = played.info["kl_source"][0]
    if source == "reference":
        raise Skipped("with kl_source='reference' the agent brings its own entropy")
    # The reference's own KL is 0 and would hide a wrong sign: its log-probabilities are reported too high.
    raised = np.where(played.tokens.response_mask.numpy(), played.logprobs + RAISED * (source == "reported"), 0.0)
    rewards, info = part.paid(np.minimum(raised, 0.0))
    model = registry.reward_model(task.config.reward_model, *task.config.loading)
    ref = response_logprobs(task.reference.model, played.tokens, task.rule).double().numpy()
    kl = np.minimum(raised, 0.0).sum(1) - ref.sum(1)
    owed = score_texts(model, *part.inputs) - part.vector.kl_coef * kl + info["reward_terms"].get("missing_eos", 0.0)
    wrong = np.abs(rewards - owed) > 1e-3 * np.maximum(1.0, np.abs(owed))
    if wrong.any():
        row = int(np.argmax(np.abs(rewards - owed)))
        yield Seen("error", f"{wrong.sum()} of {len(owed)} differ: one pays {rewards[row]:.4f} for {owed[row]:.4f}")


def reference_kl(part: EnvironmentPart) -> Iterator[Seen]:
    """The KL of the reference with itself is 0."""
    info = part.played.info
    if "kl" not in info:
        raise Skipped("the environment knows no KL")
    worst = float(np.abs(info["kl"]).max())
    tolerance = 1e-2 if part.vector.task.config.dtype == "float32" else 1.0
    if not worst <= tolerance:
        yield Seen("error", f"it is up to {worst:.3g} nats, {float(np.mean(info['kl'])):.3g} on average")


def sampler(part: EnvironmentPart) -> Iterator[Seen]:
    """Responses follow the distribution that scores them, at the environment's temperature and minimum, by χ²."""
    yield from drawn_otherwise(part.vector.task.reference, part.played.tokens, part.vector.task.rule)


def first_update(part: EnvironmentPart) -> Iterator[Seen]:
    """In a learner's first update every ratio is 1 before its step."""
    worst, tolerance = part.learned.log["first_ratio_deviation"], part.reference.tolerance
    if not worst <= tolerance:
        yield Seen("error", f"a ratio is off by {worst:.2g} in an update that has not changed a weight")


def foreign_control_tokens(part: EnvironmentPart) -> Iterator[Seen]:
    """The reward model knows the control tokens that prompts hold as text."""
    task = part.vector.task
    tokenizer: Any = getattr(registry.reward_model(task.config.reward_model, *task.config.loading), "tokenizer", None)
    if tokenizer is None:
        raise Skipped("the reward model has no tokenizer")
    foreign = [token for token in control_words(task.reference) if token not in tokenizer.get_vocab()]
    written = [prompt for prompt in task.prompts.prompts if isinstance(prompt, str)]
    found = [prompt for prompt in written if any(token in prompt for token in foreign)]
    if found:
        names = ", ".join(token for token in foreign if any(token in prompt for prompt in found))
        what = f"{len(found)} of {len(task.prompts.prompts)} prompts hold {names}, plain letters to the reward model"
        yield Seen("warning", f"{what}: {found[0][:60]!r}")


def whole_response(part: EnvironmentPart) -> Iterator[Seen]:
    """The reward model reads every response to its end."""
    cut = part.played.info["truncated_response"]
    if cut.any():
        yield Seen("error", f"{int(cut.sum())} of {len(cut)} responses of the reference are cut before they are scored")


def eos_rate(part: EnvironmentPart) -> Iterator[Seen]:
    """The reference ends its responses within the budget."""
    reasons = part.played.info["finish_reason"]
    ended = int(sum(reason != "length" for reason in reasons))
    low, high = wilson(ended, len(reasons))
    share = f"{ended} of {len(reasons)} responses end within {part.vector.task.config.max_new_tokens} tokens"
    if ended / len(reasons) <= RARE:
        yield Seen("warning", f"{share} ({low:.0%} to {high:.0%})")


def temperature(part: EnvironmentPart) -> Iterator[Seen]:
    """The policy is trained at the temperature at which it will be used."""
    value = part.vector.task.config.temperature
    if value != 1.0:
        yield Seen("note", f"temperature {value:g} divides the logits of policy and reference alike")


def spread(part: EnvironmentPart) -> Iterator[Seen]:
    """Answers to one prompt have different scores."""
    if not _spread(part) > 0:
        count = len(set(part.played.prompt_ids.tolist()))
        yield Seen("error", f"{PROMPTS * EACH} responses to {count} prompts all score alike within their prompt")


def _spread(part: EnvironmentPart) -> float:
    return within_prompt_sd(np.asarray(part.played.info["rm_score"]), part.played.prompt_ids)


def beta(part: EnvironmentPart) -> Iterator[Seen]:
    """β lets the policy move, and holds it."""
    deviation, coefficient = _spread(part), part.vector.kl_coef
    if not deviation > 0:
        raise Skipped("all scores are alike")
    if coefficient == 0:
        yield Seen("warning", "β is 0: nothing keeps the policy near the reference")
        return
    # Tilting a normal distribution of scores by exp(r/β) costs σ²/2β² nats.
    nats = (deviation / coefficient) ** 2 / 2
    what = f"scores spread by {deviation:.3g} within a prompt, β is {coefficient:g}: a KL of about {nats:.2g} nats pays"
    tokens = float(part.played.tokens.response_lengths.float().mean())
    if WEAK <= nats <= max(STRONG, 3 * tokens):
        yield Seen("note", what)
    else:
        yield Seen("warning", f"{what}, too {'little to learn' if nats < WEAK else 'much to stay near the reference'}")


def leakage(part: EnvironmentPart) -> Iterator[Seen]:
    """No held-out prompt is trained on."""
    yield from leaked(part.vector.task.prompts.prompts, part.held_out)


def repeated_prompts(part: EnvironmentPart) -> Iterator[Seen]:
    """No prompt stands in the set twice."""
    texts = part.vector.task.prompts.texts
    again = len(texts) - len(set(texts))
    if again:
        yield Seen("note", f"{again} of {len(texts)} prompts repeat another")


ENVIRONMENT_CHECKS = {
    "contract": Check(
        contract,
        "A reward one slot after the end, or on a masked one, trains nothing and raises no error (trl 3750, 5338; "
        "DeepSpeedExamples 672).",
        "`textenv check ID` runs all of the contract; see docs/environment.md.",
    ),
    "reward": Check(
        reward,
        "A flipped sign or a KL counted twice optimises something else (Ziegler et al. 2019, § 4.4).",
        "Let one place subtract the KL: the environment. Add no KL of your own to its reward.",
    ),
    "KL of the reference": Check(
        reference_kl,
        "A KL that is not 0 at the start means that sampling and scoring differ (trl 235, 256, 1005; OpenRLHF 853).",
        "Use one temperature, one precision and one set of masks for both; see the checks of the model.",
    ),
    "sampler": Check(
        sampler,
        "A temperature that one of sampler and scorer does not know makes the KL negative, and training collapses (trl "
        "235, 1005; OpenRLHF 853).",
        "Give temperature and min_new_tokens to the environment, and to nothing else.",
    ),
    "first update": Check(
        first_update,
        "Where the ratio is not 1 at the start, sampling and training see two policies (trl 744; trlx 107; verl 2305).",
        "Look for dropout, another precision or other masks in one of the two; see the checks of the model.",
    ),
    "control tokens": Check(
        foreign_control_tokens,
        "A prompt that was rendered for the policy is noise to a reward model of another family (trl 1674, 1979: texts "
        "read with another tokenizer).",
        "Give prompts as messages: policy and reward model then write them each with a template of its own.",
    ),
    "whole response": Check(
        whole_response,
        "What the reward model does not read is free to be anything.",
        "Lower max_new_tokens or use a reward model with a longer context.",
    ),
    "EOS rate": Check(
        eos_rate,
        "Where responses never end by themselves, an ending cannot be learned, and a score of cut texts is optimised "
        "(trl 3248, 5697).",
        "Raise max_new_tokens, fine-tune on completions with their ending, or set missing_eos_penalty.",
    ),
    "temperature": Check(
        temperature,
        "The KL and the optimum are those of the tempered policy; used at temperature 1, the model is another one.",
        "Use the model at this temperature, or train at 1.",
    ),
    "spread": Check(
        spread,
        "Without differences within a prompt, every advantage is 0: there is nothing to learn (DAPO, Yu et al. 2025).",
        "Check that the reward model reads the response, or raise the temperature so that responses differ.",
    ),
    "β": Check(
        beta,
        "β has the unit of the scores: another reward model with the same β is another task (Gao et al. "
        "2022; several trainers rescale scores by the batch).",
        "Normalise the reward model once, after its training, then choose β for the KL that you want.",
    ),
    "leakage": Check(leakage, LEAKAGE_WHY, LEAKAGE_REMEDY),
    "repeated prompts": Check(
        repeated_prompts,
        "A prompt that stands there twice is drawn twice as often.",
        "Keep one of each, unless the weight is meant.",
    ),
}
