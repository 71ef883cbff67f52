"""Training on rankings or pairs: :mod:`agents.dpo` says by which loss."""

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

import textenv
from reward_models.evaluation import measure_scores
from reward_models.preferences import Ranking, load_rankings, of_several_turns
from reward_models.training.examples import Examples, table
from reward_models.training.losses import ranking_nll
from textenv.data.records import Placed, place_of
from textenv.lm import LanguageModel, Responses, TokenRule, gather_predictions, response_logprobs, response_scores
from textenv.lm.chat import placed_chats
from textenv.settings import Positive
from textenv.training.batches import Ragged, encode_answers
from textenv.training.checkpoint import RunFolder
from textenv.training.config import TrainingConfig
from textenv.training.loop import Evaluation, Fit, Objective, OnProgress, fit
from textenv.training.trackers import Tracker

_log = logging.getLogger(__name__)

_PLAIN = TokenRule()
"""The model's own distribution: temperature 1, every token allowed."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainingConfig):
    """Settings of direct preference optimisation. ``batch_size`` counts prompts, each with all of its responses."""

    learning_rate: Positive = 1e-6
    """Peak learning rate of AdamW, > 0. The default suits a pretrained model; the small worlds here take far more."""
    beta: Positive = 0.1
    """β: what a nat of KL costs, in units of the log-odds. Higher keeps the policy closer to the reference."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of a pair: ``sigmoid`` (DPO), or ``ipo``, which stops at a gap of 1/(2β) nats."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5), "At a half, labels say nothing."] = 0.0
    """Share of pairs taken to be labelled wrongly, in [0, 0.5). Higher keeps the policy closer to the reference."""
    max_length: Annotated[int, Ge(2), "A response needs a token to condition on."] | None = None
    """Most tokens of prompt + response (with EOS), ≥ 2; None: the model's own limit. A longer one loses the left of its
    prompt, the same for all responses; a response that is too long by itself also loses its end, with its EOS."""


class DPOResult(NamedTuple):
    """A trained policy and the record of its training."""

    model: LanguageModel
    history: list[dict[str, float]]
    """``step, epoch, loss`` (mean over prompts), ``learning_rate, grad_norm`` as logged; ``eval_…`` every epoch."""
    metrics: dict[str, float]
    """``seconds``, ``steps``, ``truncated_prompts``, ``truncated_responses``, ``left_out`` (rankings of responses with
    several turns); with ``eval_rankings`` also ``eval_…``: what
    :func:`reward_models.evaluation.evaluate_reward_model` would say of the implicit reward."""


def train_dpo(
    model: LanguageModel | str,
    rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path,
    config: DPOConfig | None = None,
    output_dir: str | Path | None = None,
    *,
    eval_rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    report_to: Sequence[Tracker] = (),
    on_progress: OnProgress | None = None,
) -> DPOResult:
    """Train a copy of a model on preferences; the model itself is the reference.

    Args:
        model: a language model, or its registered name, folder or hub id.
        rankings: records in any layout of :data:`reward_models.preferences.LAYOUTS`: in memory, a file or a data set.
        output_dir: the folder for checkpoints, then for the finished Hugging Face model; None saves nothing.
        eval_rankings: held-out records, measured after every epoch.
        device: where a model that is named is loaded and trained; a ``LanguageModel`` stays where it is.
        resume: continue the interrupted run in ``output_dir``.
        report_to: trackers that get the history too.
        on_progress: called after every step (:data:`textenv.training.loop.OnProgress`).

    Raises:
        ValueError: a record is malformed, no ranking says which response is better, or the output folder holds an
            unfinished run.
    """
    config = config or DPOConfig()
    folder = RunFolder(output_dir, resume=resume)
    kept, left_out = _of_one_turn(load_rankings(rankings), config)
    if isinstance(model, str):
        learner = textenv.fresh_language_model(model, device)
    else:
        learner = replace(model, model=copy.deepcopy(model.model))
    texts = encode(learner, kept, config)
    evaluation = None
    if eval_rankings is not None:
        held_out, _ = _of_one_turn(load_rankings(eval_rankings), config)
        evaluation = Evaluation(_evaluation(learner, held_out, config))
    options = {"evaluation": evaluation, "report_to": report_to, "on_progress": on_progress}
    run = fit_pairs(learner, Examples.of(texts, kept), texts.rule, config, folder, **options)
    metrics = {
        "seconds": run.seconds,
        "steps": float(run.steps),
        "truncated_prompts": float(texts.truncated_prompts),
        "truncated_responses": float(texts.truncated_responses),
        "left_out": float(left_out),
        **run.evaluation,
    }
    return DPOResult(learner, run.history, metrics)


