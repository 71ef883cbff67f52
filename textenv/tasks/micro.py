"""The exact world: small enough to enumerate every response, so that the best policy is known.

Eight tokens (``<eos>`` and the letters a … g), six prompts of 1 to 4 letters, responses of at most 4 tokens: 2,801
strings per prompt. :mod:`textenv.tasks.exact` enumerates them.

A prompt asks for two letters: those that follow its first and its last letter in the alphabet (g is followed by a).
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from textenv.lm import LanguageModel

LETTERS = "abcdefg"
PROMPTS = ("a", "c e", "e b", "f d a", "b g e c", "d a c f")

WANTED_SCORE = 1.6
"""Limit of the score for ever more wanted letters; the first one earns half of it."""
REPETITION_COST = 0.5
"""Cost of every letter that the response has used before."""

_SEED = 5
_SPREAD = 0.15  # standard deviation of the weights: far from uniform, but no token is too rare


def prompts() -> list[str]:
    """The six start states, of 1, 2, 2, 3, 4 and 4 tokens."""
    return list(PROMPTS)


@functools.lru_cache(maxsize=1024)
def wanted_letters(prompt: str) -> frozenset[str]:
    """The letters that follow the first and the last letter of a prompt; none for a prompt without letters."""
    letters = [word for word in prompt.split() if word in tuple(LETTERS)]
    return frozenset(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in (*letters[:1], *letters[-1:]))


def gold_scores(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """``WANTED_SCORE · (1 − 2^−wanted) − REPETITION_COST · repeated`` for each completion.

    ``wanted`` counts the words that the prompt asks for: each is worth half as much as the one before. ``repeated``
    counts the words used before: ``words − distinct words``. A reward model that counts words misses that the score
    flattens and then falls, so optimising it too far lowers the true score. Any text has a score; an empty one earns 0.
    """
    return [_gold(prompt, completion.split()) for prompt, completion in zip(prompts, completions, strict=True)]


def _gold(prompt: str, words: list[str]) -> float:
    asked = wanted_letters(prompt)
    wanted = sum(word in asked for word in words)
    repeated = len(words) - len(set(words))
    return WANTED_SCORE * (1.0 - 0.5**wanted) - REPETITION_COST * repeated


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token per letter. The padding token is ``<eos>`` itself, as in many real models."""
    from textenv.lm.load import word_level_tokenizer

    return word_level_tokenizer(("<eos>", *LETTERS))


def reference() -> "LanguageModel":
    """A random GPT-2 (2 layers × 64), the same on every call. No global random state is touched."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from textenv.lm.load import wrap_language_model

    words = tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(words), "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(**sizes, **special, activation_function="gelu_pytorch_tanh")
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which the next lines replace
        model = GPT2LMHeadModel(config)
    rng = np.random.default_rng(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # biases stay 0 and layer-norm scales 1
                parameter.copy_(torch.from_numpy(rng.normal(0.0, _SPREAD, tuple(parameter.shape))))
    return wrap_language_model(model, words, name="micro-reference")
