"""Every command with every fault: one line, no traceback, before any work."""

from pathlib import Path

import pytest

from agents.algorithms import LEARNERS
from reward_models.feedback.project import NewItem, Project, Response
from reward_models.feedback.queue import Queue
from tests.shell import run
from textenv.cli import COMMANDS
from textenv.data.records import write_jsonl

SUPERVISED_COMMANDS = ("sft", "reward", "dpo")
MICRO = ["--env-id", "textenv/Micro-v0", "--num-envs", "8"]
LEARNER = [*MICRO, "--batch-size", "16", "--total-episodes", "16", "--output", "OUT"]
SUPERVISED = ["--model", "micro-reference", "--data", "good.jsonl", "--output", "OUT"]
COMPLETE = {
    "sft": SUPERVISED,
    "reward": SUPERVISED,
    "dpo": SUPERVISED,
    "rm-bench": ["micro-gold", "--data", "good.jsonl", "--output", "OUT"],
    **dict.fromkeys(LEARNERS, LEARNER),
    "chat": ["micro-reference"],
    "evaluate": ["--model", "micro-reference", *MICRO, "--output", "OUT"],
    "serve-rm": ["micro-gold", "--port", "0"],
    "demo": ["--output", "OUT"],
    "rlhf": [
        *("--model", "micro-reference", "--preferences", "good.jsonl", "--output", "OUT"),
        *("--max-prompt-tokens", "8", "--max-new-tokens", "8"),
    ],
    "run": ["experiment.yaml"],
    "plot": ["learned", "--output", "curves.png"],
    "check": ["textenv/Micro-v0"],
    "doctor": ["--model", "micro-reference"],
    "envs": ["--experiment", "experiment.yaml"],
    "feedback demo": ["--output", "OUT", "--no-open-browser"],
    "feedback create": ["OUT", "--prompts", "good.jsonl", "--model", "micro-reference"],
    "feedback serve": ["answers.db", "--port", "0"],
    "feedback arena": [
        "micro-reference",
        "assistant-sft",
        "--prompts",
        "good.jsonl",
        "--project",
        "OUT",
        "--port",
        "0",
    ],
    "feedback export": ["answers.db", "--output", "OUT"],
}
"""Every command with arguments that it would accept; OUT stands for a new folder."""
FAULTS = {
    **{(name, "model"): ["--model", "org/gone"] for name in (*SUPERVISED_COMMANDS, "evaluate")},
    ("rm-bench", "model"): ["org/gone"],
    ("chat", "model"): ["--against", "org/gone"],
    ("chat", "tokens"): ["--reference", "assistant-sft"],
    ("chat", "reward model"): ["--reward-model", "no_such_module:rule"],
    ("chat", "device"): ["--device", "cuda:99"],
    ("chat", "setting"): ["--temperature", "0"],
    ("chat", "number"): ["--max-new-tokens", "0"],
    ("chat", "template"): ["--template", "user: assistant:"],
    ("chat", "environment"): ["--env-id", "textenv/Micr-v0"],
    ("serve-rm", "model"): ["org/gone"],
    **{(name, "model"): ["--reference", "org/gone"] for name in LEARNERS},
    **{(name, "reward model"): ["--reward-model", "no_such_module:rule"] for name in (*LEARNERS, "evaluate")},
    **{(name, "data"): ["--data", "gone.jsonl"] for name in (*SUPERVISED_COMMANDS, "rm-bench")},
    **{(name, "empty data"): ["--data", "empty.jsonl"] for name in (*SUPERVISED_COMMANDS, "rm-bench")},
    **{(name, "data"): ["--prompts", "gone.jsonl"] for name in (*LEARNERS, "evaluate")},
    **{(name, "device"): ["--device", "cuda:99"] for name in (*SUPERVISED_COMMANDS, *LEARNERS, "evaluate", "serve-rm")},
    **{(name, "setting"): ["--learning-rate", "-1"] for name in (*SUPERVISED_COMMANDS, *LEARNERS)},
    ("rm-bench", "setting"): ["--bins", "0"],
    ("demo", "setting"): ["--kl-coef", "-1"],
    ("rlhf", "model"): ["--model", "org/gone"],
    ("rlhf", "data"): ["--preferences", "gone.jsonl"],
    ("rlhf", "judge"): ["--judge", "no_such_module:rule"],
    ("rlhf", "setting"): ["--kl-coef", "-1"],
    ("rlhf", "number"): ["--ppo.epochs", "0"],
    ("evaluate", "setting"): ["--temperature", "0"],
    **{(name, "number"): ["--num-envs", "0"] for name in (*LEARNERS, "evaluate")},
    **{(name, "no number"): ["--learning-rate", "fast"] for name in (*SUPERVISED_COMMANDS, *LEARNERS)},
    ("doctor", "model"): ["--model", "org/gone"],
    ("doctor", "reward model"): ["--reward-model", "no_such_module:rule"],
    ("doctor", "data"): ["--data", "gone.jsonl"],
    ("plot", "run"): ["gone"],
    ("plot", "picture"): ["--output", "curves.pdf"],
    ("evaluate", "no number"): ["--best-of", "many"],
    ("rm-bench", "no number"): ["--bins", "2.5"],
    ("demo", "choice"): ["--eval-split", "tst"],
    **{(name, "choice"): ["--loss", "pointwise"] for name in ("reward", "dpo")},
    ("serve-rm", "token"): ["--token-variable", "NO_SUCH_VARIABLE"],
    ("check", "option"): ["--option", "reference"],
    ("envs", "data"): ["--experiment", "gone.yaml"],
    ("feedback demo", "setting"): ["--k", "1"],
    ("feedback demo", "number"): ["--prompts", "0"],
    ("feedback create", "model"): ["--model", "org/gone"],
    ("feedback create", "data"): ["--prompts", "gone.jsonl"],
    ("feedback create", "two sources"): ["--data", "good.jsonl"],
    ("feedback create", "guidelines"): ["--guidelines", "gone.md"],
    ("feedback create", "checks"): ["--checks", "gone.jsonl"],
    ("feedback create", "number"): ["--k", "1"],
    ("feedback create", "limit"): ["--limit", "0"],
    ("feedback create", "no limit"): ["--limit", "-1"],
    ("feedback arena", "model"): ["--judge", "org/gone"],
    ("feedback arena", "data"): ["--prompts", "empty.jsonl"],
    **{(f"feedback {name}", "setting"): ["--temperature", "0"] for name in ("create", "arena")},
    **{(f"feedback {name}", "plan"): ["--overlap", "1.5"] for name in ("create", "arena")},
    **{(f"feedback {name}", "device"): ["--device", "cuda:99"] for name in ("create", "arena")},
    **{(f"feedback {name}", "token"): ["--token-variable", "NO_SUCH"] for name in ("serve", "arena")},
    **{(f"feedback {name}", "public"): ["--host", "0.0.0.0"] for name in ("serve", "arena")},
    **{(f"feedback {name}", "port"): ["--port", "99999"] for name in ("serve",)},
    ("feedback serve", "lease"): ["--lease-minutes", "0"],
    ("feedback serve", "order"): ["--order", "uncertain"],
    ("feedback serve", "guidelines"): ["--guidelines", "gone.md"],
    ("feedback export", "choice"): ["--by", "majority"],
    **{(name, "flag"): ["--no-such-flag"] for name in COMPLETE},
}
"""Flags that are added to a complete command, and what is wrong with them."""


