"""Make the models that ship with the package: the embedded world's SFT reference and its trained reward model.

Runs the first four steps of the demo from a fixed seed and copies the results into ``textenv/assets``.

Command: ``make assets``.
"""

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

import textenv
from agents.demo.run import TITLES, DemoConfig, collect_rankings, train_base, train_demonstrations, train_rewards
from agents.demo.steps import StepRun
from textenv.training.progress import quiet_libraries

SEED = 2026


def main() -> None:
    """Train and copy."""
    quiet_libraries()
    target = Path(textenv.__file__).parent / "assets"
    with tempfile.TemporaryDirectory() as temporary:
        config = DemoConfig(output=Path(temporary), seed=SEED, eval_split="validation")
        run = StepRun(config, TITLES, Console(stderr=True))
        run.step("base", lambda advance: train_base(run, advance))
        run.step("sft", lambda advance: train_demonstrations(run, advance))
        run.step("rankings", lambda advance: collect_rankings(run, advance))
        run.step("reward_model", lambda advance: train_rewards(run, advance))
        for source, name in (("sft", "assistant-sft"), ("reward_model", "assistant-rm")):
            # Overwrites file by file and removes nothing; hidden files are notes of the run.
            shutil.copytree(run.folder / source, target / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
