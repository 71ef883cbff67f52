"""The terminal: lines, commands, colours, and nothing that a model writes controls it."""

import io

import pytest
from rich.console import Console

from tests.conftest import tiny_model
from textenv.chat import terminal
from textenv.chat.conversation import Answer, Conversation, Judge
from textenv.chat.terminal import kl_style, talk
from textenv.cli import main
from textenv.pages.terminal import visible
from textenv.task import token_rule


class Terminal(io.StringIO):
    def isatty(self):
        return True


def say(monkeypatch, capsys, text, stream=io.StringIO, speakers=None, judge=None):
    """What is printed when these lines are typed (``Terminal``) or piped."""
    model = tiny_model()
    speakers = speakers or {"a": Conversation(model, token_rule(model), max_new_tokens=8, seed=1)}
    monkeypatch.setattr("sys.stdin", stream(text))
    talk(speakers, judge or Judge(None, None))
    return capsys.readouterr()


def expected(*lines, seed=1):
    model = tiny_model()
    speaker = Conversation(model, token_rule(model), max_new_tokens=8, seed=seed)
    return "".join(speaker.ask(line).text + "\n" for line in lines)


def test_a_pipe_gets_the_answers_and_nothing_else(monkeypatch, capsys):
    printed = say(monkeypatch, capsys, "what is\n\n  red  \n/quit\nthe sky\n")
    assert printed == (expected("what is", "red"), "")


def test_two_models_answer_each_line_after_their_names(monkeypatch, capsys):
    model = tiny_model()
    speakers = {
        name: Conversation(model, token_rule(model), max_new_tokens=8, seed=seed) for name, seed in (("a", 1), ("b", 2))
    }
    printed = say(monkeypatch, capsys, "what is\n", speakers=speakers)
    assert printed.out == f"a\n{expected('what is')}b\n{expected('what is', seed=2)}"


def test_a_terminal_shows_the_commands_and_lives_on_after_an_error_and_ctrl_c(monkeypatch, capsys):
    answers, after = iter([KeyboardInterrupt, None]), expected("red")
    real = Conversation.ask

    def ask(self, words, show):
        if next(answers):
            show("so")
            return Answer(words, "so", [1], [2], "interrupted")
        return real(self, words, show)

    monkeypatch.setattr(Conversation, "ask", ask)
    printed = say(monkeypatch, capsys, "/tokns\nwhat is\nred\n", Terminal)
    assert "/again: another answer" in printed.out
    assert printed.out.endswith(f"> so\n> {after}> ")
    assert "got '/tokns'" in printed.err
    assert printed.err.endswith(".\nstopped\n")


