"""The embedded world of ``textenv/Assistant-v0``: prompts, demonstrations, a gold judge and simulated annotators.

It works without the environment too: sample prompts, answers and rankings, score any text, compute Bayes limits.
"""

from typing import TYPE_CHECKING

from textenv.tasks.assistant.annotators import ANNOTATOR_TEMPERATURE, rank, sample_rankings
from textenv.tasks.assistant.corpus import answer_distribution, conditional_entropy, sample_answer, sample_corpus
from textenv.tasks.assistant.gold import Judgement, gold_scores, judge, rates
from textenv.tasks.assistant.phrases import VOCABULARY
from textenv.tasks.assistant.questions import (
    Prompt,
    parse_prompt,
    prompts,
    sample_prompts,
    test_prompts,
    train_prompts,
    validation_prompts,
)
from textenv.tasks.assistant.world import MAX_NEW_TOKENS, MAX_PROMPT_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "ANNOTATOR_TEMPERATURE",
    "MAX_NEW_TOKENS",
    "MAX_PROMPT_TOKENS",
    "VOCABULARY",
    "Judgement",
    "Prompt",
    "answer_distribution",
    "build_tokenizer",
    "conditional_entropy",
    "gold_scores",
    "judge",
    "parse_prompt",
    "prompts",
    "rank",
    "rates",
    "sample_answer",
    "sample_corpus",
    "sample_prompts",
    "sample_rankings",
    "test_prompts",
    "train_prompts",
    "validation_prompts",
]


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The word-level tokenizer over ``VOCABULARY``; imports transformers."""
    from textenv.lm.load import word_level_tokenizer

    return word_level_tokenizer(VOCABULARY)
