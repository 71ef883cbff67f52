"""How fast are responses drawn, with log-probabilities and values, beside tokens alone from transformers' ``generate``?

The same weights, prompts and lengths, 64 prompts at once, one after the other in turns; real tokens, with the one that
ends a response, a second of the processor.

Command: ``python -m benchmarks.ppo_speed.rollout`` (four minutes on one core).
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks.ppo_speed.worlds import EPISODES, MEAN_LENGTH, PROMPT, RESPONSE, SIZES, make_models
from benchmarks.record import write_result
from textenv.lm import TokenRule, ValueHead, load_language_model, sample_responses


def ours(folder: Path, prompts: torch.Tensor, *, natural: bool) -> Callable[[], int]:
    """Draws a batch; returns its real tokens."""
    lm = load_language_model(folder)
    head = ValueHead(lm.hidden_size, seed=0)
    rule = TokenRule(stop_ids=(0,), min_new_tokens=0 if natural else RESPONSE)
    options: dict[str, Any] = {"max_new_tokens": RESPONSE, "rule": rule, "pad_id": 0, "value_head": head}
    lengths = torch.full((len(prompts),), PROMPT)
    return lambda: int(sample_responses(lm.model, prompts, lengths, **options).response_lengths.sum())


def generate(folder: Path, prompts: torch.Tensor, *, natural: bool) -> Callable[[], int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    options = {"max_new_tokens": RESPONSE, "min_new_tokens": 0 if natural else RESPONSE, "top_k": 0}

    def draw() -> int:
        mask = torch.ones_like(prompts)
        drawn = model.generate(prompts, attention_mask=mask, do_sample=True, pad_token_id=1, eos_token_id=0, **options)
        response = drawn[:, PROMPT:]
        ended = response == 0
        before = (ended.cumsum(1) - ended.int()) == 0  # up to the first end, and it
        return int(before.sum())

    return draw


def compare(name: str, *, natural: bool, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder, SIZES[name], mean_length=MEAN_LENGTH if natural else None)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(2, SIZES[name]["vocab_size"], (EPISODES, PROMPT), generator=generator)
        makers = {"generate": generate, "ours": ours}
        sides = {side: make(folder / "reference", prompts, natural=natural) for side, make in makers.items()}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(runs + 1):
            for side, draw in sides.items():
                start = time.process_time()
                tokens = draw()
                rates[side].append(tokens / (time.process_time() - start))
    pairs = zip(rates["ours"][1:], rates["generate"][1:], strict=True)
    figures: dict[str, Any] = {side: statistics.median(found[1:]) for side, found in rates.items()}
    return figures | {"ratio": statistics.median(mine / theirs for mine, theirs in pairs)}


def main(runs: int = 7) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    cells = {}
    for name in SIZES:
        for natural in (False, True):
            cell = cells[f"{name}-{'natural' if natural else 'full'}"] = compare(name, natural=natural, runs=runs)
            print(name, "natural" if natural else "full", {key: round(value, 2) for key, value in cell.items()})
    print(write_result("ppo_speed.rollout", {"runs": runs, "tokens_per_s": cells}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
