"""A real Chromium without a window, driven by Playwright; skipped where either is missing."""

import os
import shutil

import pytest

from tests.reward_models.feedback.conftest import TOKENS, clock, make_project, serve  # noqa: F401  (fixtures)

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("axe_playwright_python")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def chromium():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: install it, or name it in CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root in a container
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens the pages of a server as a person; a script error or a broken policy fails the test."""
    contexts, complaints = [], []

    def start(server, name="", role="annotator", **options):
        context = chromium.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.goto(f"{server.url}?token={TOKENS[role]}")
        page.wait_for_url(server.url)
        if name:
            page.fill("#name", name)
            page.keyboard.press("Enter")
            page.wait_for_selector("main#item, h1:has-text('Nothing left')")
        page.wait_for_load_state()  # its script runs before a key is pressed
        page.complaints = complaints
        return page

    yield start
    for context in contexts:
        context.close()
    assert complaints == []
