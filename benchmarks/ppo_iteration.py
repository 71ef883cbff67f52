"""How close is one PPO iteration to the minimum of work that it has to do?

Both sides run in one process, alternately, on the same models and token counts:

* **floor**: a plain cached decoding loop, one forward of the reference and one of the reward model over prompt and
  response, and 16 bare forward + backward + Adam steps over minibatches of the same rows. No values, no advantages, no
  KL, no text, no environment.
* **ours**: ``PPO.collect`` and ``PPO.update`` on a registered environment with a learned reward model.

Every episode spends its whole budget (EOS is masked), so both sides handle exactly the same tokens.

Command: ``python -m benchmarks.ppo_iteration`` (about two minutes on two cores).
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from agents.ppo import PPO, PPOConfig
from benchmarks.record import write_result
from textenv import registry
from textenv.lm import disable_dropout
from textenv.lm.load import wrap_language_model
from textenv.vector import make_vec

PROMPT, RESPONSE, EPISODES, EPOCHS, MINIBATCHES = 16, 32, 64, 4, 4
SIZES = {
    "gpt2-4x128": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024},
    "gpt2-6x384": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 8192},
}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def make_models(folder: Path, sizes: dict[str, int]) -> None:
    """A random reference and a random reward model of the same size, as folders."""
    config = AutoConfig.for_model("gpt2", n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language_model = AutoModelForCausalLM.from_config(config)
        config.num_labels, config.pad_token_id = 1, 1
        classifier = AutoModelForSequenceClassification.from_config(config)
    words = tokenizer(sizes["vocab_size"])
    wrap_language_model(language_model, words).save_pretrained(folder / "reference")
    words.pad_token = "w1"
    classifier.save_pretrained(folder / "reward")
    words.save_pretrained(folder / "reward")


class Floor:
    """The minimum of work, on plain transformers."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        def load(kind: Any, name: str) -> Any:
            model = kind.from_pretrained(folder / name, dtype=torch.float32)
            disable_dropout(model)
            return model

        self.policy = load(AutoModelForCausalLM, "reference")
        self.reference = load(AutoModelForCausalLM, "reference")
        self.reward = load(AutoModelForSequenceClassification, "reward")
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-5, fused=True)
        self.prompts = torch.randint(2, vocabulary, (EPISODES, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decode(self) -> torch.Tensor:
        ids, cache, tokens = self.prompts, None, self.prompts
        for _ in range(RESPONSE):
            out = self.policy(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
            ids = torch.cat([ids, tokens], 1)
        return ids

    @torch.no_grad()
    def score(self, ids: torch.Tensor) -> None:
        self.reference(input_ids=ids, use_cache=False, logits_to_keep=RESPONSE + 1).logits.log_softmax(-1)
        self.reward(input_ids=ids, use_cache=False)

    def train(self, ids: torch.Tensor) -> None:
        for _ in range(EPOCHS):
            for rows in torch.randperm(EPISODES).chunk(MINIBATCHES):
                batch = ids[rows]
                logits = self.policy(input_ids=batch, use_cache=False, logits_to_keep=RESPONSE + 1).logits[:, :-1]
                logprobs = logits.log_softmax(-1).gather(-1, batch[:, -RESPONSE:, None])
                self.optimizer.zero_grad(set_to_none=True)
                (-logprobs.mean()).backward()
                self.optimizer.step()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Seconds by phase of both sides, run alternately ``repeats`` times; medians and the median ratio."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder, SIZES[name])
        vocabulary = SIZES[name]["vocab_size"]
        floor = Floor(folder, vocabulary)
        prompts = [" ".join(f"w{i}" for i in row) for row in floor.prompts.tolist()]
        options = {"reference": str(folder / "reference"), "reward_model": str(folder / "reward")}
        widths = {"max_prompt_tokens": PROMPT, "max_new_tokens": RESPONSE, "min_new_tokens": RESPONSE}
        env = make_vec("textenv/Text-v0", EPISODES, prompts=prompts, **options, **widths)
        config = PPOConfig(batch_size=EPISODES, epochs=EPOCHS, minibatches=MINIBATCHES, learning_rate=1e-5)
        agent = PPO(env, config)
        rows: list[dict[str, float]] = []
        for _ in range(repeats + 1):
            floor_decode, ids = timed(floor.decode)
            floor_score, _ = timed(lambda ids=ids: floor.score(ids))
            floor_train, _ = timed(lambda ids=ids: floor.train(ids))
            collect, rollout = timed(agent.collect)
            update, _ = timed(lambda rollout=rollout: agent.update(rollout))
            assert (rollout.tokens.response_lengths == RESPONSE).all()
            rows.append(
                {
                    "floor_decode": floor_decode,
                    "floor_score": floor_score,
                    "floor_train": floor_train,
                    "floor": floor_decode + floor_score + floor_train,
                    "collect": collect,
                    "update": update,
                    "ours": collect + update,
                    "ratio": (collect + update) / (floor_decode + floor_score + floor_train),
                }
            )
    rows = rows[1:]  # the first is a warm-up
    registry.clear_cache()
    return {
        "median": {key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "ratio_min_max": [min(row["ratio"] for row in rows), max(row["ratio"] for row in rows)],
        "runs": repeats,
    }


def main(repeats: int = 5, sizes: tuple[Literal[tuple(SIZES)], ...] = tuple(SIZES)) -> None:
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = {}
    for name in sizes:
        results[name] = measure(name, repeats)
        print(f"{name}: {EPISODES} × ({PROMPT} + {RESPONSE}) tokens, {EPOCHS} epochs × {MINIBATCHES} minibatches")
        for key, seconds in results[name]["median"].items():
            print(f"  {key:13s} {seconds:7.3f}" + ("" if key == "ratio" else " s"))
    print(write_result("ppo_iteration", {"threads": torch.get_num_threads(), "results": results}))
    assert np.isfinite([r["median"]["ratio"] for r in results.values()]).all()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