def fit_pairs(
    learner: LanguageModel, examples: Examples, rule: TokenRule, config: DPOConfig, folder: RunFolder, **options: Any
) -> Fit:
    """Train a model in place on rankings of :class:`Continuations`, and leave it in the folder."""
    inputs = {"data": examples.digest(), "model": _digest(learner.model)}
    objective = Objective(learner.model, _summed_loss(config, rule))
    run = fit(objective, examples, config, folder, inputs=inputs, **options)
    folder.finish(learner.save_pretrained, run.history)
    return run


def _of_one_turn(rankings: list[Ranking], config: DPOConfig) -> tuple[list[Ranking], int]:
    """The rankings that a policy can learn from, and how many were left out."""
    single = [i for i, ranking in enumerate(rankings) if not any(map(of_several_turns, ranking.responses))]
    kept = Placed([rankings[i] for i in single], [place_of(rankings, i) for i in single])
    if left_out := len(rankings) - len(kept):
        _log.warning("%d of %d rankings left out: their responses have several turns.", left_out, len(rankings))
    if not any(len(set(ranking.levels)) > 1 for ranking in kept):
        rule = "preferences must hold a ranking of single turns that is not a tie"
        raise ValueError(f"{rule}, got {len(kept)} without one. Add rankings.")
    if config.loss == "ipo" and any(ranking.margin for ranking in kept):
        raise ValueError("margins need loss='sigmoid', got 'ipo'. Drop them or change the loss.")
    return kept, left_out


