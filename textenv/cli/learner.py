"""``textenv ppo`` and its kin: one command for each of :data:`agents.algorithms.LEARNERS`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from agents.algorithms import algorithm
from textenv.cli.common import EnvArgs, Json, show
from textenv.data.folders import check_replaceable
from textenv.settings import PositiveInt, check_value
from textenv.training.progress import progress_bar


def learner_command(name: str) -> Callable[..., None]:
    """The command of one learner; its flags are those of its config."""
    learner = algorithm(name)

    def train(
        output: Path,
        env: Annotated[EnvArgs, tyro.conf.arg(name="")],
        config: Annotated[learner.config_type, tyro.conf.arg(name="")],
        *,
        total_episodes: int = 15_360,
        num_envs: int = 256,
        save_every: int = 10,
        resume: bool = False,
        as_json: Json = False,
    ) -> None:
        """Train a policy in an environment; the result is a checkpoint with a Hugging Face model in it.

        ALGORITHM

        Args:
            output: folder for the checkpoint. Ctrl-C finishes the update and saves; --resume continues from there.
            env: the environment.
            config: how to train.
            total_episodes: episodes to play in total, those before a resume included.
            num_envs: episodes played at once; it must divide batch-size and be a multiple of group-size.
            save_every: updates between checkpoints.
            resume: continue from the checkpoint in the output folder.
        """
        check_value("total_episodes", total_episodes, PositiveInt)
        check_value("save_every", save_every, PositiveInt)
        check_replaceable(output)
        if not resume and (output / "state.json").exists():
            raise ValueError(
                f"output must be a folder without a checkpoint, got {str(output)!r}. Continue it with --resume, or "
                "name another folder."
            )
        vector = env.make(num_envs)
        agent = learner.load(output, vector) if resume else learner(vector, config)
        with progress_bar(learner.__name__) as advance:
            agent.learn_with_checkpoints(total_episodes, output, every=save_every, advance=advance)
        show({**agent.history[-1], "output": str(output)}, as_json)

    train.__doc__ = str(train.__doc__).replace("ALGORITHM", str(learner.__doc__))
    return train
