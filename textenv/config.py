"""What defines a task, as plain values: light enough to be checked when an id is registered, before any model loads."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

KLSource = Literal["auto", "reported", "policy", "reference"]

REQUIRED = ("reference", "prompts", "reward_model", "max_prompt_tokens", "max_new_tokens")
"""Options without which there is no task."""


class OptionError(ValueError, TypeError):
    """An option that the environment does not have, or a value of it.

    A TypeError too, which is Python's word for an unknown keyword argument: Stable-Baselines3's ``make_vec_env`` and
    TorchRL's ``GymEnv`` try arguments of other environments first (``render_mode="rgb_array"``, ``frameskip``), and go
    on without them after a TypeError.
    """


def hint(name: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'? "`` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What defines a text-generation task. Every value is JSON, so that a Gymnasium spec can be written down."""

    prompts: Any
    """Start states: a registered name, a JSONL file or a folder, ``{"dataset": …, "column": …}``,
    ``"module:function"``, or a list of strings or records."""
    reference: str
    """The SFT model (name or path) that the KL is measured against; its tokenizer and LM head define the vocabulary."""
    reward_model: str | Mapping[str, Any]
    """Scores finished texts: a registered name, ``"module:callable"``, a sequence classifier (folder, hub id), or a
    JSON object (``reward_models.scorers.spec``)."""
    max_prompt_tokens: int
    """Width of the prompt part of an observation, in tokens."""
    max_new_tokens: int
    """Length budget of a response, in tokens, EOS included. Spending it ends the episode ("length")."""
    min_new_tokens: int = 0
    """Ending tokens are masked before this many tokens."""
    kl_coef: float = 0.05
    """β: reward paid for each nat of KL. Higher holds the policy nearer to the reference."""
    kl_source: KLSource = "auto"
    """Who tells the policy's log-probabilities: "reported", "policy", "auto"; "reference" pays β·log π_ref instead."""
    temperature: float = 1.0
    """Of policy and reference alike; > 0."""
    stop_tokens: Sequence[str] = ()
    """More tokens that end a response, besides EOS."""
    missing_eos_penalty: float | None = None
    """Subtracted when a response spends its budget without ending."""
    gold: str | Mapping[str, Any] | None = None
    """A reward model reported as ``info["gold_score"]`` and never part of the reward: a world's own judge."""
    obs_mode: Literal["dict", "tokens"] = "dict"
    """"dict": ids, mask and lengths. "tokens": one ``Box`` of ids with −1 on padding."""
    device: str = "cpu"
    """Where the reference and the reward model run."""
    score_batch_size: int = 64
    """Rows in one forward pass of the reference."""

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def check_names(cls, options: Iterable[str]) -> None:
        """Refuse an option that does not exist; the error proposes the one that was meant."""
        names = cls.option_names()
        for name in options:
            if name not in names:
                raise OptionError(
                    f"an option must be one that the environment has, with option (={name!r}): "
                    f"unexpected keyword argument {name!r}. "
                    f"{hint(name, names)}Options: {', '.join(names)}."
                )

    @classmethod
    def checked(cls, **options: Any) -> "TaskConfig":
        """The config, with errors that name the option and the remedy instead of Python's own."""
        cls.check_names(options)
        for name in REQUIRED:
            if options.get(name) is None:
                use = "the KL and the vocabulary come from it" if name == "reference" else "a task needs it"
                raise ValueError(f"{name} must be given, with {name} (=None): {use}. Pass {name}=... to gym.make.")
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens", "min_new_tokens", "score_batch_size"):
            self._check_type(name, Integral, "a whole number")
        for name in ("kl_coef", "temperature", "missing_eos_penalty"):
            self._check_type(name, Real, "a number")
        self._check_type("reference", str, "a name")
        for name in ("reward_model", "gold"):
            self._check_type(name, (str, Mapping), "a name or a JSON object")
        for name in ("max_prompt_tokens", "max_new_tokens", "score_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, with {name} (={getattr(self, name)}). Raise it.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                "min_new_tokens must lie between 0 and max_new_tokens, with "
                f"min_new_tokens (={self.min_new_tokens}), max_new_tokens (={self.max_new_tokens})."
            )
        if not (math.isfinite(self.kl_coef) and self.kl_coef >= 0):
            raise ValueError(
                f"kl_coef must be finite and ≥ 0, with kl_coef (={self.kl_coef}). Use 0 for no KL penalty."
            )
        if self.kl_source not in get_args(KLSource):
            raise ValueError(f"kl_source must be one of {get_args(KLSource)}, with kl_source (={self.kl_source!r}).")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, with temperature (={self.temperature}). 1 changes nothing.")
        if isinstance(self.stop_tokens, str) or not all(isinstance(token, str) for token in self.stop_tokens):
            raise ValueError(f"stop_tokens must be a list of strings, with stop_tokens (={self.stop_tokens!r}).")
        if self.obs_mode not in ("dict", "tokens"):
            raise ValueError(f"obs_mode must be 'dict' or 'tokens', with obs_mode (={self.obs_mode!r}).")

    def _check_type(self, name: str, kind: type | tuple[type, ...], words: str) -> None:
        value = getattr(self, name)
        optional = name in ("gold", "missing_eos_penalty")
        if (value is None and optional) or (isinstance(value, kind) and not isinstance(value, bool)):
            return
        first = " Register a callable first: textenv.register_reward_model('mine', f)." if callable(value) else ""
        raise ValueError(f"{name} must be {words}, with {name} (={value!r}).{first}")
