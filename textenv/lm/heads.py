"""Scalar heads on a transformer's hidden states."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """One number per position, ``w · h + b``: a value function on a policy's trunk.

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
