"""Supervised fine-tuning: maximise the likelihood of demonstrations, completion tokens only.

Objective: the mean negative log-likelihood per completion token, including the one that ends it (EOS, or for a chat the
token with which its template closes the turn)::

    L(θ) = − Σ_i Σ_t log π_θ(y_it | x_i, y_i,<t) / Σ_i |y_i|,

over all the examples of an optimizer step: every token weighs the same, however the step is split. Prompt tokens are
not learned, unless ``completion_only=False`` (to train a base model). The prompt is tokenised apart from the
completion, exactly as in an environment, and dropout is off: the trained policy is the one that is sampled and scored.

    textenv sft --help
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

import textenv
from reward_models.preferences import beside_prompt
from textenv.data.datasets import read_records
from textenv.data.records import Placed, flag, messages_of, place_of
from textenv.lm import LanguageModel, Responses, TokenRule, length_buckets, response_scores
from textenv.lm.chat import placed_chats
from textenv.training.batches import Ragged, encode_answers
from textenv.training.checkpoint import RunFolder
from textenv.training.config import TrainingConfig
from textenv.training.loop import Evaluation, Objective, OnProgress, fit
from textenv.training.trackers import Tracker

_log = logging.getLogger(__name__)

_PLAIN = TokenRule()
"""The model's own distribution: temperature 1, every token allowed."""


Turns = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Settings of supervised fine-tuning. Those of the optimisation are inherited."""

    max_length: Annotated[int, Ge(2), "Training takes one token to condition on and one to learn."] | None = None
    """Most tokens of prompt + completion (with EOS), ≥ 2; None: the model's own limit. A longer example loses the
    left of its prompt; a completion that is too long by itself also loses its end, with its EOS."""
    completion_only: bool = True
    """Learn only completion tokens. False learns every token but the first, to train a base model."""
    turns: Turns = "last"
    """Which assistant turns of ``messages`` to learn: the last, or all that answer something. Each is an example of its
    own, conditioned on the chat before it as an environment would show it, so a long chat is read once a turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns == "all" and not self.completion_only:
            raise ValueError("turns='all' needs completion_only, got False. Earlier turns would be learned repeatedly.")


class SFTResult(NamedTuple):
    """A fine-tuned model and the record of its training."""

    model: LanguageModel
    history: list[dict[str, float]]
    """``step, epoch, loss`` (nats per token), ``learning_rate, grad_norm`` as logged; ``eval_nll`` after each epoch."""
    metrics: dict[str, float]
    """``seconds``, ``steps``, ``tokens`` (learned per epoch), ``truncated_prompts``, ``truncated_completions``; with
    ``eval_records`` also ``eval_nll`` (nats per token)."""


class Demonstration(NamedTuple):
    """One example to learn from."""

    prompt: Any
    """A string or a chat."""
    completion: str
    truncated: bool
    """True: the completion was cut off, so no EOS follows it."""


