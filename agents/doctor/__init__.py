"""What is wrong with a set-up of model, tokenizer, reward model, data and environment, before a training finds out.

    textenv doctor --model my-sft --reward-model my-rm --data preferences.jsonl

It stands here and not in ``textenv``, since it reads demonstrations and preferences and runs an iteration of PPO.
Importing this package loads neither torch nor transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.doctor.finding import Diagnosis, Finding

if TYPE_CHECKING:
    from textenv.lm import LanguageModel
    from textenv.protocols import RewardModel

__all__ = ["Diagnosis", "Finding", "assert_healthy", "diagnose", "examine"]


def diagnose(
    *,
    model: "LanguageModel | str | None" = None,
    reward_model: "RewardModel | str | Mapping[str, Any] | None" = None,
    data: Sequence[str | Path] = (),
    held_out: str | Path | None = None,
    env_id: str | None = None,
    options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Examine the parts that are named; a check whose part is missing is skipped.

    Args:
        model: a language model, or its registered name, folder, hub id or ``.gguf`` file.
        reward_model: a callable, or what an environment takes as ``reward_model=``.
        data: files, folders or hub ids of demonstrations and preferences.
        held_out: a file of records whose prompts must not be trained on.
        env_id: an environment; ``model`` and ``reward_model``, if they are names, take the place of its own. Without
            it, names of both and data make one.
        options: of the environment, as for ``gymnasium.make``.
        on_progress: called with the number of checks done and of all.

    Raises:
        ValueError: no part is named, or a name stands for nothing.
    """
    from agents.doctor import examination

    parts: dict[str, Any] = {"model": model, "reward_model": reward_model, "data": data, "held_out": held_out}
    return examination.diagnose(**parts, env_id=env_id, options=options, on_progress=on_progress)


def examine(**parts: Any) -> list[Finding]:
    """The findings of :func:`diagnose`, the worst first."""
    return diagnose(**parts).findings


def assert_healthy(**parts: Any) -> None:
    """For a test of one's own: fail with every error and warning that :func:`diagnose` finds."""
    bad = [finding for finding in examine(**parts) if finding.level != "note"]
    assert not bad, "\n" + "\n".join(f"{f.level}: {f.check}: {f.what} {f.why} {f.remedy}" for f in bad)
