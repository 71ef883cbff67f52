"""Heads on a transformer's hidden states: the LM head, run where it is asked, and those of one number per position."""

import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from textenv.lm.adapters import plain_model
from textenv.lm.kernels.tied import Link, linked, tied_logits


class ScalarHead(nn.Module):
    """``w · h + b``.

    Starts at exactly zero, so that the first advantages are the rewards themselves.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.zero_()

    def forward(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B"]:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


class ValueHead(nn.Module):
    """A value function with a hidden layer of four times the size of a hidden state. Starts at exactly zero too."""

    def __init__(self, hidden_size: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = nn.Linear(hidden_size, 4 * hidden_size)
        self.output = ScalarHead(4 * hidden_size)

    def forward(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B"]:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.output(gelu(self.features(hidden.to(self.features.weight.dtype))))


def output_embeddings(model: PreTrainedModel) -> nn.Linear:
    head = plain_model(model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the model must have a linear LM head, got {type(head).__name__}. Use a causal LM.")
    return head


_plain_head: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are exactly ``lm_head(last_hidden_state)``, capped if the config says so: measured once per model,
    on two tokens.

    False for families that scale their logits; those take a slower path through the model itself. True for a trunk
    without an LM head, which has no logits.
    """
    if model.get_output_embeddings() is None:
        return True
    if model not in _plain_head:
        # Without autocast, which in PyTorch 2.9 keeps the weights that are rounded here, without a gradient.
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            # Two different ones: the embedding of padding may be 0, and whatever multiplies its logits would go unseen.
            ids = torch.arange(2, device=model.device)[None]
            mask = torch.ones_like(ids)
            asked = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            own = _head_logits(model, hidden)
        _plain_head[model] = asked.shape == own.shape and torch.equal(asked, own)
    return _plain_head[model]


def _head_logits(model: PreTrainedModel, hidden: Tensor, link: Link | None = None) -> Tensor:
    head = output_embeddings(model)
    if link is not None:
        logits = tied_logits(head.weight, hidden, link)
    else:
        logits = head(hidden.to(head.weight.dtype))  # Mamba's hidden states are float32 in any precision
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap  # Gemma 2


class Outputs:
    """One forward pass: hidden states of every column, and logits on demand."""

    def __init__(self, model: PreTrainedModel, hidden: Tensor, logits: Tensor | None) -> None:
        self._model, self.hidden, self._logits = model, hidden, logits
        link = linked(model)
        self._link = link if hidden.requires_grad else None

    def at(self, index: Any) -> tuple[Tensor, Tensor]:
        """``(logits [n, V], hidden [n, H])`` at the positions ``index`` of ``[B, S]``."""
        hidden = self.hidden[index]
        logits = _head_logits(self._model, hidden, self._link) if self._logits is None else self._logits[index]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), hidden


def run(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> tuple[Outputs, Any]:
    """Forward pass → ``(outputs, cache)``; the LM head runs only where :meth:`Outputs.at` asks for it."""
    model = plain_model(model)
    if has_plain_head(model):
        out = model.base_model(input_ids=input_ids, **kwargs)
        return Outputs(model, out.last_hidden_state, None), getattr(out, "past_key_values", None)
    out = model(input_ids=input_ids, output_hidden_states=True, **kwargs)
    return Outputs(model, out.hidden_states[-1], out.logits), getattr(out, "past_key_values", None)
