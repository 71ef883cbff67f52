"""Small projects, a clock that tests move, and browsers without a window: clients with a cookie and a page's token."""

import re

import httpx2
import pytest

from reward_models.feedback.project import NewItem, Project, Response
from reward_models.feedback.web.app import App
from reward_models.feedback.web.serve import Server

TOKENS = {"annotator": "annotators-token-of-the-tests", "owner": "owners-token-of-the-tests"}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_project(tmp_path):
    """Makes a project of so many items with K responses, whose texts say item and place."""
    made = []

    def make(items=3, k=4, needed=1, kind="ranking", name="project.db", guidelines="", **settings):
        project = Project.create(tmp_path / name, kind, {"seed": 0, **settings}, guidelines=guidelines)
        made.append(project)
        project.add_items(
            [
                NewItem(
                    f"prompt {i}",
                    f"prompt {i}",
                    [Response(f"response {i} {place}", f"model {place}") for place in range(k)],
                    needed=needed,
                    turn=i % 2,
                )
                for i in range(items)
            ]
        )
        return project

    yield make
    for project in made:
        project.close()


class Person:
    """An annotator at a browser, as programs see one."""

    def __init__(self, server, name, role="annotator"):
        self.client = httpx2.Client(base_url=server.url, timeout=60)
        self.welcome = self.client.get("/", params={"token": TOKENS[role]})
        self.client.headers["X-CSRF-Token"] = self.csrf(self.client.get("/"))
        if name:
            assert self.post("/api/join", {"name": name}).status_code == 200

    def csrf(self, page):
        return re.search(r'name="csrf" content="(\w+)"', page.text)[1]

    def post(self, path, body, **options):
        return self.client.post(path, json=body, **options)

    def next(self):
        return self.client.get("/api/next").json()

    def answer(self, item, ranking, request, **fields):
        return self.post(f"/api/items/{item}", {"ranking": ranking, "request": request, **fields})


@pytest.fixture
def serve(clock):
    """Serves a project; returns a function that opens a browser for a name."""
    running = []
    people = []

    def start(project, **options):
        server = Server(App(project, TOKENS, clock=clock, **options))
        server.__enter__()
        running.append(server)

        def person(name="", role="annotator"):
            people.append(Person(server, name, role))
            return people[-1]

        person.server = server
        return person

    yield start
    for person in people:
        person.client.close()
    for server in running:
        server.__exit__()
