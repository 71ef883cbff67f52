"""Model cards, and pushing a trained model to the Hugging Face hub with its card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from textenv.data.folders import MARKER, add_file
from textenv.data.hub import why_unreachable
from textenv.data.records import looks_like_path, structure

CARD = "README.md"


class Card(NamedTuple):
    """What a model's card says."""

    method: str
    """Like "supervised fine-tuning"."""
    task: str
    """The hub's name of what the model does: "text-generation" or "text-classification"."""
    base: str
    """The model that training started from."""
    data: str
    """What was learned from, or the prompts that were answered."""
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    """Figures as measured."""


def write_card(output: Path, card: Card, inside: str = "") -> None:
    """Write the card of the model in ``output``, a folder of :func:`.replace_folder`, or in a folder ``inside`` it.

    Where files lay on this machine is left out: a path is named by its last part.
    """
    add_file(output, f"{inside}/{CARD}".lstrip("/"), card_text(card, output / inside))


def card_text(card: Card, folder: Path) -> str:
    """Markdown with the hub's metadata before it."""
    from huggingface_hub import ModelCardData  # takes a while to import

    adapter = (folder / "adapter_config.json").is_file()
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=card.task,
        base_model=card.base if _is_hub_id(card.base) else None,
        datasets=[card.data] if _is_hub_id(card.data) else None,
        tags=["textenv", card.method.replace(" ", "-").lower()],
    )
    kind = "An adapter (LoRA)" if adapter else "A model"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {_public(card.base)}: {card.method}\n\n"
        f"{kind} trained by textenv: {card.method}.\n\n"
        f"- **Base model:** {_public(card.base)}\n- **Data:** {_public(card.data)}\n\n"
        f"## Results\n\nAs measured at the end of the training.\n\n{_table('figure', card.results)}\n"
        f"## Settings\n\n{_table('setting', card.settings)}"
    )


def check_push(repo_id: str | None) -> None:
    """Refuse a name that the hub would not take, a machine without a token, and a hub that cannot be reached; None
    pushes nothing."""
    if repo_id is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub must be OWNER/NAME, got {repo_id!r}: {error} Correct the name.") from None
    if "/" not in repo_id:
        raise ValueError(f"push_to_hub must be OWNER/NAME, got {repo_id!r}. Say whose it is.")
    if get_token() is None:
        raise ValueError(f"push_to_hub needs a token of the hub, got none for {repo_id!r}. Run: hf auth login.")
    problem = why_unreachable()
    if problem is not None:
        raise ValueError(f"push_to_hub needs the hub, for {repo_id!r}. {problem}. Train without it, and push later.")


def push(folder: Path, repo_id: str) -> str:
    """Upload a model with its card → its address. The repository is made, and is private, if it does not exist.

    Raises:
        OSError: the hub cannot be reached or refuses; the folder stays as it is.
    """
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        address = str(api.create_repo(repo_id, private=True, exist_ok=True))
        hidden = [MARKER, "checkpoint-*", "runs/*"]
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=hidden, commit_message="Upload model")
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise OSError(
            f"the hub must take {repo_id!r}, got: {error} The model is whole in {str(folder)!r}, with its card. "
            f"Push it again: hf upload {repo_id} {folder}"
        ) from error
    return address


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not _is_path(name)


def _is_path(name: str) -> bool:
    try:
        return looks_like_path(name) or Path(name).exists()
    except OSError:  # too long for one
        return False


def _public(name: str) -> str:
    return Path(name).name if _is_path(name) else name


def _table(first: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"| {name} | {_written(value)} |\n" for name, value in values.items() if value is not None)
    return f"| {first} | |\n|---|---|\n{rows}"


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    value = structure(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_written(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value))
    return _public(str(value)).replace("|", r"\|").replace("\n", " ")
