"""Heads on a transformer's hidden states that say one number per position."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu


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
