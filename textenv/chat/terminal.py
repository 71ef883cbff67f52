"""A conversation at the terminal, or through a pipe."""

import contextlib
import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.text import Text

from textenv.chat.conversation import Conversation, Judge
from textenv.chat.stream import token_texts
from textenv.data.records import check_text
from textenv.pages.terminal import visible

COMMANDS = {
    "/tokens": "score and KL of each token of the last answer",
    "/again": "another answer",
    "/reset": "forget what was said",
    "/quit": "leave, as Ctrl-D does",
}
ORANGE, BLUE = (230, 159, 0), (86, 180, 233)


def talk(speakers: Mapping[str, Conversation], judge: Judge) -> None:
    """Answer the lines of standard input until it ends or says /quit.

    At a terminal Ctrl-C stops an answer, and an error is shown and forgotten; from a pipe, both end the conversation.

    Raises:
        ValueError: a line of a pipe cannot be answered.
    """
    interactive, console = sys.stdin.isatty(), Console(highlight=False)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input then has a history)
        console.print(_usage(), style="dim")
    while True:
        try:
            line = _read(interactive)
            if line in (None, "/quit"):
                return
            if line:
                _respond(line, speakers, judge, console)
        except (KeyboardInterrupt, ValueError) as error:
            if not interactive:
                raise
            print(visible(str(error)) or "stopped", file=sys.stderr)


def _read(interactive: bool) -> str | None:
    """The next line; None at the end, and an empty one instead of one that Ctrl-C took back."""
    try:
        line = input("> " if interactive else "").strip()
        check_text(line)  # what is not UTF-8 comes as lone surrogates
        return line
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        print()
        return ""


def _respond(line: str, speakers: Mapping[str, Conversation], judge: Judge, console: Console) -> None:
    if line.startswith("/") and line not in COMMANDS:
        raise ValueError(f"a line that begins with / must be a command, got {line!r}. {_usage()}")
    for name, speaker in speakers.items():
        if line == "/reset":
            speaker.reset()
            continue
        if len(speakers) > 1:
            console.print(Text(visible(name), style="bold"))
        if line == "/tokens":
            _show_tokens(speaker, judge, console)
        else:
            _answer(speaker.again if line == "/again" else lambda show, of=speaker: of.ask(line, show))


def _answer(draw: Callable[[Callable[[str], object]], object]) -> None:
    def show(piece: str) -> None:
        print(visible(piece), end="", flush=True)

    ending = getattr(draw(show), "ending", "")
    print(flush=True)
    if ending == "interrupted":
        raise KeyboardInterrupt


def _show_tokens(speaker: Conversation, judge: Judge, console: Console) -> None:
    """The last answer, each token coloured by its KL, with its score."""
    answer = speaker.last
    if answer is None:
        raise ValueError("/tokens needs an answer, got none yet. Say something first.")
    if judge == (None, None):
        raise ValueError(
            "/tokens needs something to measure by, got neither reference nor reward model. Start with --env-id, or "
            "--reference and --reward-model."
        )
    kl, score = judge.kl(speaker.model, answer, speaker.rule), judge.score(speaker.model, answer)
    facts = [] if score is None else [f"score {score:.3f}"]
    if kl is not None:
        line = Text()
        for piece, figure in zip(token_texts(speaker.model.tokenizer, answer.response_ids), kl.tolist(), strict=True):
            number = "" if console.color_system else f"[{figure:+.2f}]"
            line.append(visible(piece) + number, style=kl_style(figure))
        console.print(line, soft_wrap=True)
        facts.append(f"KL {float(kl.sum()):.3f} nats")
        if console.color_system:
            console.print("orange: likelier than under the reference, blue: less likely, full at 1 nat", style="dim")
    facts += [f"{len(answer.response_ids)} tokens", f"ends by {answer.ending}"]
    console.print(", ".join(facts), style="dim", soft_wrap=True)


def kl_style(figure: float) -> str:
    """A background from white to orange above 0, to blue below, full at 1 nat; none near 0."""
    share = min(1.0, abs(figure))
    if share < 0.05:
        return ""
    red, green, blue = (round(255 + share * (part - 255)) for part in (ORANGE if figure > 0 else BLUE))
    return f"black on rgb({red},{green},{blue})"


def _usage() -> str:
    return "; ".join(f"{name}: {what}" for name, what in COMMANDS.items()) + "."
