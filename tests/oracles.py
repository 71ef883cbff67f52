"""What plain transformers says of one row: no padding, no batch, no cache, softmax in float64."""

import torch
from torch import Tensor

from textenv.lm import TokenRule


@torch.no_grad()
def alone(model, prompt: list[int], response: list[int], rule: TokenRule) -> Tensor:
    """Log-probability of each response token."""
    ids = torch.tensor([prompt + response])
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double() / rule.temperature
    out = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1].clone()
        if t < rule.min_new_tokens:
            row[list(rule.stop_ids)] = -torch.inf
        out.append(torch.log_softmax(row, -1)[token])
    return torch.stack(out).float()


@torch.no_grad()
def hidden_alone(model, prompt: list[int], response: list[int]) -> Tensor:
    """Hidden state before each response token, as it enters the LM head."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.tensor([prompt + response]))
    hook.remove()
    return seen[0][0, len(prompt) - 1 : -1]
