"""How long do annotators wait for the page where they rank?

As many annotators as asked for work at once over loopback, each in a thread with a connection of its own: load the
page, save four drafts, send the ranking. Between two requests each thinks, so that an item takes ``--seconds`` in the
mean: 5 are a hurried person. The server runs in a process of its own with its default settings; every answer is
committed with ``synchronous=FULL``. The wait is the time from a request to its whole answer.

Beside it, the same server's answer to a file that needs no database: what Starlette, uvicorn and this client cost.

Command: ``python -m benchmarks.feedback_latency`` (about a minute).
"""

import multiprocessing
import random
import re
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import tyro

from benchmarks.record import write_result
from reward_models.feedback.project import NewItem, Project, Response
from reward_models.feedback.web.security import Role
from textenv.pages.terminal import print_table

TOKENS: dict[Role, str] = {"annotator": "annotators-token", "owner": "owners-token-too"}
K, DRAFTS = 4, 4


def serve(path: Path, connection) -> None:
    """Run the server, and say where."""
    from reward_models.feedback.web.app import App
    from reward_models.feedback.web.serve import Server

    server = Server(App(Project(path), TOKENS))
    connection.send(server.url)
    server.run()


def annotate(url: str, name: str, until: float, seconds: float, waits: dict[str, list[float]]) -> None:
    """Rank items until the time is over."""
    rng = random.Random(name)
    with httpx2.Client(base_url=url, timeout=60) as client:

        def ask(what: str, method: str, path: str, **options) -> httpx2.Response:
            time.sleep(rng.expovariate((DRAFTS + 2) / seconds))
            start = time.perf_counter()
            answer = client.request(method, path, **options)
            waits[what].append(time.perf_counter() - start)
            assert answer.status_code == 200, answer.text
            return answer

        client.get("/", params={"token": TOKENS["annotator"]})
        client.headers["X-CSRF-Token"] = re.search(r'name="csrf" content="(\w+)"', client.get("/").text)[1]  # type: ignore[index]
        client.post("/api/join", json={"name": name})
        number = 0
        while time.time() < until:
            page = ask("page", "GET", "/").text
            item = int(re.search(r"&#34;id&#34;: (\d+)", page)[1])  # type: ignore[index]
            ask("file", "GET", "/static/page.js")
            for draft in range(DRAFTS):
                ask("draft", "PUT", f"/api/items/{item}/draft", json={"comment": "x" * draft})
            ranking = [[place] for place in rng.sample(range(K), K)]
            number += 1
            answer = {"ranking": ranking, "request": f"{name}-request-{number}"}
            ask("answer", "POST", f"/api/items/{item}", json=answer)


def main(annotators: int = 50, duration: float = 30.0, seconds: float = 5.0) -> None:
    """Measure, print and write the waits.

    Args:
        annotators: people at work at once.
        duration: of the measurement, seconds.
        seconds: that a person takes for an item, in the mean.
    """
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "project.db"
    with Project.create(path, "ranking", {"seed": 0}) as project:
        responses = [[Response(f"response {i} {place} " + "word " * 60) for place in range(K)] for i in range(5_000)]
        project.add_items([NewItem(f"{i}", f"prompt {i}", own, needed=1 + i % 2) for i, own in enumerate(responses)])
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(path, there), daemon=True)
    server.start()
    url = here.recv()
    waits: dict[str, list[float]] = {"page": [], "file": [], "draft": [], "answer": []}
    until = time.time() + duration
    people = [
        threading.Thread(target=annotate, args=(url, f"annotator-{i}", until, seconds, waits))
        for i in range(annotators)
    ]
    for person in people:
        person.start()
    for person in people:
        person.join()
    server.terminate()
    with Project(path) as project:
        assert len(project.annotations()) == len(waits["answer"])
    waits["all"] = [wait for own in waits.values() for wait in own]
    figures = {
        what: {"requests": len(own)} | {f"p{p}_ms": round(1000 * float(np.percentile(own, p)), 2) for p in (50, 95, 99)}
        for what, own in waits.items()
    }
    print_table(
        f"{annotators} annotators, an item in {seconds:g} s each, {duration:g} s: waits, ms",
        ("request", "number", "median", "95 %", "99 %"),
        [(what, *map(str, own.values())) for what, own in figures.items()],
    )
    settings = {"annotators": annotators, "duration_seconds": duration, "seconds_per_item": seconds}
    write_result("feedback_latency", {**settings, "waits": figures})


if __name__ == "__main__":
    tyro.cli(main)
