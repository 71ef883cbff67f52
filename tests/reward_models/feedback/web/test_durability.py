"""Nothing that the server acknowledged is lost, and nothing is there twice, however the server dies."""

import multiprocessing
import random
import socket
import threading
import time

import httpx2

from reward_models.feedback.project import Project
from tests.reward_models.feedback.conftest import TOKENS

KILLS = 20
ANNOTATORS = 8


def serve_forever(path, port):
    from reward_models.feedback.web.app import App
    from reward_models.feedback.web.serve import Server

    Server(App(Project(path), TOKENS), port=port).run()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def insist(work, stop):
    """What ``work`` returns, tried again while the server is down."""
    while not stop.is_set():
        try:
            return work()
        except httpx2.TransportError:
            time.sleep(0.01)
    return None


def annotate(url, name, acknowledged, stop):
    """Rank until told to stop, as a page does: an answer is sent again under its name until it is acknowledged."""
    with httpx2.Client(base_url=url, timeout=5) as client:
        insist(lambda: client.get("/", params={"token": TOKENS["annotator"]}), stop)
        page = insist(lambda: client.get("/"), stop)
        client.headers["X-CSRF-Token"] = page.text.partition('name="csrf" content="')[2][:64]
        insist(lambda: client.post("/api/join", json={"name": name}), stop)
        number = 0
        while not stop.is_set():
            lease = insist(lambda: client.get("/api/next"), stop)
            if lease is None or lease.json()["item"] is None:
                return
            item = lease.json()["item"]
            number += 1
            answer = {"ranking": [[1], [0]], "request": f"{name}-request-{number}"}
            reply = insist(lambda: client.post(f"/api/items/{item}", json=answer), stop)  # noqa: B023
            if reply is not None:
                assert reply.status_code == 200, reply.text
                acknowledged.append((answer["request"], item))


def test_a_server_killed_at_any_moment_loses_and_doubles_nothing(make_project):
    project = make_project(items=4_000, k=2)
    path = project.path
    project.close()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reward_models.feedback.web.app", "reward_models.feedback.web.serve"])
    port, stop = free_port(), threading.Event()
    lists = [[] for _ in range(ANNOTATORS)]
    people = [
        threading.Thread(target=annotate, args=(f"http://127.0.0.1:{port}", f"annotator-{i}", acknowledged, stop))
        for i, acknowledged in enumerate(lists)
    ]
    rng = random.Random(0)
    for person in people:
        person.start()
    for _ in range(KILLS):
        server = context.Process(target=serve_forever, args=(path, port), daemon=True)
        before = sum(map(len, lists))
        server.start()
        while sum(map(len, lists)) < before + 5:  # at work again
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        server.kill()
        server.join()
    stop.set()
    for person in people:
        person.join()
    acknowledged = [answer for own in lists for answer in own]
    with Project(path) as project:
        kept = {row["request"]: row["item"] for row in project.rows("SELECT request, item FROM annotations")}
        standing = project.annotations()
    assert len(acknowledged) == len(dict(acknowledged)) >= 5 * KILLS
    assert dict(acknowledged).items() <= kept.items()
    assert len(kept) - len(acknowledged) <= ANNOTATORS * KILLS  # saved, but killed before it could say so
    assert len(standing) == len(kept) == len({said.item for said in standing})  # one annotator an item, once
