"""What several commands share: flags that name an environment, checks before the work, and figures at the end."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from textenv.config import Precision
from textenv.data.cards import Card, push, write_card
from textenv.data.folders import check_replaceable
from textenv.settings import PositiveInt, check_value
from textenv.training.processes import is_main, on_main, own_device, own_slots
from textenv.training.progress import Advance
from textenv.vector import TextVectorEnv, make_vec

Json = Annotated[bool, tyro.conf.arg(name="json", help="print the figures as JSON instead of a table.")]
"""The flag ``--json``."""

Option = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")]
"""The flag ``--option``, given once for each option."""

PushToHub = Annotated[
    str | None, tyro.conf.arg(metavar="OWNER/NAME", help="upload the result with its card, to a private repository.")
]
"""The flag ``--push-to-hub``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvArgs:
    """Which environment, and what to change in it. What is not given stays as the id defines it."""

    env_id: str = "textenv/Assistant-v0"
    """A registered id (`textenv envs` lists them). `textenv/Text-v0` takes your prompts, reference, reward model."""
    prompts: str | None = None
    """Prompt set: a registered name or a JSONL file of strings under "prompt"."""
    reference: str | None = None
    """Language model that the KL is measured against: a registered name, a folder or a hub id."""
    reward_model: str | None = None
    """A registered name, module:callable, the folder or hub id of a sequence classifier, or a JSON object."""
    kl_coef: float | None = None
    """Reward paid for each nat of KL."""
    max_prompt_tokens: int | None = None
    """Width of the prompt, tokens."""
    long_prompts: Literal["error", "drop", "cut"] | None = None
    """A prompt of more tokens is an error, is left out, or loses its beginning."""
    max_new_tokens: int | None = None
    """Length budget of a response, tokens."""
    min_new_tokens: int | None = None
    """Tokens that a response has before it may end."""
    stop_tokens: tuple[str, ...] | None = None
    """Tokens besides EOS that end a response."""
    temperature: float | None = None
    """Sampling temperature of the policy and the reference alike."""
    missing_eos_penalty: float | None = None
    """Subtracted when a response spends its budget without ending."""
    gold: str | None = None
    """A reward model that is reported as gold_score and never part of the reward."""
    device: str | None = None
    """Where the models run, like cpu or cuda:0."""
    dtype: Precision | None = None
    """Precision of the reference and the reward model; a policy in training computes in it over float32 weights."""
    attn_implementation: str | None = None
    """How models compute attention: sdpa, eager, flash_attention_2, ..."""

    def make(self, num_envs: int) -> TextVectorEnv:
        """The part of this process in an environment of ``num_envs`` slots."""
        check_value("num_envs", num_envs, PositiveInt)
        options = dataclasses.asdict(self)
        options["device"] = own_device(self.device)
        check_device(options["device"] or "cpu")
        num_envs = own_slots(num_envs)
        env_id = options.pop("env_id")
        return make_vec(env_id, num_envs, **{name: value for name, value in options.items() if value is not None})


def policy_of(model: str) -> str:
    """The language model behind what a user names: the policy in the checkpoint of a learner, else the name itself."""
    folder = Path(model) / "policy"
    return str(folder) if folder.is_dir() else model


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """What stands behind ``--option``: names, and values as JSON or plain text."""
    return dict(map(_option, texts))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option must be NAME=VALUE, got {text!r}. Write for example kl_coef=0.1.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def check_device(name: str) -> None:
    """Refuse a device that torch cannot compute on here, before any model is loaded."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise ValueError(f"device must be one that torch can use here, got {name!r}. Use cpu.") from error


@contextlib.contextmanager
def skipping_named() -> Iterator[None]:
    """Name the flag that leaves malformed records out, where one stops the command."""
    from reward_models.preferences import MalformedRecord

    try:
        yield
    except MalformedRecord as error:
        raise ValueError(f"{error} --skip-malformed leaves all such records out.") from None


def check_unfinished(output: Path) -> None:
    """Refuse a folder that cannot be written, holds other files, or holds a model that training has finished."""

    def check() -> None:
        check_replaceable(output)
        if (output / "config.json").is_file() and not list(output.glob("checkpoint-*")):
            rule = f"output must hold no finished model, got {str(output)!r}"
            raise ValueError(f"{rule}. Remove it, or name another folder.")

    on_main(check)


def publish(output: Path, card: Card, repo_id: str | None, inside: str = "") -> dict[str, str]:
    """Write the card of a trained model, and push it if ``repo_id`` is given → what to show of it."""

    def written() -> dict[str, str]:
        write_card(output, card, inside)
        return {} if repo_id is None else {"pushed_to": push(output / inside, repo_id)}

    return on_main(written)


def show_loss(advance: Advance) -> Callable[[int, int, Mapping[str, float]], None]:
    """Progress of a supervised training, with its loss beside the bar."""
    return lambda done, total, figures: advance(done, total, {"loss": figures["loss"]} if "loss" in figures else None)


def show(figures: Mapping[str, Any], as_json: bool) -> None:
    """The figures of a command on standard output: a table with four significant digits, or JSON with all of them.

    Of several processes the main one shows them.
    """
    if not is_main():
        return
    if as_json:
        show_json(figures)
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {short(value)}")


def show_json(figures: Mapping[str, Any]) -> None:
    """Figures as JSON on standard output, a :class:`textenv.stats.Mean` as an object."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return value._asdict() if hasattr(value, "_asdict") else value

    print(json.dumps(plain(figures), indent=2, ensure_ascii=False))


def short(value: Any) -> str:
    """A figure with four significant digits, a mean with its interval."""
    if hasattr(value, "mean"):
        return f"{short(value.mean)} ± {value.ci95:.2g}"
    if isinstance(value, list):
        return " … ".join(map(short, value))
    if not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e4 else f"{value:.4g}"
