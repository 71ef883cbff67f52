"""How much faster is supervised fine-tuning without padding, where examples differ in length?

Three copies of one model are trained on the same batches in one process, each step on all of them in turn:

* **packed**: the step of ``agents.sft``, whose rows stand behind one another (``textenv.lm.packing``);
* **padded**: the same step with packing switched off, rows padded to the longest of the batch;
* **transformers**: ``model(input_ids, attention_mask, labels).loss`` on the padded rows, as a trainer of labels has it.

Lengths are ``Beta(1, 2)`` shares of the longest example: their mean is a third of it. Batches are drawn at random, and
once more from examples of similar length, as ``train_sft`` draws them. The losses of all sides must agree at every
step. Times are processor time on one thread.

Command: ``python -m benchmarks.sft_packing`` (about six minutes on one core).
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from agents.sft import summed_nll
from benchmarks.record import write_result
from textenv.lm import Responses, disable_dropout, packing, rows
from textenv.lm.kernels.layers import speed_up
from textenv.lm.load import fuse_activations
from textenv.stats import mean_ci95
from textenv.training.batches import Ragged, epoch_windows

LONGEST, PROMPT_SHARE = 256, 0.25
SIZES = {
    "gpt2": {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": LONGEST},
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": LONGEST,
    },
}
VOCABULARY = 4096
Loss = Callable[[Any, Responses], Tensor]


def make_model(family: str) -> nn.Module:
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, pad_token_id=0, **SIZES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    fuse_activations(model)
    speed_up(model)
    return model


class Examples:
    """Random prompts and completions of mixed lengths."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        total = np.ceil(rng.beta(1, 2, count) * LONGEST).clip(4).astype(int)
        heads = (total * PROMPT_SHARE).astype(int).clip(1)
        self.prompts = Ragged([rng.integers(1, VOCABULARY, head).tolist() for head in heads])
        self.responses = Ragged([rng.integers(1, VOCABULARY, size).tolist() for size in total - heads])
        self.lengths = self.prompts.lengths + self.responses.lengths

    def batches(self, size: int, *, similar: bool, seed: int) -> Iterator[Responses]:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.lengths)))
        drawn = epoch_windows(self.lengths, size, seed, 0) if similar else order.split(size)
        for index in drawn:
            yield Responses(*self.prompts.padded(index, left=True), *self.responses.padded(index))


def packed_loss(model: Any, batch: Responses) -> Tensor:
    return summed_nll(model, batch) / batch.response_lengths.sum()


def padded_loss(model: Any, batch: Responses) -> Tensor:
    with mock.patch.object(packing, "can_pack", return_value=False):
        return packed_loss(model, batch)


def transformers_loss(model: Any, batch: Responses) -> Tensor:
    ids, column = rows(batch).input_ids, torch.arange(int(batch.total_lengths.max()))
    real = column < batch.total_lengths[:, None]
    labels = ids.masked_fill(~real | (column < batch.prompt_lengths[:, None]), -100)
    return model(input_ids=ids, attention_mask=real.long(), labels=labels, use_cache=False).loss


SIDES: dict[str, Loss] = {"packed": packed_loss, "padded": padded_loss, "transformers": transformers_loss}


class Side:
    """One copy of the model with its optimizer."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = copy.deepcopy(model), loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, batch: Responses) -> tuple[float, float]:
        """One optimizer step → ``(loss, seconds of processor time)``."""
        start = time.process_time()
        loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), time.process_time() - start


def measure(family: str, *, similar: bool, steps: int, size: int, seed: int) -> dict[str, Any]:
    """Real tokens a second of each side, and how their losses differ."""
    model, examples = make_model(family), Examples(50 * size, seed)
    sides = {name: Side(model, loss) for name, loss in SIDES.items()}
    seconds, difference, tokens, places = dict.fromkeys(SIDES, 0.0), 0.0, 0, 0
    for number, batch in enumerate(itertools.islice(examples.batches(size, similar=similar, seed=seed), steps + 1)):
        found = {name: side.step(batch) for name, side in sides.items()}
        losses = [loss for loss, _ in found.values()]
        difference = max(difference, max(losses) - min(losses))
        if number == 0:
            continue  # the warm-up
        tokens += int(batch.total_lengths.sum())
        places += len(batch.total_lengths) * int(batch.total_lengths.max())
        for name, (_, spent) in found.items():
            seconds[name] += spent
    assert difference < 1e-4, f"losses must be equal to 1e-4, got {difference:.1e} apart"
    return {
        "tokens_per_second": {name: tokens / spent for name, spent in seconds.items()},
        "padding_share": 1 - tokens / places,
        "mean_share_of_longest": float(examples.lengths.float().mean() / LONGEST),
        "greatest_loss_difference": difference,
    }


def main(steps: int = 4, size: int = 32, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"batch_size": size, "longest": LONGEST, "steps": steps, "seeds": seeds}
    for family in SIZES:
        for similar in (False, True):
            runs = [measure(family, similar=similar, steps=steps, size=size, seed=seed) for seed in seeds]
            speeds = [run["tokens_per_second"] for run in runs]
            ratios = {
                other: mean_ci95([speed["packed"] / speed[other] for speed in speeds])._asdict()
                for other in ("padded", "transformers")
            }
            name = f"{family}, {'similar' if similar else 'mixed'} lengths"
            figures[name] = {"ratio": ratios, "runs": runs}
            said = ", ".join(f"{ratio['mean']:.2f} ± {ratio['ci95']:.2f} × {other}" for other, ratio in ratios.items())
            print(f"{name} ({100 * runs[0]['padding_share']:.0f} % padding): packed is {said}", flush=True)
    print(write_result("sft_packing", figures))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
