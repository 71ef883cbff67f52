"""``textenv plot``."""

from pathlib import Path

import tyro

from agents.experiments.plot import compare_curves, read_runs
from textenv.pages.figures import save


def plot(runs: tyro.conf.Positional[tuple[Path, ...]], *, output: Path = Path("curves.png")) -> None:
    """Draw the curves of runs in one picture: the objective first, then scores, KL, length and endings.

    Args:
        runs: folders of learners, of `textenv run` (an agent's seeds become a line and a band) or of the demo.
        output: the picture, PNG or SVG; one that is there is replaced.
    """
    if not runs:
        raise ValueError("runs must name at least one folder, got none. Give the --output of a training.")
    kind = output.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"output must end in .png or .svg, got {str(output)!r}. Name a picture.")
    figure = compare_curves(read_runs(runs))
    output.parent.mkdir(parents=True, exist_ok=True)
    save(figure, output, kind)
    print(output)
