"""Names and what they stand for: environment ids, prompt sets, models, plug-ins and experiment files."""

from textenv.registry.ids import (
    all_or_nothing,
    changed,
    check_options,
    described,
    environment_spec,
    is_registered,
    register,
    registered_ids,
)
from textenv.registry.sources import (
    clear_cache,
    fresh_language_model,
    language_model,
    portable_name,
    prompt_set,
    register_language_model,
    register_prompts,
    register_reward_model,
    register_source,
    registered_sources,
    reward_model,
    vocabulary_size,
)

__all__ = [
    "all_or_nothing",
    "changed",
    "check_options",
    "clear_cache",
    "described",
    "environment_spec",
    "fresh_language_model",
    "is_registered",
    "language_model",
    "portable_name",
    "prompt_set",
    "register",
    "register_language_model",
    "register_prompts",
    "register_reward_model",
    "register_source",
    "registered_ids",
    "registered_sources",
    "reward_model",
    "vocabulary_size",
]
