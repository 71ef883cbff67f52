"""The options of a task, as plain values that are checked when an id is registered, before any model loads."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from textenv.settings import Count, NonNegative, Positive, PositiveInt, check_settings

KLSource = Literal["auto", "reported", "policy", "reference"]

Precision = Literal["float32", "bfloat16"]


class Loading(NamedTuple):
    """Where a model runs and how it computes: what loading takes besides its name."""

    device: str = "cpu"
    dtype: Precision = "float32"
    attn_implementation: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of a function that loads a model, with torch's dtype."""
        import torch

        return {**self._asdict(), "dtype": getattr(torch, self.dtype)}


REQUIRED = ("reference", "prompts", "reward_model", "max_prompt_tokens", "max_new_tokens")
"""Options that every task needs."""


class OptionError(ValueError, TypeError):
    """An unknown option, or a bad value of one.

    Also a TypeError, as for any unknown keyword argument: Stable-Baselines3's ``make_vec_env`` and TorchRL's ``GymEnv``
    first try other environments' arguments (``render_mode="rgb_array"``, ``frameskip``), and drop them after one.
    """


def hint(name: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'? "`` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The options of a text-generation task. Every value is JSON, so that a Gymnasium spec can be saved."""

    prompts: Any
    """Start states: a registered name, a JSONL file or a folder, ``{"dataset": …, "column": …}``,
    ``"module:function"``, or a list of strings or records."""
    reference: Annotated[str, "Register an object under a name, and give the name."]
    """The SFT model (name or path) that the KL is measured against; its tokenizer and LM head define the vocabulary."""
    reward_model: Annotated[str | Mapping[str, Any], "Register a callable: textenv.register_reward_model('mine', f)."]
    """Scores finished texts: a registered name, ``"module:callable"``, a sequence classifier (folder, hub id), or a
    JSON object (``reward_models.scorers.spec``)."""
    max_prompt_tokens: PositiveInt
    """Width of the prompt part of an observation, in tokens."""
    max_new_tokens: PositiveInt
    """Length budget of a response, in tokens, EOS included. Spending it ends the episode ("length")."""
    long_prompts: Literal["error", "drop", "cut"] = "error"
    """A prompt of more tokens is an error, is left out, or loses its beginning."""
    min_new_tokens: Count = 0
    """Ending tokens are masked until the response has this many tokens."""
    kl_coef: Annotated[NonNegative, "Use 0 to switch the KL off."] = 0.05
    """β: reward subtracted per nat of KL. Higher keeps the policy closer to the reference."""
    kl_source: KLSource = "auto"
    """Where the policy's log-probabilities come from; "reference" needs none and pays β·log π_ref instead of the KL."""
    temperature: Annotated[Positive, "1 leaves the distribution as it is."] = 1.0
    """Divides the logits of policy and reference alike; > 0."""
    stop_tokens: Sequence[str] = ()
    """Tokens besides EOS that end a response."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the reward when a response uses up its budget without ending."""
    gold: str | Mapping[str, Any] | None = None
    """A reward model reported as ``info["gold_score"]`` and never part of the reward: a world's own judge."""
    obs_mode: Literal["dict", "tokens"] = "dict"
    """"dict": ids, mask and lengths. "tokens": one ``Box`` of ids with −1 on padding."""
    device: str = "cpu"
    """Where the reference and the reward model run."""
    dtype: Precision = "float32"
    """Precision of the reference and the reward model: "float32" or "bfloat16" (half the memory). A policy in training
    computes in it too, over float32 weights; log-probabilities, KL and losses are always float32."""
    attn_implementation: str | None = None
    """"sdpa", "eager", "flash_attention_2", …: how all models compute attention; None leaves it to transformers."""
    score_batch_size: PositiveInt = 64
    """Rows in one forward pass of the reference."""

    @property
    def loading(self) -> Loading:
        return Loading(self.device, self.dtype, self.attn_implementation)

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def check_names(cls, options: Iterable[str]) -> None:
        """Refuse an option that does not exist, and suggest the closest one."""
        names = cls.option_names()
        for name in options:
            if name not in names:
                rule = f"an option must be one that the environment has, got {name!r}"
                known = f"{hint(name, names)}Options: {', '.join(names)}."
                raise OptionError(f"{rule}: unexpected keyword argument {name!r}. {known}")

    @classmethod
    def checked(cls, **options: Any) -> "TaskConfig":
        """The config of ``options``, with errors that name the option and the remedy."""
        cls.check_names(options)
        for name in REQUIRED:
            if options.get(name) is None:
                use = "the KL and the vocabulary come from it" if name == "reference" else "a task needs it"
                how = f"Pass {name}=... to gym.make, or --{name.replace('_', '-')} to a command."
                raise ValueError(f"{name} must be given, got None: {use}. {how}")
        return cls(**options)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.min_new_tokens > self.max_new_tokens:
            rule = f"min_new_tokens must be max_new_tokens ({self.max_new_tokens}) or less"
            raise ValueError(f"{rule}, got {self.min_new_tokens}. Lower it.")
