"""Models and a suite that several tests of the benchmark measure."""

import numpy as np

from reward_models.benchmark import BenchmarkConfig

CONFIG = BenchmarkConfig(limit=160, pool=8, resamples=300, annotators=2)


class Callable:
    """A reward model with a declared unit."""

    def __init__(self, function, score_unit):
        self.function, self.score_unit = function, score_unit

    def __call__(self, prompts, completions, **columns):
        return self.function(prompts, completions, **columns)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def noise(seed=0):
    """A fixed random score per text."""
    return lambda prompts, completions, **columns: [
        np.random.default_rng([seed, *map(ord, prompt + text)]).normal()
        for prompt, text in zip(prompts, completions, strict=True)
    ]
