"""``textenv feedback demo``, ``create``, ``serve``, ``arena`` and ``export``."""

import hashlib
import json
import random
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge

from reward_models.feedback import check_extra
from reward_models.feedback.create import Plan, Sampling, add_battles, add_rankings, add_sampled
from reward_models.feedback.project import Project
from reward_models.preferences import load_rankings
from textenv import registry
from textenv.cli.common import Json, check_device, show
from textenv.config import Precision
from textenv.data.folders import check_replaceable
from textenv.data.records import PromptSet
from textenv.pages.terminal import print_table
from textenv.settings import Positive, PositiveInt, check_value
from textenv.training.progress import progress_bar

try:
    from reward_models.feedback.arena import Battle, battles_of, judged, match_row, matches, rating_row, ratings
    from reward_models.feedback.export import By, export
    from reward_models.feedback.guidelines import ASSISTANT
    from reward_models.feedback.live import LiveModel
    from reward_models.feedback.order import order_by_disagreement
    from reward_models.feedback.web.app import App
    from reward_models.feedback.web.lock import only_server
    from reward_models.feedback.web.serve import Server, tokens_from
except ImportError:
    check_extra()
    raise

Several = Annotated[int, Ge(2), "A ranking needs two responses."]
SAMPLING, PLAN = Sampling(), Plan()


def demo(
    *, output: Path = Path("runs/feedback"), prompts: int = 60, k: int = 4, port: int = 0, open_browser: bool = True
) -> None:
    """Rank responses in a browser while a reward model learns from you. No set-up: the shipped model answers.

    Ctrl-C ends it; the same command goes on.

    Args:
        output: folder of the project file, demo.db.
        prompts: prompts of the embedded world, drawn at random.
        k: responses to each.
        port: to listen at; 0 takes a free one.
        open_browser: open the page in a browser.
    """
    check_value("prompts", prompts, PositiveInt)
    check_value("k", k, Several)
    model = replace(registry.language_model("assistant-sft"), name="assistant-sft")
    sampling, plan = Sampling(max_new_tokens=24), Plan(overlap=0.0)
    settings = {"prompts": prompts, "k": k, **asdict(sampling)}
    with Project.create(output / "demo.db", "ranking", settings, guidelines=ASSISTANT) as project:
        chosen = _sample(registry.prompt_set("assistant-train"), prompts, seed=sampling.seed)
        with progress_bar("responses") as advance:
            add_sampled(project, chosen, [model], k, sampling, plan, advance)
        live = LiveModel(project, model)
        live.answered()
        app = App(project, tokens_from(None, "127.0.0.1"), live=live.figures, answered=live.answered)
        _run(project, app, "127.0.0.1", port, open_browser=open_browser)


def create(
    project: tyro.conf.Positional[Path],
    *,
    prompts: str | None = None,
    model: list[str] = [],  # noqa: B006  (tyro reads the default)
    k: int = 4,
    data: str | None = None,
    split: str | None = None,
    format: str | None = None,
    checks: str | None = None,
    guidelines: Path | None = None,
    limit: int | None = None,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = SAMPLING,
    plan: Annotated[Plan, tyro.conf.arg(name="")] = PLAN,
    device: str = "cpu",
    dtype: Precision = "float32",
) -> None:
    """Make a project file for people to rank: responses of models to prompts, or those of existing preferences.

    The same command again goes on where it stopped.

    Args:
        project: file to make, like answers.db.
        prompts: a registered name, a file (JSONL, JSON, CSV, Parquet) with "prompt", a data set folder or hub id.
        model: language models that answer, in turn: registered names, folders or hub ids.
        k: different responses to each prompt, 2 or more.
        data: preferences whose responses are ranked anew, in any layout (`textenv reward --help` lists them), instead
            of prompts and model.
        split: of a data set that has several; default "train".
        format: layout of data and checks, as name or name:option; default: the one that their keys show.
        checks: preferences with a known ranking, which everyone is asked now and then.
        guidelines: Markdown file that annotators see beside each item.
        limit: use at most so many prompts or records.
        sampling: how models answer.
        plan: who ranks what.
        device: where the models run.
        dtype: precision of the models.
    """
    check_value("k", k, Several)
    if (data is None) == (prompts is None) or (prompts is not None) != bool(model):
        raise ValueError(
            f"a project must be made of prompts and a model, or of data, got prompts {prompts!r}, model {model!r} and "
            f"data {data!r}. Give --prompts and --model, or --data."
        )
    check_device(device)
    text = _read(guidelines)
    known = load_rankings(checks, format=format) if checks else []
    if data is not None:
        records = load_rankings(data, split=split, format=format)[:limit]
        with Project.create(
            project, "ranking", {"data": data, "records": _digest(records), **_plan(plan, sampling)}, guidelines=text
        ) as made:
            add_rankings(made, records, plan, sampling.seed)
            add_rankings(made, known, plan, sampling.seed, checks=True)
            _say_made(made)
        return
    assert prompts is not None
    found = _prompts(prompts, split, limit)
    models = [replace(registry.language_model(name, device, dtype), name=name) for name in model]
    settings = {"prompts": prompts, "models": model, "k": k, "records": _digest(found.prompts)}
    settings |= {**asdict(sampling), **_plan(plan, sampling)}
    with Project.create(project, "ranking", settings, guidelines=text) as made:
        with progress_bar("responses") as advance:
            short = add_sampled(made, found, models, k, sampling, plan, advance)
        add_rankings(made, known, plan, sampling.seed, checks=True)
        if short:
            print(
                f"{short} of {len(found.prompts)} prompts have fewer than {k} different responses; a higher "
                "temperature gives more.",
                file=sys.stderr,
            )
        _say_made(made)


