"""Step 3 of the demo with a person in the place of the simulated annotators."""

import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

POLL_SECONDS = 0.3


def people_rank(
    file: Path,
    prompts: Sequence[Any],
    answers: Sequence[Sequence[str]],
    finish_reasons: Sequence[Sequence[str]],
    console: Console,
    advance: Callable[[int, int], object],
) -> list[dict[str, Any]]:
    """Wait until every prompt's answers are ranked or skipped in a browser; returns the rankings.

    What was ranked is in the project ``file``: an interrupted call goes on there.
    """
    from reward_models.feedback.export import records
    from reward_models.feedback.guidelines import ASSISTANT
    from reward_models.feedback.project import NewItem, Project, Response
    from reward_models.feedback.web.app import App
    from reward_models.feedback.web.lock import only_server
    from reward_models.feedback.web.serve import Server, tokens_from

    with Project.create(file, "ranking", {"prompts": len(prompts)}, guidelines=ASSISTANT) as project:
        items = []
        for place, (prompt, texts, reasons) in enumerate(zip(prompts, answers, finish_reasons, strict=True)):
            first = {text: Response(text, "sft", finish_reason=reason) for text, reason in zip(texts, reasons)}
            if len(first) > 1:  # else there is nothing to rank
                items.append(NewItem(f"prompt {place}", prompt, list(first.values())))
        project.add_items(items)
        app = App(project, tokens_from(None, "127.0.0.1"))
        with only_server(file), Server(app) as server:
            link = server.link("owner")
            console.print(f"Rank the answers of {len(items)} prompts in your browser:\n{link}", soft_wrap=True)
            webbrowser.open(link)
            while (done := len({said.item for said in project.annotations()})) < len(items):
                advance(done, len(items))
                time.sleep(POLL_SECONDS)
        return list(records(project.items(), project.annotations(), "annotator"))
