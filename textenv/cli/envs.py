"""The commands ``textenv envs`` and ``textenv check``; see :mod:`textenv.cli` for how a command is made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any


def envs_command() -> Callable[..., None]:
    from rich.console import Console
    from rich.markup import escape

    import textenv
    from textenv.registry import environment_spec

    def envs(*, experiment: Path | None = None, load: bool = False, as_json: bool = False) -> None:
        """List the registered environments.

        Args:
            experiment: list those of this experiment file too.
            load: load the references whose vocabulary no file tells (shown as "?").
            as_json: print the full specs, a JSON object a line, instead of a table.
        """

        if experiment is not None:
            textenv.load_experiment(experiment).register()
        if as_json:
            for env_id in textenv.registered_ids():
                print(environment_spec(env_id).to_json())
            return
        console = Console(highlight=False)
        for env_id, description in textenv.registered_ids().items():
            kwargs = environment_spec(env_id).kwargs
            tokens, problem = _vocabulary(kwargs["reference"], load)
            budget = f"{kwargs['max_prompt_tokens']} + {kwargs['max_new_tokens']}"
            figures = f"vocabulary {tokens}, prompt + response ≤ {budget} tokens, β {kwargs.get('kl_coef', 0.05):g}"
            names = [
                f"{name.replace('_', ' ')} {_short(kwargs[name])}" for name in ("prompts", "reference", "reward_model")
            ]
            console.print(f"[bold]{escape(env_id)}[/]  {escape(description)}")
            console.print(escape(f"{figures}; {', '.join(names)}"), style="dim")
            if problem:
                console.print(escape(f"? {problem}"), style="yellow")

    return envs


def _short(source: Any) -> str:
    """A name or path as one word; "yours" where the id leaves it open."""
    if isinstance(source, list | tuple):
        return f"{len(source)} inline"
    source = source["dataset"] if isinstance(source, dict) else source
    return "yours" if source is None else Path(source).name if source.startswith(("/", ".")) else source


def _vocabulary(reference: str | None, load: bool) -> tuple[str, str]:
    """Number of actions on a reference, and what is wrong when it is not known."""
    from textenv.registry import vocabulary_size

    if reference is None:
        return "yours", ""
    if load:
        from textenv.training.progress import quiet_libraries

        quiet_libraries()
    try:
        size = vocabulary_size(reference, load=load)
    except ValueError as error:
        return "?", str(error)
    return ("?", "only loading the reference tells its vocabulary: --load") if size is None else (str(size), "")


def check_command() -> Callable[..., int]:
    import tyro
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import textenv
    from textenv.conformance import check as run

    def check(
        env_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")],
        *,
        option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = (),
        experiment: Path | None = None,
    ) -> int:
        """Does an environment keep the contract? Exit code 1 when it does not.

        Args:
            env_id: a registered id, or module:id to import the module first.
            option: what gymnasium.make takes, the value as JSON or plain text.
            experiment: register this experiment file first.
        """

        if experiment is not None:
            textenv.load_experiment(experiment).register()
        report = run(env_id, **dict(_option(text) for text in option))
        table = Table("", "check", "", "seconds", box=None, pad_edge=False)
        for name, passed, detail, seconds in report.checks:
            mark = "[green]passed[/]" if passed else "[red]FAILED[/]"
            table.add_row(mark, name, escape(detail), f"{seconds:.2f}")
        Console().print(table)
        failed = len(report.failures)
        print(f"\n{env_id}: {f'{failed} of {len(report.checks)} checks failed' if failed else 'all checks passed'}")
        return 1 if failed else 0

    return check


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option must be NAME=VALUE, got {text!r}. Write for example kl_coef=0.1.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