def serve(
    project: tyro.conf.Positional[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    token_variable: str | None = None,
    lease_minutes: float = 5.0,
    guidelines: Path | None = None,
    order: Literal["given", "uncertain"] = "given",
    reward_model: list[str] = [],  # noqa: B006
    open_browser: bool = False,
) -> None:
    """Serve a project to browsers until Ctrl-C. It prints a link for annotators and one for you, with the dashboard.

    Args:
        project: file that `create` or `arena` made.
        host: address to listen at; any but this machine's own needs a token that you chose.
        port: to listen at; 0 takes a free one.
        token_variable: environment variable with the annotators' token; None makes one up.
        lease_minutes: how long an item waits for the page that has it; an open page renews it.
        guidelines: Markdown file that replaces the project's guidelines.
        order: "uncertain" asks first where the reward models disagree most.
        reward_model: two or more reward models for that order: registered names, folders or hub ids.
        open_browser: open the page in a browser.
    """
    check_value("lease_minutes", lease_minutes, Positive)
    tokens = tokens_from(token_variable, host)
    with Project(project) as opened:
        if guidelines is not None:
            opened.set_guidelines(_read(guidelines))
        if order == "uncertain":
            with progress_bar("disagreement of reward models") as advance:
                order_by_disagreement(opened, [registry.reward_model(name) for name in reward_model], advance)
        app = App(opened, tokens, lease_seconds=60 * lease_minutes)
        _run(opened, app, host, port, open_browser=open_browser)


def arena(
    model: tyro.conf.Positional[list[str]],
    *,
    prompts: str,
    project: Path,
    judge: str | None = None,
    split: str | None = None,
    guidelines: Path | None = None,
    limit: int | None = None,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = SAMPLING,
    plan: Annotated[Plan, tyro.conf.arg(name="")] = PLAN,
    device: str = "cpu",
    dtype: Precision = "float32",
    host: str = "127.0.0.1",
    port: int = 8080,
    token_variable: str | None = None,
    open_browser: bool = False,
    as_json: Json = False,
) -> None:
    """Compare models blind, two responses side by side: by people in a browser, or by a reward model.

    The same command again goes on where it stopped. It ends with win rates, sign tests and Bradley–Terry ratings.

    Args:
        model: two or more language models: registered names, folders or hub ids.
        prompts: a registered name, a file (JSONL, JSON, CSV, Parquet) with "prompt", a data set folder or hub id.
        project: file to keep responses and answers in, like arena.db.
        judge: reward model that judges in the place of people: a registered name, module:callable, folder or hub id.
        split: of a data set that has several; default "train".
        guidelines: Markdown file that annotators see beside each item.
        limit: use at most so many prompts.
        sampling: how models answer.
        plan: who compares what.
        device: where the models run.
        dtype: precision of the models.
        host: address to listen at; any but this machine's own needs a token that you chose.
        port: to listen at; 0 takes a free one.
        token_variable: environment variable with the annotators' token; None makes one up.
        open_browser: open the page in a browser.
    """
    if len(model) < 2 or len(set(model)) < len(model):
        raise ValueError(f"an arena must have two or more different models, got {model}. Name another.")
    check_device(device)
    tokens = tokens_from(token_variable, host)
    judging = None if judge is None else registry.reward_model(judge, device)
    found = _prompts(prompts, split, limit)
    models = [replace(registry.language_model(name, device, dtype), name=name) for name in model]
    settings = {"prompts": prompts, "models": model, "records": _digest(found.prompts)}
    settings |= {**asdict(sampling), **_plan(plan, sampling)}
    with Project.create(project, "arena", settings, guidelines=_read(guidelines)) as made:
        with progress_bar("responses") as advance:
            add_battles(made, found, models, sampling, plan, advance)
        if judging is None:
            try:
                _run(made, App(made, tokens), host, port, open_browser=open_browser)
            finally:
                battles = battles_of(made.items(), made.annotations())
                if battles:
                    _show_battles(battles, as_json)
        else:
            _show_battles(judged(made.items(), judging), as_json)


def export_project(
    project: tyro.conf.Positional[Path], *, output: Path, by: By = "annotator", as_json: Json = False
) -> None:
    """Write what people said as rankings and pairs that `textenv reward --data` reads, raw rows and a data card.

    Args:
        project: file that `create` or `arena` made.
        output: folder for rankings.jsonl, pairs.jsonl, raw.jsonl and README.md.
        by: one ranking per annotator and item, or the consensus of each item's annotators by Bradley–Terry.
    """
    check_replaceable(output)
    with Project(project) as opened:
        counts = export(opened, output, by=by)
    show({**counts, "data": str(output / "rankings.jsonl")}, as_json)


def _run(project: Project, app: App, host: str, port: int, *, open_browser: bool) -> None:
    """Serve until Ctrl-C."""
    with only_server(project.path):
        server = Server(app, host=host, port=port)
        print(f"annotators: {server.link('annotator')}\nyou, with the dashboard: {server.link('owner')}", flush=True)
        if open_browser:
            webbrowser.open(server.link("owner"))
        server.run()


def _prompts(prompts: str, split: str | None, limit: int | None) -> PromptSet:
    if limit is not None:
        check_value("limit", limit, PositiveInt)
    found = registry.prompt_set(prompts if split is None else {"dataset": prompts, "split": split})
    columns = {name: values[:limit] for name, values in found.columns.items()}
    return PromptSet(found.prompts[:limit], columns, found.places[:limit])


def _sample(prompts: PromptSet, count: int, seed: int) -> PromptSet:
    numbers = random.Random(seed).sample(range(len(prompts.prompts)), min(count, len(prompts.prompts)))
    places = tuple(prompts.place(number) for number in numbers)
    return PromptSet(tuple(prompts.prompts[number] for number in numbers), {}, places)


def _read(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"guidelines must be a file of UTF-8 text, got {str(file)!r}: {error}. Check the path, or save it as UTF-8."
        ) from None


def _plan(plan: Plan, sampling: Sampling) -> dict[str, object]:
    return {**asdict(plan), "seed": sampling.seed}


def _digest(records: Sequence[object]) -> str:
    """Tells other prompts or records behind the same path."""
    return hashlib.sha256(repr(records).encode()).hexdigest()[:16]


def _say_made(project: Project) -> None:
    print(f"{project.count()} items in {project.path}. Rank them: textenv feedback serve {project.path}")


def _show_battles(battles: list[Battle], as_json: bool) -> None:
    """Win rates and ratings on standard output."""
    found, rated = matches(battles), ratings(battles)
    if as_json:
        print(json.dumps({"matches": [m._asdict() for m in found], "ratings": [r._asdict() for r in rated]}, indent=2))
        return
    print_table(
        "each against each; win rate of the first with ties as half, 95 % by Wilson; p of the exact sign test",
        ("models", "wins", "ties", "losses", "win rate, %", "95 %", "p"),
        [match_row(match) for match in found],
    )
    print_table(
        "Bradley–Terry ratings on the Elo scale, 95 % by bootstrap over prompts",
        ("model", "rating", "95 %", "battles"),
        [rating_row(rating) for rating in rated],
    )
