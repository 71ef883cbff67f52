"""How fast does a reward model score texts of mixed lengths, beside transformers' own pipeline?

Both sides run in one process, in turn, on the same model, the same texts and one thread, tokenising included:

* **pipeline**: ``transformers.pipeline("text-classification", batch_size=32)`` on prompt, completion and EOS as one
  text, in the order given; and once more with the texts sorted by length beforehand;
* **ours**: ``TransformerRewardModel`` with batches of 32.

Times are processor time, medians. Lengths are log-uniform. A hook on the trunk counts rows, real tokens and padding.
The scores of both sides must agree.

Command: ``python -m benchmarks.rm_throughput`` (about five minutes on one core).
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tyro
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline
from transformers.utils import logging as hf_logging

from benchmarks.record import write_result
from reward_models.scorers.transformer import TransformerRewardModel
from textenv.lm.load import word_level_tokenizer

SIZES = {
    "gpt2-4x128": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024},
    "gpt2-6x256": {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 4096},
}
BATCH, SHORTEST, LONGEST = 32, 8, 256
"""Texts per batch, and tokens per text, EOS included."""


class Counter:
    """Counts what passes a trunk."""

    def __init__(self, trunk: torch.nn.Module, real_tokens: int) -> None:
        self.real_tokens, self.rows, self.tokens = real_tokens, 0, 0
        self._handle = trunk.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        self.rows += ids.shape[0]
        self.tokens += ids.numel()

    def close(self) -> dict[str, float]:
        self._handle.remove()
        return {"rows": self.rows, "tokens": self.tokens, "padding_share": 1 - self.real_tokens / self.tokens}


def make_model(sizes: dict[str, int]) -> TransformerRewardModel:
    """A random classifier with a padding token of its own, on the right: the pipeline needs both for right scores."""
    words = word_level_tokenizer(("<eos>", "<pad>", *(f"w{i}" for i in range(2, sizes["vocab_size"]))))
    words.pad_token, words.padding_side = "<pad>", "right"
    config = AutoConfig.for_model("gpt2", n_positions=LONGEST, bos_token_id=0, eos_token_id=0, pad_token_id=1, **sizes)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    return TransformerRewardModel(model, words, batch_size=BATCH)


def make_texts(count: int, vocabulary: int) -> tuple[list[str], list[str], int]:
    """Prompts and completions, half of the tokens each, and all tokens together, EOS included."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(int)
    prompts, completions = [], []
    for length in lengths - 1:
        words = [f"w{i}" for i in rng.integers(2, vocabulary, length)]
        prompts.append(" ".join(words[: length // 2]))
        completions.append(" ".join(words[length // 2 :]))
    return prompts, completions, int(lengths.sum())


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of this process, which on one thread is the time that it would take alone on the machine."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(sizes: dict[str, int], count: int, repeats: int) -> dict[str, Any]:
    """Median tokens a second of each side, their ratio, and what the trunk was given."""
    model = make_model(sizes)
    prompts, completions, real = make_texts(count, sizes["vocab_size"])
    joined = [f"{prompt} {completion} <eos>" for prompt, completion in zip(prompts, completions, strict=True)]
    by_length = sorted(joined, key=lambda text: len(text.split()))
    tokenizer: Any = model.tokenizer
    pipe: Any = pipeline("text-classification", model=model.model, tokenizer=tokenizer, device="cpu", batch_size=BATCH)

    def ask_pipeline(texts: list[str]) -> list[float]:
        return [answer["score"] for answer in pipe(texts, function_to_apply="none")]

    sides: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: model(prompts, completions),
        "pipeline": lambda: ask_pipeline(joined),
        "pipeline_sorted": lambda: ask_pipeline(by_length),
    }
    passed: dict[str, dict[str, float]] = {}
    scores: dict[str, list[float]] = {}
    for name, side in sides.items():  # the warm-up: counted, not timed
        counter = Counter(model.model.base_model, real)
        scores[name] = side()
        passed[name] = counter.close()
    np.testing.assert_allclose(scores["ours"], scores["pipeline"], atol=1e-4)
    runs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(seconds(side))
    median = {name: statistics.median(times) for name, times in runs.items()}
    return {
        "texts": count,
        "real_tokens": real,
        "tokens_per_second": {name: real / time for name, time in median.items()},
        "trunk": passed,
        "ratio": median["pipeline"] / median["ours"],
        "ratio_to_sorted": median["pipeline_sorted"] / median["ours"],
    }


def main(texts: int = 1024, repeats: int = 5) -> None:
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    figures: dict[str, Any] = {"batch_size": BATCH, "lengths": [SHORTEST, LONGEST], "runs": repeats}
    for name, sizes in SIZES.items():
        found = figures[name] = measure(sizes, texts, repeats)
        speed, trunk = found["tokens_per_second"], found["trunk"]["ours"]
        print(f"{name}: ours {speed['ours']:,.0f} tokens/s, pipeline {speed['pipeline']:,.0f}: {found['ratio']:.2f} ×")
        print(f"  a pipeline of sorted texts {speed['pipeline_sorted']:,.0f}: {found['ratio_to_sorted']:.2f} ×")
        print(f"  ours: {trunk['rows']} rows for {found['texts']} texts, {100 * trunk['padding_share']:.1f} % padding")
    print(write_result("rm_throughput", figures))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