def make_answers(path):
    """A project with one answer."""
    with Project.create(path, "ranking", {}) as project:
        project.add_items([NewItem("one", "q", [Response("a"), Response("b")])])
        queue = Queue(project)
        with project.write() as database:
            database.execute("INSERT OR IGNORE INTO sessions VALUES ('ann', 'annotator', NULL, 0)")
        queue.join("ann", "Ann")
        if lease := queue.next(1, "ann"):
            queue.submit(lease.item.id, 1, "ann", {"ranking": [[0], [1]], "request": "request-1"})


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Calls a command in a folder with small data; OUT is ``tmp_path / "out"`` unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"}
    write_jsonl("good.jsonl", [good] * 4)
    Path("empty.jsonl").write_text("")
    Path("learned").mkdir()
    write_jsonl("learned/curves.jsonl", [{"episodes": 8.0 * update, "reward": 0.5} for update in (1, 2)])

    def call(name, extra=(), output="out"):
        plan = "environments: [textenv/Micro-v0], agents: [random], seeds: [0], total_episodes: 8"
        Path("experiment.yaml").write_text(f"run: {{output: {output}, {plan}}}")
        if name.startswith("feedback"):
            make_answers("answers.db")
        return run(capsys, *name.split(), *(output if part == "OUT" else part for part in COMPLETE[name]), *extra)

    return call