def train_sft(
    model: LanguageModel | str,
    records: Sequence[Mapping[str, Any] | Demonstration] | str | Path,
    config: SFTConfig | None = None,
    output_dir: str | Path | None = None,
    *,
    eval_records: Sequence[Mapping[str, Any] | Demonstration] | str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    report_to: Sequence[Tracker] = (),
    on_progress: OnProgress | None = None,
) -> SFTResult:
    """Fine-tune a copy of a model on demonstrations.

    Args:
        model: a language model, or its registered name, folder or hub id.
        records: a list or JSONL path of ``{"prompt", "completion"}`` or ``{"messages": [...]}``, of which
            ``config.turns`` are learned. ``"truncated": true`` marks a last completion that was cut off and gets no
            EOS.
        output_dir: the folder for checkpoints, then for the finished Hugging Face model; None saves nothing.
        eval_records: held-out records, whose NLL enters the history after every epoch.
        device: where a model that is named is loaded and trained; a ``LanguageModel`` stays where it is.
        resume: continue the interrupted run in ``output_dir``.
        report_to: trackers that get the history too.
        on_progress: called after every step (:data:`textenv.training.loop.OnProgress`).

    Raises:
        ValueError: a record is malformed (names its number), or the output folder holds an unfinished run.
    """
    config = config or SFTConfig()
    folder = RunFolder(output_dir, resume=resume)
    demonstrations = load_demonstrations(records, turns=config.turns)
    held_out = [] if eval_records is None else load_demonstrations(eval_records, turns=config.turns)
    if isinstance(model, str):
        learner = textenv.fresh_language_model(model, device)
    else:
        learner = replace(model, model=copy.deepcopy(model.model))
    examples = tokenise(learner, demonstrations, config)
    evaluation = None
    if held_out:
        unseen = tokenise(learner, held_out, config)
        evaluation = Evaluation(lambda: {"eval_nll": mean_nll(learner.model, unseen, config.batch_size)})
    inputs = {"data": examples.prompts.digest() + examples.responses.digest()}
    objective = Objective(learner.model, _summed_loss)
    options = {"evaluation": evaluation, "report_to": report_to, "on_progress": on_progress}
    run = fit(objective, examples, config, folder, inputs=inputs, **options)
    folder.finish(learner.save_pretrained, run.history)
    metrics = {
        "seconds": run.seconds,
        "steps": float(run.steps),
        "tokens": float(examples.responses.lengths.sum()),
        "truncated_prompts": float(examples.truncated_prompts),
        "truncated_completions": float(examples.truncated_completions),
        **run.evaluation,
    }
    return SFTResult(learner, run.history, metrics)


def load_demonstrations(
    records: Sequence[Mapping[str, Any] | Demonstration] | str | Path,
    split: str | None = None,
    *,
    turns: Turns = "last",
) -> list[Demonstration]:
    """Read ``{"prompt", "completion"}`` and ``{"messages"}`` records: in memory, a file, or a data set's ``split``.

    Raises:
        ValueError: a record is malformed; names file and line, or the record's number from 1.
    """
    if isinstance(records, str | Path):
        placed = list(read_records(records, split=split).items())
    else:
        placed = [(place_of(records, number), record) for number, record in enumerate(records)]
    if not placed:
        raise ValueError("demonstrations must hold at least one record, got []. Give a list or a JSONL file.")
    found: list[Demonstration] = []
    places: list[str] = []
    for where, record in placed:
        try:
            found += [record] if isinstance(record, Demonstration) else map(_demonstration, _parts(record, turns))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        places += [where] * (len(found) - len(places))
    return Placed(found, places)


def _parts(record: Mapping[str, Any], turns: Turns) -> list[Mapping[str, Any]]:
    """A record of ``messages`` as prompts with their completions, one for each turn to learn; another as it is."""
    if record.get("messages") is None:
        return [record]
    messages = messages_of(record["messages"])
    if not isinstance(messages, list) or len(messages) < 2 or not _is_answer(messages[-1]):
        rule = "'messages' must be a chat that ends with an assistant turn"
        raise ValueError(f"{rule}, got {messages!r}. Cut it there.")
    (messages,) = beside_prompt(messages_of(record.get("prompt")), [messages])
    last = len(messages) - 1
    earlier = [number for number in range(1, last) if _is_answer(messages[number])] if turns == "all" else []
    parts = [{"prompt": messages[:number], "completion": messages[number : number + 1]} for number in (*earlier, last)]
    return [*parts[:-1], {**parts[-1], "truncated": record.get("truncated")}]


