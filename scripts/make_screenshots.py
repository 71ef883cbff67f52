"""Pictures of the pages where people rank, by a real Chromium: desktop and phone, light and dark.

Command: ``make screenshots``. The picture of the README is ``docs/feedback.png``: the ranking page, made anew by
``python -m scripts.make_screenshots --readme``.
"""

import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import tyro
from playwright.sync_api import sync_playwright

from reward_models.feedback.create import Plan, Sampling, add_battles, add_sampled
from reward_models.feedback.guidelines import ASSISTANT
from reward_models.feedback.project import Project
from reward_models.feedback.web.app import App
from reward_models.feedback.web.serve import Server, tokens_from
from textenv import registry
from textenv.data.records import PromptSet
from textenv.tasks import assistant

VIEWPORTS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@contextmanager
def served(folder: str, kind: Any, people: int) -> Iterator[Server]:
    """A project of the embedded world in which some people have answered."""
    prompts = PromptSet(tuple(prompt.text for prompt in assistant.prompts("train")[:40]), {})
    model = replace(registry.language_model("assistant-sft"), name="assistant-sft")
    sampling, plan = Sampling(max_new_tokens=24), Plan(overlap=1.0, annotators=people + 1)
    with Project.create(Path(folder) / f"{kind}.db", kind, {}, guidelines=ASSISTANT) as project:
        if kind == "arena":
            twin = replace(model, name="its twin")
            add_battles(project, prompts, [model, twin], sampling, plan, lambda *_: None)
        else:
            add_sampled(project, prompts, [model], 4, sampling, plan, lambda *_: None)
        app = App(project, tokens_from(None, "127.0.0.1"))
        with Server(app) as server:
            for number in range(people):
                annotate(server, f"annotator {number + 1}", number)
            yield server


def annotate(server: Server, name: str, seed: int) -> None:
    """A simulated annotator answers over HTTP."""
    rng = random.Random(seed)
    url, _, token = server.link("annotator").partition("?token=")
    with httpx2.Client(base_url=url) as client:
        client.get("/", params={"token": token})
        found = re.search(r'name="csrf" content="(\w+)"', client.get("/").text)
        assert found
        client.headers["X-CSRF-Token"] = found[1]
        client.post("/api/join", json={"name": name})
        for number in range(12):
            lease = client.get("/api/next").json()
            if lease["item"] is None:
                return
            (record,) = assistant.sample_rankings([lease["prompt"]], [lease["responses"]], rng.randrange(10**6))
            answer = {"ranking": [[i] for i in record["ranking"]], "request": f"request-{seed}-{number}"}
            client.post(f"/api/items/{lease['item']}", json=answer | {"seconds": rng.uniform(5, 20)})


def rank_three(page: Any) -> None:
    """Rank the first three responses by gold, with keys."""
    prompt = page.inner_text(".conversation .text")
    texts = page.locator(".card .text").all_inner_texts()
    (record,) = assistant.sample_rankings([prompt], [texts], 0, temperature=0.01)
    for number in range(3):
        page.keyboard.press(str(record["ranking"].index(number) + 1))


def main(output: Path = Path("runs/screenshots"), readme: bool = False) -> None:
    """Make the pictures.

    Args:
        output: folder for them.
        readme: make docs/feedback.png instead.
    """
    browser_path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise SystemExit("screenshots need Chromium, got none on the path. Install it, or name it in CHROMIUM.")
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for kind in ("ranking",) if readme else ("ranking", "arena"):
            with served(folder, kind, people=3) as server:
                for view, viewport in VIEWPORTS.items():
                    for scheme in ("light", "dark"):
                        if readme and (view, scheme) != ("desktop", "light"):
                            continue
                        context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
                        page = context.new_page()
                        page.goto(server.link("owner"))
                        page.wait_for_url(server.url)
                        page.fill("#name", "Ann" if readme else f"{view} {scheme}")
                        page.keyboard.press("Enter")
                        page.wait_for_selector("#item")
                        while readme and "(an empty response)" in page.inner_text("#cards"):
                            with page.expect_navigation():
                                page.keyboard.press("s")
                        if kind == "ranking":
                            rank_three(page)
                        if readme:
                            page.screenshot(path="docs/feedback.png", full_page=True)
                            continue
                        page.screenshot(path=output / f"{kind}-{view}-{scheme}.png", full_page=True)
                        page.goto(server.url + "dashboard")
                        page.screenshot(path=output / f"{kind}-dashboard-{view}-{scheme}.png", full_page=True)
                        context.close()
        browser.close()


if __name__ == "__main__":
    tyro.cli(main)
