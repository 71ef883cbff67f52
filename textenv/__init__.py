"""RLHF as ordinary reinforcement learning: text generation as a Gymnasium environment.

Importing this package registers the environment ids; it loads neither torch nor transformers.
"""

from pathlib import Path

from textenv.registry import (
    fresh_language_model,
    language_model,
    prompt_set,
    register,
    register_language_model,
    register_prompts,
    register_reward_model,
    registered_ids,
    reward_model,
)
from textenv.registry.experiment import load_experiment
from textenv.registry.plugins import load_plugins

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "fresh_language_model",
    "language_model",
    "load_experiment",
    "prompt_set",
    "register",
    "register_language_model",
    "register_prompts",
    "register_reward_model",
    "registered_ids",
    "reward_model",
]

_ASSETS = Path(__file__).parent / "assets"

register_prompts("micro", "textenv.tasks.micro:prompts")
register_language_model("micro-reference", "textenv.tasks.micro:reference")
register_reward_model("micro-gold", "textenv.tasks.micro:gold_scores")
register(
    "textenv/Micro-v0",
    prompts="micro",
    reference="micro-reference",
    reward_model="micro-gold",
    gold="micro-gold",
    max_prompt_tokens=4,
    max_new_tokens=4,
    kl_coef=0.3,
    description="Exact world: small enough to enumerate, so the KL-regularised optimum is known.",
)

for _split in ("train", "validation", "test"):
    register_prompts(f"assistant-{_split}", f"textenv.tasks.assistant:{_split}_prompts")
register_language_model("assistant-sft", str(_ASSETS / "assistant-sft"))
register_reward_model("assistant-rm", str(_ASSETS / "assistant-rm"))
register_reward_model("assistant-gold", "textenv.tasks.assistant:gold_scores")
register(
    "textenv/Assistant-v0",
    prompts="assistant-train",
    reference="assistant-sft",
    reward_model="assistant-rm",
    gold="assistant-gold",
    max_prompt_tokens=19,
    max_new_tokens=24,
    kl_coef=0.2,
    description="Embedded world: a small assistant with a trained reward model and a gold judge.",
)

register(
    "textenv/Text-v0",
    prompts=None,
    reference=None,
    reward_model=None,
    max_prompt_tokens=64,
    max_new_tokens=64,
    description="Bring your own prompts, reference and reward model.",
)

load_plugins()
