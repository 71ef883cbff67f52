"""How the score of a Hugging Face sequence classifier is read, for decoders and encoders.

Two kinds of model. A *decoder* (GPT-2, Llama, Qwen2, …) has a linear head named ``score``, read at the last real token,
by explicit length. An *encoder* (BERT, DeBERTa, …) pools a text by itself and ends in a linear layer of one output.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from textenv.lm.batch import length_buckets, length_mask

Ids = Int[Tensor, "B S"]
Lengths = Int[Tensor, " B"]
Scores = Float[Tensor, " B"]


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the score is read at the last token by a linear head named ``score``."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer, of one output; ValueError for a model without one."""
    if is_decoder(model):
        head: Any = model.score
    else:
        outside = [module for name, module in model.named_modules() if name.split(".")[0] != model.base_model_prefix]
        linear = [module for module in outside if isinstance(module, nn.Linear) and module.out_features == 1]
        head = linear[-1] if linear and not model.config.is_encoder_decoder else None
    if head is None or head.out_features != 1:
        raise ValueError(
            "a reward model must be a sequence classifier of one label: a decoder with a linear `score` head of one "
            f"label, or an encoder whose classifier has one output, got {type(model).__name__} with head "
            f"{head}. Train one, or convert it with num_labels=1."
        )
    return head


def score_rows(model: PreTrainedModel, input_ids: Ids, lengths: Lengths, token_type_ids: Ids | None = None) -> Scores:
    """Scores of right-padded rows, with gradient."""
    if is_decoder(model):
        return score_features(model, _last_hidden(model, input_ids, lengths))
    return _pooled_scores(model, input_ids, lengths, token_type_ids)


def score_rows_in_buckets(model: PreTrainedModel, input_ids: Ids, lengths: Lengths, **more: Ids) -> Scores:
    """As :func:`score_rows`, in passes over rows of similar length: less padding."""
    order = list(length_buckets(lengths, len(lengths), max_padding=0.1))
    scores = []
    for index in order:
        width = int(lengths[index].max())
        types = {name: values[index, :width] for name, values in more.items()}
        scores.append(score_rows(model, input_ids[index, :width], lengths[index], **types))
    return torch.cat(scores)[torch.cat(order).argsort()]


def score_features(model: PreTrainedModel, features: Float[Tensor, "B H"]) -> Scores:
    """Scores of what :func:`features_of_rows` returned, with gradient to the head alone."""
    head = score_head(model)
    return _wide(head(features.to(head.weight.dtype)).squeeze(-1))


@torch.no_grad()
def features_of_rows(
    model: PreTrainedModel, input_ids: Ids, lengths: Lengths, token_type_ids: Ids | None = None
) -> Float[Tensor, "B H"]:
    """Inputs of the last linear layer: all that training the head alone needs from the trunk."""
    if is_decoder(model):
        return _last_hidden(model, input_ids, lengths)
    seen: list[Tensor] = []
    hook = score_head(model).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        scores = _pooled_scores(model, input_ids, lengths, token_type_ids)
    finally:
        hook.remove()
    assert torch.allclose(_wide(score_head(model)(seen[0]).squeeze(-1)), scores), "the head is not the last layer"
    return seen[0]


def unused_positions(model: PreTrainedModel) -> int:
    """Positions that no token ever has: RoBERTa and its kin count from behind the number of their padding token."""
    named = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    tables = [module for module in named if isinstance(module, nn.Embedding)]
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def score_unit(model: PreTrainedModel) -> float:
    """Log-odds in one unit of score."""
    return float(getattr(model.config, "score_unit", 1.0))


def rescale(model: PreTrainedModel, deviation: float) -> None:
    """Divide every score by ``deviation``, in the weights, and remember it as ``config.score_unit``."""
    head = score_head(model)
    with torch.no_grad():
        head.weight.div_(deviation)
        if head.bias is not None:
            head.bias.div_(deviation)
    model.config.score_unit = score_unit(model) * deviation


@torch.no_grad()
def shift(model: PreTrainedModel, by: float) -> None:
    """Add a constant to every score: in the head's bias or in the bias of the trunk's final norm
    (``w · (h + by · w / (w · w)) = w · h + by``). A model that has neither (Llama, Qwen2, …) keeps its scores."""
    head = score_head(model)
    if head.bias is not None:
        head.bias.add_(by)
        return
    probe = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    length = torch.ones(1, dtype=torch.int64)
    before = score_rows(model, probe, length)
    weight = head.weight[0].double()
    norms = [module for module in model.base_model.modules() if isinstance(module, nn.LayerNorm)]
    bias = norms[-1].bias if norms else None
    if bias is not None and bias.shape == weight.shape:
        kept = bias.clone()
        bias.copy_(bias.double() + by * weight / weight.square().sum())
        moved = score_rows(model, probe, length) - before
        if torch.allclose(moved, torch.full_like(moved, by), rtol=1e-3, atol=1e-3):
            return
        bias.copy_(kept)  # the last norm is not the final one after all


def _last_hidden(model: PreTrainedModel, input_ids: Ids, lengths: Lengths) -> Float[Tensor, "B H"]:
    """The trunk's output at the last real token of each row."""
    # All ones: the padding lies on the right, where a causal model never looks, and no mask means the fast kernel.
    trunk = model.base_model
    hidden = trunk(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).last_hidden_state
    return hidden[torch.arange(len(lengths), device=hidden.device), lengths.to(hidden.device) - 1]


def _pooled_scores(model: PreTrainedModel, input_ids: Ids, lengths: Lengths, token_type_ids: Ids | None) -> Scores:
    """The classifier's own score of each row. Attention is bidirectional, so padding must be masked."""
    mask = length_mask(lengths.to(input_ids.device), input_ids.shape[1])
    pad_id = model.config.pad_token_id
    types = {} if token_type_ids is None else {"token_type_ids": token_type_ids.to(input_ids.device)}
    # Exactly the padding token: RoBERTa finds positions by comparing with it.
    input_ids = input_ids if pad_id is None else torch.where(mask, input_ids, pad_id)
    return _wide(model(input_ids=input_ids, attention_mask=mask.long(), **types).logits[:, 0])


def _wide(scores: Tensor) -> Tensor:
    """At least float32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
