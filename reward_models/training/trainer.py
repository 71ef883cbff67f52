"""Training a reward model on rankings, and measuring it.

Objective: for every prompt the mean over its C(K, 2) pairs of ``−log σ(s_better − s_worse)``, averaged over the prompts
of an optimizer step. Differences from Ouyang et al. (2022, § 3.5): prompts of different K weigh the same; scores are
normalised by their spread within a prompt after training, not by the mean of demonstrations; the head starts at zero.

References: Bradley and Terry 1952; Christiano et al. 2017; Ouyang et al. 2022.

    textenv reward --help
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Lt
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward_models.evaluation import evaluate_reward_model, measure_scores
from reward_models.preferences import Ranking, load_rankings
from reward_models.scorers.features import trunk_features
from reward_models.scorers.heads import score_features, score_head, score_rows, score_rows_in_buckets, score_unit
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.examples import Examples, Featurize, table
from reward_models.training.lora import LoRA
from reward_models.training.losses import centre_penalty, plackett_luce_nll, ranking_nll
from textenv.lm import LanguageModel
from textenv.settings import Count, NonNegative, PositiveInt
from textenv.training.checkpoint import RunFolder
from textenv.training.config import TrainingConfig
from textenv.training.loop import Evaluation, Objective, OnProgress, fit
from textenv.training.processes import sharded
from textenv.training.trackers import Tracker
from textenv.training.trainable import BestWeights, trainable_weights

__all__ = ["RewardConfig", "RewardResult", "evaluate_reward_model", "train_reward_model"]

RankingLoss = Literal["pairwise", "listwise"]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Settings of reward-model training. ``batch_size`` counts prompts, each with all of its responses."""

    loss: RankingLoss = "pairwise"
    """Loss of a ranking of K responses: ``pairwise``, the mean over its C(K, 2) pairs (InstructGPT), or
    ``listwise``, the Plackett–Luce likelihood of the whole order. The same for K = 2."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5), "At a half, labels say nothing."] = 0.0
    """Share of pairs taken to be labelled wrongly, in [0, 0.5). Higher keeps scores closer. Needs the pairwise loss."""
    tie_strength: NonNegative = 0.0
    """Davidson's ν, ≥ 0: how readily equally good responses are tied, P(tie) = ν/(2 + ν). 0 counts a tie as half a win
    each way. Ties need the pairwise loss."""
    center_coef: NonNegative = 0.0
    """Weight of the squared mean score of each prompt's responses, ≥ 0: draws scores to 0, which comparisons leave
    free. Around 0.01 is usual."""
    normalize: bool = True
    """Scale the trained scores to mean 0 and within-prompt standard deviation 1 on the training responses, so that a
    KL coefficient means the same for every reward model."""
    freeze_embeddings: bool = False
    """Keep token and position embeddings as the language model left them: less to overfit on few rankings."""
    freeze_trunk: bool = False
    """Train the last linear layer alone, on features computed once: much faster, and less to overfit."""
    feature_file: str | None = None
    """SQLite file that keeps a frozen trunk's features for later runs on the same texts; None keeps none."""
    lora_rank: Count = 0
    """Rank of low-rank adapters on every linear layer, ≥ 0; merged when saved. 0 trains the weights themselves."""
    lora_alpha: NonNegative = 16.0
    """Adapters are scaled by lora_alpha / lora_rank. Higher lets them change the model faster."""
    eval_steps: Annotated[PositiveInt | None, "Use None to evaluate after each epoch alone."] = None
    """Optimizer steps between evaluations on held-out rankings, ≥ 1, besides the one after every epoch."""
    early_stopping_patience: Annotated[PositiveInt | None, "Use None to train to the end."] = None
    """Stop after this many evaluations (≥ 1) without a lower held-out NLL, and keep the weights of the best one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "listwise" and (self.label_smoothing or self.tie_strength):
            raise ValueError(
                "label_smoothing and tie_strength need loss='pairwise', got loss='listwise' with label_smoothing="
                f"{self.label_smoothing}, tie_strength={self.tie_strength}. Set both to 0, or use the pairwise loss."
            )
        if self.feature_file is not None and not self.freeze_trunk:
            rule = f"feature_file needs freeze_trunk, got {self.feature_file!r} without it"
            raise ValueError(f"{rule}. A trunk that learns has no fixed features.")
        if self.freeze_trunk and self.lora_rank:
            raise ValueError(f"freeze_trunk must be off with LoRA, got lora_rank={self.lora_rank}. Choose one of them.")


class RewardResult(NamedTuple):
    """A trained reward model and the record of its training."""

    model: TransformerRewardModel
    history: list[dict[str, float]]
    """``step, epoch, loss`` (nats per pair, penalties included), ``learning_rate, grad_norm`` each logging interval;
    ``eval_nll_per_ranking`` and others each evaluation."""
    metrics: dict[str, float]
    """``seconds``, ``steps``, ``truncated_prompts``, ``truncated_responses``, ``trained_parameters``; with
    ``eval_rankings`` also ``eval_…`` for what :func:`reward_models.evaluation.evaluate_reward_model` returns."""


def train_reward_model(
    model: TransformerRewardModel | LanguageModel,
    rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path,
    config: RewardConfig | None = None,
    output_dir: str | Path | None = None,
    *,
    eval_rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path | None = None,
    resume: bool = False,
    report_to: Sequence[Tracker] = (),
    on_progress: OnProgress | None = None,
) -> RewardResult:
    """Train a copy of ``model`` on rankings; a language model lends its trunk to a new score head.

    ``rankings`` are records, rankings or a JSONL path (:func:`reward_models.preferences.load_rankings`). With
    ``output_dir`` the result is a Hugging Face folder there; checkpoints, resume and Ctrl-C are those of
    :func:`textenv.training.loop.fit`. ``eval_rankings`` are held out: accuracy, NLL and calibration enter the history,
    which the trackers of ``report_to`` get too.

    Raises:
        ValueError: a record is malformed (names its number), settings do not fit the data, or the output folder holds
            an unfinished run.
    """
    config = config or RewardConfig()
    folder = RunFolder(output_dir, resume=resume)
    rankings = load_rankings(rankings)
    held_out = None if eval_rankings is None else load_rankings(eval_rankings)
    _check(config, rankings, held_out)
    learner = _learner(model)
    start = learner.identity
    featurize = _featurize(learner, config, on_progress) if config.freeze_trunk else None
    texts = learner.encode_rankings(rankings)
    examples = Examples.of(texts, rankings, None if featurize is None else featurize(texts))
    lora = _choose_trainable(learner.model, config)
    patience, evaluation = config.early_stopping_patience, None
    if held_out is not None:
        best = None if patience is None else BestWeights(learner.model, "eval_nll_per_ranking", patience)
        evaluation = Evaluation(_evaluation(learner, held_out, featurize), config.eval_steps, best)
    inputs = {"start model": start, "data": examples.digest()}
    if patience is not None:  # the weights depend on it
        inputs["held-out data"] = hashlib.sha256(repr(held_out).encode()).hexdigest()[:16]
    trained = sum(weight.numel() for weight in trainable_weights(learner.model).values())
    objective = Objective(learner.model, _summed_loss(config))
    options = {"evaluation": evaluation, "report_to": report_to, "on_progress": on_progress}
    run = fit(objective, examples, config, folder, inputs=inputs, **options)
    if lora is not None:
        lora.merge()
    metrics = {"seconds": run.seconds, "steps": float(run.steps), "truncated_prompts": float(learner.truncated_prompts)}
    metrics["truncated_responses"] = float(learner.truncated_responses)
    metrics |= {"trained_parameters": float(trained), **run.evaluation}
    if config.normalize:
        known = None if examples.features is None else learner.scores_of(examples.features)
        learner.normalize(rankings, known)
    folder.finish(learner.save_pretrained, run.history)
    return RewardResult(learner, run.history, metrics)


def _check(config: RewardConfig, rankings: Sequence[Ranking], held_out: Sequence[Ranking] | None) -> None:
    """Refuse what a listwise loss cannot read, rankings that tell nothing, and stopping on unmeasured figures."""
    if config.loss == "listwise":
        for what, found in {
            "margins": any(ranking.margin for ranking in rankings),
            "ties": any(ranking.has_ties for ranking in rankings),
        }.items():
            if found:
                raise ValueError(f"{what} need loss='pairwise', got 'listwise'. Drop them or change the loss.")
    for what, given in {"rankings": rankings, "eval_rankings": held_out or ()}.items():
        if given and not any(len(set(ranking.levels)) > 1 for ranking in given):
            raise ValueError(f"{what} must hold a pair that is not a tie, got {len(given)} without one. Add rankings.")
    if held_out is None and (config.early_stopping_patience or config.eval_steps):
        raise ValueError(
            "early_stopping_patience and eval_steps need held-out rankings, got "
            f"{config.early_stopping_patience} and {config.eval_steps} without any. Give eval_rankings."
        )


def _choose_trainable(model: PreTrainedModel, config: RewardConfig) -> LoRA | None:
    """Freeze what the config says; the adapters, if there are any."""
    if config.lora_rank:
        return LoRA(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    if config.freeze_trunk:
        model.requires_grad_(False)
        score_head(model).requires_grad_(True)
    if config.freeze_embeddings:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    return None


def _featurize(learner: TransformerRewardModel, config: RewardConfig, on_progress: OnProgress | None) -> Featurize:
    """Function that passes texts through a frozen trunk; progress counts texts."""

    def on_texts(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, total, {})

    return lambda texts: trunk_features(learner, texts, config.feature_file, on_texts)


def _evaluation(
    learner: TransformerRewardModel, held_out: Sequence[Ranking], featurize: Featurize | None
) -> Callable[[], dict[str, float]]:
    """Function that measures the learner as it is now; a frozen trunk reads the texts once."""
    texts = learner.encode_rankings(held_out)
    features = None if featurize is None else featurize(texts)

    def evaluate() -> dict[str, float]:
        learner.model.eval()
        scores = learner.scores(texts) if features is None else learner.scores_of(features)
        return {f"eval_{key}": value for key, value in measure_scores(scores * learner.score_unit, held_out).items()}

    return evaluate


def _summed_loss(config: RewardConfig) -> Callable[..., Float[Tensor, ""]]:
    """The sum over prompts of a batch; every response passes the trunk once, or not at all where it has features."""

    def summed(
        model: PreTrainedModel, counts: Tensor, ranks: Tensor, margins: Tensor, **texts: Tensor
    ) -> Float[Tensor, ""]:
        if "features" in texts:
            flat = score_features(model, **texts)
        else:  # processes with shares of a model meet in each pass, so they have as many
            flat = (score_rows if sharded() else score_rows_in_buckets)(model, **texts)
        scores, mask = table(flat * score_unit(model), counts)
        if config.loss == "listwise":
            nll = plackett_luce_nll(scores, mask)
        else:
            options = {"label_smoothing": config.label_smoothing, "tie_strength": config.tie_strength}
            nll = ranking_nll(scores, mask, margins, ranks=table(ranks, counts)[0], **options)
        if config.center_coef:
            nll = nll + config.center_coef * centre_penalty(scores, mask)
        return nll.sum()

    return summed


def _learner(model: TransformerRewardModel | LanguageModel) -> TransformerRewardModel:
    """A copy to train."""
    if isinstance(model, LanguageModel):
        return TransformerRewardModel.from_language_model(model)
    copied = copy.deepcopy(model.model)
    return TransformerRewardModel(copied, model.tokenizer, name=model.name, batch_size=model.batch_size)