def test_ctrl_c_at_the_prompt_takes_the_line_back(monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, "/quit"])

    def typed(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert say(monkeypatch, capsys, "", Terminal).err == ""
    assert next(lines, None) is None


@pytest.mark.parametrize("text", ["/tokns\n", "/again\n", "/tokens\n", "red\n/tokens\n"])
def test_in_a_pipe_a_line_without_an_answer_is_an_error(monkeypatch, capsys, text):
    with pytest.raises(ValueError, match=r"must be a command|must be an answer|needs an answer|neither reference"):
        say(monkeypatch, capsys, text)


def piped(content, errors):
    """What a pipe brings, by the error handler that the locale gives to standard input."""
    return io.TextIOWrapper(io.BytesIO(content), "utf-8", errors)


@pytest.mark.parametrize(
    ("errors", "says"),
    [("surrogateescape", "without lone surrogates, got '\\udcff' in 'red \\udcff'"), ("strict", "0xff")],
)
def test_bytes_that_are_not_utf8_end_a_pipe_in_one_line(monkeypatch, capsys, errors, says):
    monkeypatch.setattr("sys.stdin", piped(b"red \xff\nred\n", errors))
    assert main(["chat", "micro-reference", "--max-new-tokens", "2"]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_at_a_terminal_bytes_that_are_not_utf8_are_an_error_that_is_forgotten(monkeypatch, capsys):
    after = expected("red")
    printed = say(monkeypatch, capsys, "red \udcff\nred\n", Terminal)
    assert printed.out.endswith(f"> {after}> ")
    assert "without lone surrogates, got '\\udcff'" in printed.err


def test_again_and_reset_are_commands(monkeypatch, capsys):
    assert say(monkeypatch, capsys, "red\n/again\n").out == expected("red", "red")
    with pytest.raises(ValueError, match="must be an answer"):
        say(monkeypatch, capsys, "red\n/reset\n/again\n")


def test_tokens_shows_the_kl_of_each_token_and_the_score(monkeypatch, capsys):
    model, other = tiny_model(), tiny_model(seed=5)
    judge = Judge(other, lambda prompts, completions: [0.25])
    speaker = Conversation(model, token_rule(model), max_new_tokens=8, seed=1)
    printed = say(monkeypatch, capsys, "what is\n/tokens\n", speakers={"a": speaker}, judge=judge).out.splitlines()
    figures = judge.kl(model, speaker.last, speaker.rule).tolist()
    assert [part.split("]")[0] for part in printed[1].split("[")[1:]] == [f"{figure:+.2f}" for figure in figures]
    assert (
        printed[2] == f"score 0.250, KL {sum(figures):.3f} nats, {len(figures)} tokens, ends by {speaker.last.ending}"
    )
    file = io.StringIO()
    terminal._show_tokens(speaker, judge, Console(file=file, force_terminal=True, color_system="truecolor", width=200))
    assert "[+" not in file.getvalue()
    assert "\x1b[30;48;2;" in file.getvalue()
    assert "orange: likelier than under the reference" in file.getvalue()


def test_tokens_shows_control_characters_too(monkeypatch):
    model = tiny_model()
    speaker = Conversation(model, token_rule(model))
    speaker.last = Answer("red", "", [1], [2, 3], "eos")
    monkeypatch.setattr("textenv.chat.terminal.token_texts", lambda tokenizer, ids: ["\x1b[2J", "b"])
    file = io.StringIO()
    terminal._show_tokens(speaker, Judge(tiny_model(seed=5), None), Console(file=file, width=200))
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().startswith("␛[2J[")


@pytest.mark.parametrize(
    ("figure", "style"),
    [
        (1.0, "black on rgb(230,159,0)"),
        (40.0, "black on rgb(230,159,0)"),
        (0.5, "black on rgb(242,207,128)"),
        (-1.0, "black on rgb(86,180,233)"),
        (0.01, ""),
    ],
)
def test_colours_tell_sign_and_size(figure, style):
    assert kl_style(figure) == style


def test_control_characters_of_a_model_are_shown_and_not_obeyed(capsys):
    text = "\x1b[2J\x07a\r\x9b1m\x7f\u202eb\u2066\n\tc"
    assert visible(text) == "␛[2J␇a␍\ufffd1m␡\ufffdb\ufffd\n\tc"
    assert visible("e\u0301 👩‍🚀 ‏ש") == "e\u0301 👩‍🚀 ‏ש"
    terminal._answer(lambda show: show(text))
    assert capsys.readouterr().out == visible(text) + "\n"


def test_the_command_takes_everything_from_an_environment(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("how do i fix the bike ?\n/tokens\n"))
    template = "user: {} assistant:"
    command = ["chat", "assistant-sft", "--env-id", "textenv/Assistant-v0", "--template", template, "--seed", "3"]
    code = main(command)
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    answer, tokens, facts = printed.out.splitlines()
    assert tokens == "".join(
        f"{word}[+0.00]" for word in [answer.split(" ")[0], *(" " + w for w in answer.split(" ")[1:]), "<eos>"]
    )
    assert facts.startswith("score ")
    monkeypatch.setattr("sys.stdin", io.StringIO("how do i fix the bike ?\n"))
    assert main([*command, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.split() == answer.split()[:2]