def assert_one_line(name, code, printed, says=""):
    assert code == 2
    assert printed.err.startswith(f"textenv {name}: "), printed.err
    assert printed.err.count("\n") == 1, printed.err
    assert says in printed.err
    assert not printed.out


def test_the_faults_cover_every_command():
    assert COMPLETE.keys() == COMMANDS.keys()


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name} {fault}" for name, fault in FAULTS])
def test_what_is_wrong_is_one_line_before_any_work(shell, name, fault):
    """No bar, no folder, no traceback; the line repeats what was given."""
    given = FAULTS[name, fault]
    assert_one_line(name, *shell(name, given), says=given[-1])
    assert not Path("out").exists()


WRITERS = (*SUPERVISED_COMMANDS, "rm-bench", *LEARNERS, "demo", "rlhf", "run")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/out", "/sys/a/b"])
@pytest.mark.parametrize("name", [*WRITERS, "evaluate"])
def test_an_output_that_cannot_be_written_is_one_line_before_any_work(shell, name, place):
    Path("file").write_text("mine")
    if name == "evaluate" and place == "file":
        place = "."  # it writes a file, and a folder is what it cannot replace
    assert_one_line(name, *shell(name, output=place), says="output must be")
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_with_files_of_others_is_left_alone(shell, name):
    Path("out").mkdir()
    for file in ("thesis.tex", "report.html", "table.md", "summary.html"):
        Path("out", file).write_text("mine")
    assert_one_line(name, *shell(name), says="Name another folder.")
    assert {path.read_text() for path in Path("out").iterdir()} == {"mine"}
    assert len(list(Path("out").iterdir())) == 4


@pytest.mark.parametrize("name", ["rm-bench", "run"])
def test_results_that_come_one_by_one_go_into_a_folder_of_their_own_again_and_again(shell, name):
    for _ in range(2):
        code, printed = shell(name)
        assert code == 0, printed.err
    assert_one_line("ppo", *shell("ppo"), says="Name another folder.")


@pytest.mark.parametrize("device", ["gpu", "mps", "meta"])
def test_a_device_that_is_not_there_is_one_line(shell, device):
    says = f"device must be one that torch can use here, got {device!r}. Use cpu."
    assert_one_line("ppo", *shell("ppo", ["--device", device]), says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learning-rte", "1"], "--learning-rte, 1. Did you mean --learning-rate? See textenv ppo --help."),
        (["--output"], "missing value for argument '--output'"),
        (["--output", "a", "--batch-size", "x"], "--batch-size: invalid literal for int() with base 10: 'x'. See"),
        ([], "these must be given: --output. See textenv ppo --help."),
    ],
)
def test_a_flag_that_cannot_be_understood_is_one_line(capsys, arguments, says):
    if "--learning-rte" in arguments:
        arguments = ["--output", "a", *arguments]
    assert_one_line("ppo", *run(capsys, "ppo", *arguments), says=says)