def _demonstration(record: Mapping[str, Any]) -> Demonstration:
    if not {"prompt", "completion"} <= record.keys():
        rule = "a demonstration must have 'prompt' and 'completion', or 'messages'"
        raise ValueError(f"{rule}, got keys {sorted(record)}. Rename the columns.")
    prompt, completion = messages_of(record["prompt"]), messages_of(record["completion"])
    if isinstance(completion, list) and len(completion) == 1 and _is_answer(completion[0]):
        completion = completion[0].get("content")
    if not isinstance(prompt, str | list):
        raise ValueError(f"'prompt' must be a string or a list of chat messages, got {prompt!r}. Convert it.")
    if not isinstance(completion, str):
        rule = "the completion must be a string or one assistant message"
        raise ValueError(f"{rule}, got {completion!r}. Convert it.")
    return Demonstration(prompt, completion, flag("truncated", record.get("truncated")))


def _is_answer(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


class _Examples(NamedTuple):
    """Tokenised demonstrations."""

    prompts: Ragged
    """Tokens to condition on, ≥ 1."""
    responses: Ragged
    """Tokens to learn."""
    truncated_prompts: int
    truncated_completions: int

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        return self.prompts.lengths + self.responses.lengths

    def batch(self, index: Int[Tensor, " B"]) -> Responses:
        return Responses(*self.prompts.padded(index, left=True), *self.responses.padded(index))

    def collate(self, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
        return self.batch(index)._asdict()

    def items(self, index: Int[Tensor, " B"]) -> int:
        """Tokens that are learned."""
        return int(self.responses.lengths[index].sum())


def tokenise(model: LanguageModel, demonstrations: list[Demonstration], config: SFTConfig) -> _Examples:
    """The tokens of demonstrations, cut to the length that the model or ``config`` allows."""
    texts = [d.prompt for d in demonstrations], [d.completion for d in demonstrations]
    with placed_chats(model.tokenizer, texts[0], partial(place_of, demonstrations)):
        prompts, completions = encode_answers(model.tokenizer, *texts)
    limit = config.max_length or model.max_tokens
    cut_prompts = cut_completions = 0
    for i, demonstration in enumerate(demonstrations):
        prompt, where = prompts[i], place_of(demonstrations, i)
        ending = model.eos_id if isinstance(demonstration.prompt, str) else model.turn_end_id
        response = completions[i] if demonstration.truncated else [*completions[i], ending]
        if not config.completion_only:
            prompt, response = [], prompt + response
        if not prompt:
            if config.completion_only:
                raise ValueError(f"{where}: a prompt must have a token, got {demonstration.prompt!r}. Drop it.")
            prompt, response = response[:1], response[1:]
        if not response:
            raise ValueError(f"{where}: an example must have a token to learn, got {demonstration!r}. Drop it.")
        if limit is not None and len(prompt) + len(response) > limit:
            cut_completions += len(response) > limit - 1
            cut_prompts += len(prompt) > 1
            response = response[: limit - 1]
            prompt = prompt[-(limit - len(response)) :]
        prompts[i], completions[i] = prompt, response
    if cut_prompts or cut_completions:
        _log.warning("Over %s tokens: %d prompts and %d completions were cut.", limit, cut_prompts, cut_completions)
    model.check_ids(prompts)
    model.check_ids(completions, predicted=True)
    return _Examples(Ragged(prompts), Ragged(completions), cut_prompts, cut_completions)


def summed_nll(model: PreTrainedModel, batch: Responses) -> Float[Tensor, ""]:
    """Negative log-likelihood (nats) of the response tokens of a batch, with gradient."""
    return -response_scores(model, batch, _PLAIN).logprobs.sum()


def _summed_loss(model: PreTrainedModel, **fields: Tensor) -> Float[Tensor, ""]:
    return summed_nll(model, Responses(**fields))


@torch.no_grad()
def mean_nll(model: PreTrainedModel, examples: _Examples, batch_size: int) -> float:
    """Mean negative log-likelihood per learned token, in nats. No gradient."""
    training = model.training
    model.eval()
    total = 0.0
    for index in length_buckets(examples.lengths, batch_size):
        total += summed_nll(model, examples.batch(index).to(model.device)).item()
    model.train(training)
    return total / int(examples.responses.lengths.sum())
