"""Training a reward model on rankings, and measuring it.

Objective: for every prompt the mean over its C(K, 2) pairs of ``−log σ(s_better − s_worse)``, averaged over the prompts
of an optimizer step. Differences from Ouyang et al. (2022, § 3.5): prompts of different K weigh the same; scores are
normalised by their spread within a prompt after training, not by the mean of demonstrations; the head starts at zero.

References: Bradley and Terry 1952; Christiano et al. 2017; Ouyang et al. 2022.

    textenv reward --help
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward_models.losses import plackett_luce_nll, ranking_accuracy, ranking_nll
from reward_models.preferences import Ranking, load_rankings, prompt_key
from reward_models.transformer import TransformerRewardModel, score_rows, score_unit
from textenv.hf_training import Objective, OnProgress, Ragged, TrainingConfig, fit, remove_checkpoints
from textenv.lm import LanguageModel

RankingLoss = Literal["pairwise", "listwise"]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """How to train a reward model. ``batch_size`` counts prompts, each with all of its responses."""

    loss: RankingLoss = "pairwise"
    """What a ranking of K responses is worth: ``pairwise``, the mean over its C(K, 2) pairs (InstructGPT), or
    ``listwise``, the Plackett–Luce likelihood of the whole order. The same for K = 2."""
    normalize: bool = True
    """Scale the trained scores to mean 0 and within-prompt standard deviation 1 on the training responses, so that a
    KL coefficient means the same for every reward model."""
    freeze_embeddings: bool = False
    """Keep token and position embeddings as the language model left them: less to overfit on few rankings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in get_args(RankingLoss):
            raise ValueError(f"loss must be one of {get_args(RankingLoss)}, with loss (={self.loss!r}).")


class RewardResult(NamedTuple):
    """A trained reward model and how it came about."""

    model: TransformerRewardModel
    history: list[dict[str, float]]
    """``step, epoch, loss`` (nats a pair), ``learning_rate, grad_norm`` each logging interval; ``eval_accuracy,
    eval_nll`` an epoch."""
    metrics: dict[str, float]
    """``seconds``, ``steps``, ``truncated_prompts``; with ``eval_rankings`` also what
    :func:`evaluate_reward_model` returns, each name with ``eval_`` before it."""


def train_reward_model(
    model: TransformerRewardModel | LanguageModel,
    rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path,
    config: RewardConfig | None = None,
    output_dir: str | Path | None = None,
    *,
    eval_rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> RewardResult:
    """Train a copy of ``model`` on rankings; a language model lends its trunk to a new score head.

    ``rankings`` are records, rankings or a JSONL path (:func:`reward_models.preferences.load_rankings`). With
    ``output_dir`` the result is a Hugging Face folder there; checkpoints, resume and Ctrl-C are those of
    :func:`textenv.hf_training.fit`. ``eval_rankings`` are held out: accuracy and NLL enter the history every epoch.

    Raises:
        ValueError: a record is malformed (names its number), or the output folder holds an unfinished run.
    """
    config = config or RewardConfig()
    rankings = load_rankings(rankings)
    held_out = None if eval_rankings is None else load_rankings(eval_rankings)
    learner = (
        _copy(model) if isinstance(model, TransformerRewardModel) else TransformerRewardModel.from_language_model(model)
    )
    examples = _Examples.of(learner, rankings)
    if config.loss == "listwise" and examples.margins.any():
        raise ValueError("margins need loss='pairwise', with loss (='listwise'). Drop the margins or change the loss.")
    if config.freeze_embeddings:
        for module in learner.model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)

    def evaluate() -> dict[str, float]:
        learner.model.eval()
        measured = evaluate_reward_model(learner, held_out or [])
        return {f"eval_{key}": value for key, value in measured.items()}

    run = fit(
        Objective(learner.model, _summed_loss(config.loss)),
        examples.lengths,
        examples.collate,
        config,
        save=learner.save_pretrained,
        fingerprint=examples.texts.digest(),
        output_dir=output_dir,
        resume=resume,
        on_progress=on_progress,
        evaluate=None if held_out is None else evaluate,
    )
    metrics = {"seconds": run.seconds, "steps": float(run.steps), "truncated_prompts": float(learner.truncated_prompts)}
    metrics |= run.evaluation
    if config.normalize:
        learner.normalize(rankings)
    if output_dir is not None:
        learner.save_pretrained(output_dir)
        remove_checkpoints(output_dir)
    return RewardResult(learner, run.history, metrics)


