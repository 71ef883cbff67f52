"""Make the models that ship with the package: the embedded world's SFT reference and its trained reward model.

Runs the first four steps of the demo from a fixed seed and copies the results into ``textenv/assets``.

Command: ``make assets``.
"""

import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as hf_logging

import textenv
from agents.demo.run import DemoConfig, Run, collect_rankings, train_base, train_demonstrations, train_rewards

SEED = 2026


def main() -> None:
    """Train and copy."""
    hf_logging.disable_progress_bar()
    target = Path(textenv.__file__).parent / "assets"
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(DemoConfig(run_dir=Path(temporary), seed=SEED, eval_split="validation"), Console(stderr=True))
        run.step("base", lambda advance: train_base(run, advance))
        run.step("sft", lambda advance: train_demonstrations(run, advance))
        run.step("rankings", lambda advance: collect_rankings(run, advance))
        run.step("reward_model", lambda advance: train_rewards(run, advance))
        for source, name in (("sft", "assistant-sft"), ("reward_model", "assistant-rm")):
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(run.folder / source, target / name)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