class Continuations(NamedTuple):
    """The responses of all rankings, one after another, each with its prompt."""

    prompts: Ragged
    responses: Ragged
    ref_logprobs: Float[Tensor, " n"]
    """``log π_ref(y|x)``, nats."""
    truncated_prompts: int = 0
    truncated_responses: int = 0
    rule: TokenRule = _PLAIN
    """The distribution whose log-probabilities are compared."""

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        return self.prompts.lengths + self.responses.lengths

    def digest(self) -> str:
        return self.prompts.digest() + self.responses.digest()

    def responses_of(self, index: Int[Tensor, " B"]) -> Responses:
        return Responses(*self.prompts.padded(index, left=True), *self.responses.padded(index))

    def batch(self, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
        return {**self.responses_of(index)._asdict(), "ref_logprobs": self.ref_logprobs[index]}

    def log_ratios(self, model: PreTrainedModel, batch_size: int) -> Float[Tensor, " n"]:
        """``log π(y|x) − log π_ref(y|x)``, without gradient."""
        every = self.responses_of(torch.arange(len(self.ref_logprobs)))
        return response_logprobs(model, every, self.rule, batch_size=batch_size).sum(1) - self.ref_logprobs


def encode(model: LanguageModel, rankings: Sequence[Ranking], config: DPOConfig) -> Continuations:
    """Prompts and responses as tokens, cut to the length that the model or ``config`` allows; ``model`` is the
    reference."""
    flat = [(ranking.prompt, text) for ranking in rankings for text in ranking.responses]
    with placed_chats(model.tokenizer, [ranking.prompt for ranking in rankings], partial(place_of, rankings)):
        prompts, responses = encode_answers(model.tokenizer, [prompt for prompt, _ in flat], [text for _, text in flat])
    limit = config.max_length or model.max_tokens
    row = cut_prompts = cut_responses = 0
    for number, ranking in enumerate(rankings):
        if not prompts[row]:
            where = place_of(rankings, number)
            raise ValueError(f"{where}: a prompt must have a token, got {ranking.prompt!r}. Drop it.")
        rows = range(row, row := row + len(ranking.responses))
        ending = model.eos_id if isinstance(ranking.prompt, str) else model.turn_end_id
        for i, reason in zip(rows, ranking.finish_reasons or [""] * len(rows), strict=True):
            responses[i] = responses[i] if reason == "length" else [*responses[i], ending]
            if limit is not None and len(responses[i]) >= limit:
                responses[i] = responses[i][: limit - 1]
                cut_responses += 1
        room = None if limit is None else limit - max(len(responses[i]) for i in rows)
        if room is not None and len(prompts[rows[0]]) > room:
            cut_prompts += 1
            for i in rows:
                prompts[i] = prompts[i][-room:]
    if cut_prompts or cut_responses:
        _log.warning("Over %s tokens: %d prompts and %d responses were cut.", limit, cut_prompts, cut_responses)
    model.check_ids(prompts)
    model.check_ids(responses, predicted=True)
    unknown = Continuations(Ragged(prompts), Ragged(responses), torch.zeros(len(flat)), cut_prompts, cut_responses)
    return unknown._replace(ref_logprobs=unknown.log_ratios(model.model, config.batch_size))


def ipo_loss(
    log_ratios: Float[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    *,
    ranks: Int[Tensor, "B K"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """Mean over all pairs ``i`` before ``j`` of a prompt of ``(h_i − h_j − 1/(2β))²`` (Azar et al. 2024, eq. 17).

    ``log_ratios`` h (nats) stand from best to worst; ``mask`` is True on real responses. ``label_smoothing`` ε weighs
    the loss of the opposite label, so that the gap is least at ``(1 − 2ε)/(2β)``. Tied pairs aim at a gap of 0.
    """
    ratios = log_ratios.masked_fill(~mask, 0.0)
    gaps = ratios[:, :, None] - ratios[:, None, :]
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(diagonal=1)
    target = (ranks[:, :, None] < ranks[:, None, :]) / (2 * beta)
    losses = (1 - label_smoothing) * (gaps - target).square() + label_smoothing * (gaps + target).square()
    return losses.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2))


def _summed_loss(config: DPOConfig, rule: TokenRule = _PLAIN) -> Callable[..., Float[Tensor, ""]]:
    """The sum over prompts of a batch."""

    def summed(
        model: PreTrainedModel, counts: Tensor, ranks: Tensor, margins: Tensor, ref_logprobs: Tensor, **fields: Tensor
    ) -> Float[Tensor, ""]:
        batch = Responses(**fields)
        sums = gather_predictions(response_scores(model, batch, rule).logprobs, batch).sum(1)
        log_ratios, mask = table(sums - ref_logprobs, counts)
        options = {"ranks": table(ranks, counts)[0], "label_smoothing": config.label_smoothing}
        if config.loss == "ipo":
            return ipo_loss(log_ratios, mask, beta=config.beta, **options).sum()
        return ranking_nll(config.beta * log_ratios, mask, margins, **options).sum()

    return summed


def _evaluation(
    learner: LanguageModel, held_out: Sequence[Ranking], config: DPOConfig
) -> Callable[[], dict[str, float]]:
    """Function that measures the implicit reward of the learner as it is now; made while it is the reference."""
    texts = encode(learner, held_out, config)

    def evaluate() -> dict[str, float]:
        learner.model.eval()
        scores = config.beta * texts.log_ratios(learner.model, config.batch_size)
        return {f"eval_{key}": value for key, value in measure_scores(scores, held_out).items()}

    return evaluate


def _digest(model: PreTrainedModel) -> str:
    """A fingerprint of the weights."""
    digest = hashlib.sha256()
    for _, weight in sorted(model.state_dict().items()):
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
