"""The ``textenv`` command: every part of the package from a shell.

A command is a file with a function and a line in ``COMMANDS``. The function's parameters are its flags, and its
docstring is its ``--help``. Only the file of the command that runs is imported.
"""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

import gymnasium

from agents.algorithms import LEARNERS, summary  # light: imports no algorithm
from textenv import __version__

_RESUME = "The same command with --resume continues from here."
_AGAIN = "The same command continues from here."


class Command(NamedTuple):
    """A command as the usage shows it."""

    function: str
    """``module:function``, the module in this folder."""
    summary: str
    after_stop: str = ""
    """How to go on after Ctrl-C."""

    def load(self, name: str, arguments: Sequence[str] = ()) -> Callable[..., int | None]:
        """The command; the defaults of a learner's flags depend on some of its arguments."""
        module, _, function = self.function.partition(":")
        found = getattr(import_module(f"textenv.cli.{module}"), function)
        return found(name, arguments) if name in LEARNERS else found


COMMANDS = {
    "envs": Command("envs:envs", "list the registered environments"),
    "check": Command("check:check", "check that an environment keeps the contract"),
    "doctor": Command("doctor:doctor", "find the silent bugs of a set-up before the training does"),
    "sft": Command("supervised:sft", "fine-tune a language model on demonstrations", _RESUME),
    "reward": Command("supervised:reward", "train a reward model on rankings", _RESUME),
    "dpo": Command("supervised:dpo", "train a policy on rankings, without a reward model", _RESUME),
    "rm-bench": Command(
        "rm_bench:rm_bench",
        "benchmark reward models on preferences, with a report",
        "The reports of finished models are in the output folder.",
    ),
    "serve-rm": Command("serve_rm:serve", "serve a reward model over HTTP"),
    "chat": Command("answers.chat:chat", "talk to a model, or to two side by side"),
    "evaluate": Command("answers.evaluate:evaluate", "answer an environment's prompts and score the answers"),
    "run": Command("run:run", "an experiment file: agents × environments × seeds, compared", _AGAIN),
    "plot": Command("run:plot", "draw the curves of runs in one picture"),
    "demo": Command("demo:demo", "all three steps on the embedded world, with a report", _AGAIN),
    "rlhf": Command("rlhf:rlhf", "all three steps on a pretrained model and people's comparisons", _AGAIN),
    "feedback demo": Command("feedback:demo", "rank responses in a browser, with a model that learns", _AGAIN),
    "feedback create": Command("feedback:create", "sample or import responses for people to rank", _AGAIN),
    "feedback serve": Command("feedback:serve", "the page where people rank, and its dashboard", _AGAIN),
    "feedback arena": Command("feedback:arena", "compare models blind, by people or a reward model", _AGAIN),
    "feedback export": Command("feedback:export_project", "what people said as data to train on"),
    **{name: Command("learner:learner_command", summary(name), _RESUME) for name in LEARNERS},
}
IN_PROCESSES = ("sft", "reward", "dpo", *LEARNERS)
"""The commands that ``accelerate launch`` runs in several processes."""


def usage() -> str:
    lines = {name: f"  {name:<16} {command.summary}\n" for name, command in COMMANDS.items()}
    learners = "".join(lines.pop(name) for name in LEARNERS)
    return (
        "usage: textenv COMMAND [--help | OPTIONS]\n       textenv --version\n\n"
        f"RLHF as ordinary reinforcement learning.\n\n{''.join(lines.values())}\n"
        f"Train a policy in an environment by:\n{learners}\n`textenv COMMAND --help` explains a command."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can fix are one line and exit code 2."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name == "--version":
        print(f"textenv {__version__}")
        return 0
    if name not in COMMANDS:
        print(usage())
        subcommands = [command.removeprefix(f"{name} ") for command in COMMANDS if command.startswith(f"{name} ")]
        if subcommands and rest[:1] in (["-h"], ["--help"]):
            return 0
        if subcommands:
            rule = f"the command of {name} must be one of {', '.join(subcommands)}"
            print(f"\ntextenv: {rule}, got {rest[0] if rest else ''!r}. Choose one.", file=sys.stderr)
        elif name and name not in ("-h", "--help"):
            print(f"\ntextenv: command must be one of the above, got {name!r}.", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and name not in IN_PROCESSES:
        known = f"In several run {', '.join(IN_PROCESSES)}."
        print(f"textenv: {name} runs in one process, got {processes}. Start it by itself. {known}", file=sys.stderr)
        return 2
    if "" not in sys.path:
        sys.path.append("")  # module:callable may name a module of the folder where the command is called
    try:
        if name != "envs":
            from textenv.training.progress import quiet_libraries

            quiet_libraries()
        code = parse(COMMANDS[name].load(name, rest), rest, f"textenv {name}")() or 0
        sys.stdout.flush()
        if processes > 1:
            from textenv.training.processes import leave

            leave()
        return code
    except KeyboardInterrupt:
        print(f"\nstopped. {COMMANDS[name].after_stop}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, gymnasium.error.Error) as error:
        where = f" (process {os.environ['RANK']})" if processes > 1 else ""
        print(f"textenv {name}{where}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_command(name: str) -> NoReturn:
    """Run a command with the arguments of this process, and end."""
    end(main([name, *sys.argv[1:]]))


def end(code: int) -> NoReturn:
    """End this process. One of several is gone at once: a thread of PyTorch's that wakes up while Python is taken down
    can abort it ("terminate called without an active exception")."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse(command: Callable[..., Any], arguments: Sequence[str], prog: str) -> Callable[[], Any]:
    """The command with its arguments, ready to be called.

    Raises:
        ValueError: the arguments are wrong; what tyro prints in a box, in one line.
        SystemExit: help was asked for, and is printed.
    """
    import tyro

    @functools.wraps(command)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(command, *args, **kwargs)

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(bound, args=arguments, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        rows = [row.strip("│╭╰╮╯─ ") for row in box.getvalue().splitlines()]  # a title, and parts between rules
        said, *more = (
            " ".join(part).rstrip(".") for text, part in groupby(rows[1:], lambda row: bool(row.strip("-"))) if text
        )
        if said.startswith("Missing from"):
            flags = ", ".join(re.findall(r"--[a-z-]+(?= [A-Z{])", said))
            said = f"these must be given: {flags or said.partition(': ')[2]}"
        nearest = re.search(r"meant:? .*?(--[a-z-]+)", " ".join(more))
        remedy = f" Did you mean {nearest[1]}?" if nearest else ""
        message = f"{said}.{remedy} See {prog} --help."
        raise ValueError(message[0].lower() + message[1:]) from None
