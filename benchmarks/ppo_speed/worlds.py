"""The models and prompts that both sides read: GPT-2 with random weights, and SmolLM2-135M."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from textenv.data.packaged import packaged_model
from textenv.lm import load_language_model
from textenv.lm.load import wrap_language_model

PROMPT, RESPONSE, EPISODES = 16, 32, 64
SIZES = {
    "gpt2-4x128": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024},
    "gpt2-6x384": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 8192},
}
NAMES = (*SIZES, "smollm2-135m")
MEAN_LENGTH = 14.0
"""Tokens of a response of at most 32 at natural lengths."""


class World(NamedTuple):
    reference: str
    """Folder of the language model."""
    reward: str
    """Folder of a reward model of the same size, with a random head."""
    prompts: list[str]
    pad_token: str
    """A token that never occurs in prompts, for TRL."""
    stop: str
    """The token that ends responses of natural length."""
    prompt: int
    response: int
    """Most tokens of a prompt and of a response."""


def make_world(name: str, folder: Path, *, natural: bool = False) -> World:
    """The world of one of ``NAMES``, as folders."""
    if name not in SIZES:
        return _smollm2(folder)
    make_models(folder, SIZES[name], mean_length=MEAN_LENGTH if natural else None)
    prompts = random_prompts(SIZES[name]["vocab_size"], EPISODES, PROMPT)
    return World(str(folder / "reference"), str(folder / "reward"), prompts, "w1", "<eos>", PROMPT, RESPONSE)


def random_prompts(vocabulary: int, count: int, tokens: int) -> list[str]:
    ids = torch.randint(2, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def make_models(folder: Path, sizes: dict[str, int], *, context: int = 64, mean_length: float | None = None) -> None:
    """A random reference and a random reward model of the same size, as folders.

    With ``mean_length``, every token is the last one with the probability that makes responses so long on average.
    """
    config = AutoConfig.for_model("gpt2", n_positions=context, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language_model = AutoModelForCausalLM.from_config(config).eval()
        config.num_labels, config.pad_token_id = 1, 1
        classifier = AutoModelForSequenceClassification.from_config(config)
        if mean_length is not None:
            _favour_end(language_model, end_probability(mean_length, RESPONSE))
    words = _tokenizer(sizes["vocab_size"])
    wrap_language_model(language_model, words).save_pretrained(folder / "reference")
    words.pad_token = "w1"
    classifier.save_pretrained(folder / "reward")
    words.save_pretrained(folder / "reward")


def end_probability(mean: float, limit: int) -> float:
    """The probability q of an end at each token with ``(1 − (1 − q)^limit) / q = mean``, by bisection."""
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if (1 - (1 - middle) ** limit) / middle > mean else (low, middle)
    return low


@torch.no_grad()
def _favour_end(model: Any, probability: float) -> None:
    """Move the last hidden states of a GPT-2 towards token 0 until it has this probability on average."""
    ids = torch.randint(2, model.config.vocab_size, (16, 32))
    hidden = model.transformer(ids).last_hidden_state.flatten(0, 1)
    weight = model.lm_head.weight
    direction = weight[0] / weight[0].square().sum()
    low, high = 0.0, 30.0
    for _ in range(30):
        middle = (low + high) / 2
        mean = ((hidden + middle * direction) @ weight.T).softmax(-1)[:, 0].mean()
        low, high = (middle, high) if mean < probability else (low, middle)
    model.transformer.ln_f.bias += low * direction


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


PLACES = ("a library", "a small shop", "a harbour", "a school", "a railway station", "a garden", "a museum", "a farm")
QUESTIONS = (
    "what people do there in the morning, before the doors open, and who is the first to arrive",
    "why somebody who has never been there should spend a long and rainy Sunday in it",
)


def _smollm2(folder: Path) -> World:
    """SmolLM2-135M-Instruct from its wheel; a sentence is a response of natural length."""
    model = load_language_model(packaged_model())
    if not (folder / "reward").exists():
        model.save_pretrained(folder / "reference")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            reward: Any = AutoModelForSequenceClassification.from_pretrained(
                folder / "reference", num_labels=1, dtype=torch.float32
            )
        reward.save_pretrained(folder / "reward")
        model.tokenizer.save_pretrained(folder / "reward")
    ask = "Think of {place} in a town by the sea. Describe in a few plain words {question}. It is"
    prompts: list[str] = [ask.format(place=place, question=question) for place in PLACES for question in QUESTIONS]
    return World(str(folder / "reference"), str(folder / "reward"), prompts, "<file_sep>", ".", 48, 24)
