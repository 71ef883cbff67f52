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

register_language_model("smollm2-135m", "textenv.data.packaged:smollm2_135m")
register(
    "textenv/Text-v0",
    prompts=None,
    reference=None,
    reward_model=None,
    max_prompt_tokens=64,
    max_new_tokens=64,
    description="Bring your own prompts, reference and reward model.",
)

for _task, _splits in {
    "hh": ("train", "test"),
    "tldr": ("train", "validation", "test"),
    "imdb": ("train", "validation", "test"),
}.items():
    for _split in _splits:
        register_prompts(f"{_task}-{_split}", f"textenv.tasks.hub:{_task}_{_split}")
register(
    "textenv/HH-v0",
    prompts="hh-train",
    reference=None,
    reward_model=None,
    max_prompt_tokens=512,
    max_new_tokens=128,
    long_prompts="drop",
    kl_coef=0.001,
    description="Helpful and harmless dialogues from the hub (Bai et al. 2022); bring your own models.",
)
register(
    "textenv/TLDR-v0",
    prompts="tldr-train",
    reference="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
    reward_model="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
    max_prompt_tokens=512,
    max_new_tokens=53,
    long_prompts="drop",
    temperature=0.7,
    missing_eos_penalty=1.0,
    kl_coef=0.05,
    description="Summaries of Reddit posts, data and models from the hub (Stiennon et al. 2020; Huang et al. 2024).",
)
register(
    "textenv/IMDB-v0",
    prompts="imdb-train",
    reference="lvwerra/gpt2-imdb",
    reward_model={"classifier": "lvwerra/distilbert-imdb", "label": "POSITIVE"},
    max_prompt_tokens=64,
    max_new_tokens=48,
    long_prompts="cut",
    kl_coef=0.1,
    description="Film reviews to continue cheerfully, data and models from the hub (Ramamurthy et al. 2023).",
)

load_plugins()