def evaluate_reward_model(
    model: TransformerRewardModel, rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path
) -> dict[str, float]:
    """``accuracy`` (share of pairs ordered right, ties one half) and ``nll`` (nats a pair), with standard errors
    ``accuracy_se`` and ``nll_se`` clustered by prompt, and the counts ``pairs`` and ``prompts``.

    Every ranking weighs the same, as in training; margins play no part. The NLL is that of
    ``σ(score_unit · (s_better − s_worse))``, so normalisation changes neither figure.
    """
    rankings = load_rankings(rankings)
    counts = torch.tensor([len(ranking.responses) for ranking in rankings])
    scores, mask = table(model.scores(model.encode_rankings(rankings)), counts)
    keys: dict[str, int] = {}
    cluster = torch.tensor([keys.setdefault(prompt_key(ranking.prompt), len(keys)) for ranking in rankings])
    accuracy, accuracy_se = clustered_mean(ranking_accuracy(scores, mask), cluster)
    nll, nll_se = clustered_mean(ranking_nll(scores * model.score_unit, mask), cluster)
    return {
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "nll": nll,
        "nll_se": nll_se,
        "pairs": float((counts * (counts - 1) // 2).sum()),
        "prompts": float(len(keys)),
    }


def clustered_mean(values: Float[Tensor, " B"], cluster: Int[Tensor, " B"]) -> tuple[float, float]:
    """Mean of ``values`` and its standard error when only the clusters (numbered from 0) are independent.

    ``SE² = G/(G − 1) · Σ_g (Σ_{i ∈ g} (x_i − x̄))² / n²`` over G clusters; 0 with a single one.
    """
    values = values.double()
    mean = values.mean()
    groups = int(cluster.max()) + 1
    sums = torch.zeros(groups, dtype=torch.float64).index_add(0, cluster, values - mean)
    se = (sums.square().sum() * groups / max(groups - 1, 1)).sqrt() / len(values)
    return mean.item(), se.item() if groups > 1 else 0.0


def table(scores: Float[Tensor, " N"], counts: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Scores of ``counts[b]`` responses a prompt, one after another, as ``([B, K], mask)``; with gradient."""
    mask = torch.arange(int(counts.max()), device=scores.device) < counts.to(scores.device)[:, None]
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores), mask


class _Examples(NamedTuple):
    """Tokenised rankings: the responses of prompt b are the texts ``starts[b] … starts[b] + counts[b] − 1``."""

    texts: Ragged
    starts: Int[Tensor, " N"]
    counts: Int[Tensor, " N"]
    margins: Float[Tensor, " N"]
    lengths: Int[Tensor, " N"]
    """Longest text of each prompt."""

    @classmethod
    def of(cls, model: TransformerRewardModel, rankings: Sequence[Ranking]) -> "_Examples":
        texts = model.encode_rankings(rankings)
        counts = torch.tensor([len(ranking.responses) for ranking in rankings])
        longest = torch.stack([part.max() for part in texts.lengths.split(counts.tolist())])
        margins = torch.tensor([ranking.margin for ranking in rankings], dtype=torch.float32)
        return cls(texts, counts.cumsum(0) - counts, counts, margins, longest)

    def collate(self, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
        """The batch as Trainer wants it; ``labels`` has one entry a prompt, for Trainer to count."""
        counts = self.counts[index]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        input_ids, lengths = self.texts.padded(self.starts[index].repeat_interleave(counts) + within)
        batch = {"input_ids": input_ids, "lengths": lengths, "counts": counts, "margins": self.margins[index]}
        return {**batch, "labels": torch.zeros(len(index))}


def _summed_loss(loss: RankingLoss) -> Callable[..., Float[Tensor, ""]]:
    """The sum over prompts of a batch; every response passes the trunk once."""

    def summed(
        model: PreTrainedModel, input_ids: Tensor, lengths: Tensor, counts: Tensor, margins: Tensor
    ) -> Float[Tensor, ""]:
        scores, mask = table(score_rows(model, input_ids, lengths), counts)
        scores = scores * score_unit(model)
        return (plackett_luce_nll(scores, mask) if loss == "listwise" else ranking_nll(scores, mask, margins)).sum()

    return summed


def _copy(model: TransformerRewardModel) -> TransformerRewardModel:
    return TransformerRewardModel(
        copy.deepcopy(model.model), model.tokenizer, name=model.name, batch_size=model.batch_size
    )
