"""What does one gradient for a tied embedding and LM head save (``textenv.lm.kernels.tied``)?

A Llama of SmolLM2-135M's sizes with random weights: one pass over 250 tokens, logits at 96 of them, and the backward
pass, with PyTorch's gradient and with ours, in turns in one process. Losses are the same; seconds are the processor's.

Command: ``python -m benchmarks.ppo_speed.tied_gradient`` (two minutes on one core).
"""

import statistics
import time
from typing import Any

import torch
import tyro
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.record import write_result
from textenv.lm.heads import run
from textenv.lm.kernels.tied import TiedEmbedding, tie

SIZES: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SIZES |= {"num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True}
TOKENS, POSITIONS = 250, 96
KINDS: dict[str, type[nn.Module]] = {"pytorch": nn.Embedding, "ours": TiedEmbedding}


def tied_model(blocks: int, **sizes: int) -> PreTrainedModel:
    """A Llama whose embedding is its LM head, with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_hidden_layers=blocks, **(SIZES | sizes))
    ).eval()
    tie(model)
    return model


def seconds(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """``(seconds, loss)`` of one pass forward and backward."""
    model.get_input_embeddings().__class__ = KINDS[kind]
    model.zero_grad(set_to_none=True)
    ids = torch.arange(TOKENS)[None] % model.config.vocab_size
    start = time.process_time()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits, _ = run(model, ids, use_cache=False)[0].at((0, slice(POSITIONS)))
    loss = -logits.log_softmax(-1)[:, 3].mean()
    loss.backward()
    return time.process_time() - start, loss.item()


def measure(model: PreTrainedModel, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Medians of ``runs``, after one that does not count, and the median and quartiles of their ratio."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(runs + 1):
        losses = []
        for kind, times in found.items():
            taken, loss = seconds(model, kind, dtype)
            times.append(taken)
            losses.append(loss)
        if abs(losses[0] - losses[1]) > 1e-2 * abs(losses[0]):
            raise RuntimeError(f"both gradients must belong to one loss, got {losses}.")
    ratios = [theirs / mine for theirs, mine in zip(found["pytorch"][1:], found["ours"][1:], strict=True)]
    return {
        "seconds": {kind: statistics.median(times[1:]) for kind, times in found.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def main(runs: int = 15, blocks: int = 30) -> None:
    torch.set_num_threads(1)
    figures = {}
    for name, count in {"whole model": blocks, "one block": 1}.items():
        model = tied_model(count)
        for dtype in (torch.float32, torch.bfloat16):
            row = figures[f"{name}, {str(dtype).removeprefix('torch.')}"] = measure(model, dtype, runs)
            print(f"{name}, {dtype}: {row['ratio']:.2f} × ({row['ratio_quartiles']})", row["seconds"])
    print(write_result("ppo_speed.tied_gradient", {"runs": runs, "figures": figures}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
