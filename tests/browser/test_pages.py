"""People at the pages: by keys, by drag, on a phone, with a lost connection, and with nobody left out."""

import re
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from reward_models.feedback.project import NewItem, Response
from tests.browser.conftest import PHONE

GUIDELINES = "# Rules\n1. **helpful** first\n2. then [kind](https://example.org)"


def shown(project, item=1, name="Ann"):
    """Places of an item's responses, in the order of a person's page."""
    query = "SELECT shown FROM leases JOIN annotators ON annotators.id = annotator WHERE item = ? AND name = ?"
    return [int(place) for place in re.findall(r"\d+", project.rows(query, item, name)[0]["shown"])]


def ranks(page):
    return {
        card.get_attribute("data-number"): card.locator(".rank").inner_text() for card in page.locator(".card").all()
    }


def next_page(page, work):
    """Do what leads to another page, and wait for it."""
    with page.expect_navigation():
        work()


def follow(page, link):
    next_page(page, lambda: page.click(f"text={link}"))


def intercept(page, path, work):
    """Handle requests by hand, from the page's next load on: one that runs may send a few before it knows."""
    page.route(path, work)
    page.reload()


def drag(page, number, onto, part):
    """Drag a response to a part (0 the top, 1 the bottom) of another."""
    handle = page.locator(f'[data-number="{number}"] .handle').bounding_box()
    page.mouse.move(handle["x"] + 8, handle["y"] + 8)
    page.mouse.down()
    target = page.locator(f'[data-number="{onto}"]').bounding_box()  # the list may have moved
    place = target["y"] + part * target["height"]
    page.mouse.move(target["x"] + 60, place, steps=6)
    page.mouse.up()


def test_an_item_is_ranked_by_keys_alone(make_project, serve, open_page):
    project = make_project(items=2, k=4)
    page = open_page(serve(project).server, "Ann")
    assert page.locator(":focus").get_attribute("data-number") == "0"
    for key in "2114":
        page.keyboard.press(key)
    assert ranks(page) == {"0": "3rd", "1": "tied 1st", "2": "tied 1st", "3": "4th"}
    page.keyboard.press("ArrowUp")
    page.keyboard.press("h")
    page.keyboard.press("c")
    page.keyboard.type("2 is a number here, u and s letters")
    page.keyboard.press("Escape")
    order = shown(project)
    next_page(page, lambda: page.keyboard.press("Enter"))
    (said,) = project.annotations()
    assert said.ranking == (tuple(sorted((order[1], order[2]))), (order[0],), (order[3],))
    assert said.flags == {str(order[2]): "harmful"}
    assert said.comment == "2 is a number here, u and s letters"
    assert page.locator(".progress").inner_text().startswith("1 of 2")


def test_keys_clear_skip_and_can_be_switched_off(make_project, serve, open_page):
    project = make_project(items=3, k=2)
    page = open_page(serve(project).server, "Ann")
    page.keyboard.press("1")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("0")
    assert ranks(page) == {"0": "", "1": ""}
    page.keyboard.press("Enter")  # not complete: nothing happens
    page.uncheck("#keys")
    page.locator(".card").first.focus()
    page.keyboard.press("1")
    assert ranks(page) == {"0": "", "1": ""}
    page.reload()
    assert not page.is_checked("#keys")
    page.check("#keys")
    page.locator(".card").first.focus()
    next_page(page, lambda: page.keyboard.press("s"))
    assert [said.action for said in project.annotations()] == ["skip"]


def test_an_item_is_ranked_by_drag(make_project, serve, open_page):
    project = make_project(items=2, k=4)
    page = open_page(serve(project).server, "Ann")
    drag(page, 3, onto=0, part=0.1)
    assert ranks(page) == {"3": "1st", "0": "2nd", "1": "3rd", "2": "4th"}
    drag(page, 0, onto=2, part=0.9)
    assert ranks(page) == {"3": "1st", "1": "2nd", "2": "3rd", "0": "4th"}
    drag(page, 1, onto=2, part=0.5)
    assert ranks(page) == {"3": "1st", "2": "tied 2nd", "1": "tied 2nd", "0": "4th"}
    drag(page, 3, onto=3, part=0.5)  # nowhere
    order = shown(project)
    next_page(page, lambda: page.click("#submit"))
    (said,) = project.annotations()
    assert said.ranking == ((order[3],), tuple(sorted((order[1], order[2]))), (order[0],))


def test_buttons_scores_and_flags(make_project, serve, open_page, clock):
    project = make_project(items=1, k=2)
    page = open_page(serve(project).server, "Ann")
    for number, rank in ((0, 2), (1, 1)):
        page.click(f'[data-number="{number}"] [data-rank="{rank}"]')
    page.click('[data-number="0"] summary')
    page.select_option('[data-number="0"] [data-scale="safe"]', "4")
    page.click('[data-number="1"] [data-flag="nonsense"]')
    order = shown(project)
    clock.now += 60
    next_page(page, lambda: page.click("#submit"))
    (said,) = project.annotations()
    assert said.ranking == ((order[1],), (order[0],))
    assert said.scores == {str(order[0]): {"safe": 4}}
    assert said.flags == {str(order[1]): "nonsense"}
    assert 0 < said.seconds < 60
    assert "Nothing left" in page.inner_text("h1")


def test_a_reload_in_the_middle_undo_and_the_end(make_project, serve, open_page):
    project = make_project(items=2, k=3)
    page = open_page(serve(project).server, "Ann")
    page.keyboard.press("3")
    page.keyboard.press("1")
    page.fill("#comment", "half")
    expect(page.locator("#saved")).to_have_text("draft saved")
    before = page.locator(".card .text").all_inner_texts()
    page.reload()
    assert page.locator(".card .text").all_inner_texts() == before
    assert ranks(page) == {"0": "3rd", "1": "1st", "2": ""}
    assert page.input_value("#comment") == "half"
    page.locator('[data-number="2"]').focus()
    page.keyboard.press("3")
    assert ranks(page) == {"0": "tied 2nd", "1": "1st", "2": "tied 2nd"}
    next_page(page, lambda: page.keyboard.press("Enter"))
    next_page(page, lambda: page.keyboard.press("u"))
    assert ranks(page) == {"0": "tied 2nd", "1": "1st", "2": "tied 2nd"}
    assert project.annotations() == []
    page.locator('[data-number="2"]').focus()
    page.keyboard.press("1")
    next_page(page, lambda: page.keyboard.press("Enter"))
    for key in "123":
        page.keyboard.press(key)
    next_page(page, lambda: page.keyboard.press("Enter"))
    assert "Nothing left" in page.inner_text("h1")
    next_page(page, lambda: page.click("#undo"))
    next_page(page, lambda: page.click("#submit"))
    assert [said.item for said in project.annotations()] == [1, 2]
    assert len(project.history()) == 6  # four answers and two undone


def test_a_second_press_does_not_take_back_one_more(make_project, serve, open_page):
    project = make_project(items=3, k=2)
    page = open_page(serve(project).server, "Ann")
    for _ in range(2):
        for key in "12":
            page.keyboard.press(key)
        next_page(page, lambda: page.keyboard.press("Enter"))
    intercept(page, "**/items/*", lambda route: page.wait_for_timeout(300) or route.continue_())  # a slow next page
    with page.expect_navigation(url="**/items/2"):
        page.evaluate("for (let i = 0; i < 2; i++) setTimeout(() => document.querySelector('#undo').click(), 60 * i)")
    assert [row["action"] for row in project.history()] == ["rank", "rank", "undo"]


def test_a_key_that_is_held_down_answers_once(make_project, serve, open_page):
    project = make_project(items=3, k=2, kind="arena")
    page = open_page(serve(project).server, "Ann")
    next_page(page, lambda: page.keyboard.down("t"))
    page.wait_for_selector("main#item")
    page.keyboard.down("t")  # the same press goes on
    page.wait_for_timeout(300)
    assert len(project.annotations()) == 1
    page.keyboard.up("t")
    next_page(page, lambda: page.keyboard.press("t"))
    assert len(project.annotations()) == 2


def test_without_storage_the_page_works(make_project, serve, open_page):
    project = make_project(items=1, k=2)
    page = open_page(serve(project).server)
    page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})")
    page.fill("#name", "Ann")
    next_page(page, lambda: page.keyboard.press("Enter"))
    page.uncheck("#keys")
    page.check("#keys")
    page.locator(".card").first.focus()
    for key in "12":
        page.keyboard.press(key)
    next_page(page, lambda: page.keyboard.press("Enter"))
    assert len(project.annotations()) == 1


def test_leaving_the_page_saves_what_was_just_written(make_project, serve, open_page):
    project = make_project(items=1, k=2)
    server = serve(project).server
    page = open_page(server, "Ann")
    page.fill("#comment", "in a hurry")
    page.goto(server.url + "answered")
    deadline = time.monotonic() + 15
    while "in a hurry" not in project.rows("SELECT draft FROM leases")[0]["draft"]:
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def test_an_answer_waits_for_a_draft_that_is_on_its_way(make_project, serve, open_page):
    project = make_project(items=2, k=2)
    page = open_page(serve(project).server, "Ann")
    drafts, answers = [], []
    intercept(page, "**/api/items/1/draft", lambda route: drafts.append(route))  # held back
    page.on("request", lambda request: request.method == "POST" and answers.append(request.url))
    with page.expect_request("**/api/items/1/draft"):
        page.keyboard.press("1")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    assert (len(drafts), answers) == (1, [])
    next_page(page, lambda: drafts[0].continue_())
    assert len(answers) == len(project.annotations()) == 1
    assert project.rows("SELECT draft FROM leases WHERE item = 1")[0]["draft"] == "{}"


def test_an_earlier_answer_is_changed(make_project, serve, open_page):
    project = make_project(items=2, k=2)
    page = open_page(serve(project).server, "Ann")
    for _ in range(2):
        page.keyboard.press("1")
        page.keyboard.press("2")
        next_page(page, lambda: page.keyboard.press("Enter"))
    follow(page, "Earlier answers")
    follow(page, "prompt 0")
    assert ranks(page) == {"0": "1st", "1": "2nd"}
    page.keyboard.press("2")
    page.locator('[data-number="1"]').focus()
    page.keyboard.press("1")
    next_page(page, lambda: page.click("#submit"))
    assert page.url.endswith("/answered")
    order = shown(project)
    said = {said.item: said.ranking for said in project.annotations()}
    assert said[1] == ((order[1],), (order[0],))


def test_two_browsers_at_once_never_have_the_same_item(make_project, serve, open_page):
    project = make_project(items=8, k=2)
    server = serve(project).server
    pages = [open_page(server, name) for name in ("Ann", "Bob")]
    seen = [[], []]
    for _ in range(4):
        for page, own in zip(pages, seen, strict=True):
            own.append(page.inner_text(".conversation"))
        assert seen[0][-1] != seen[1][-1]
        for page in pages:
            page.keyboard.press("1")
            page.keyboard.press("2")
            next_page(page, lambda page=page: page.keyboard.press("Enter"))
    assert len(set(seen[0] + seen[1])) == 8
    assert len(project.annotations()) == 8


def test_battles_are_decided_by_one_key(make_project, serve, open_page):
    project = make_project(items=3, k=2, kind="arena")
    page = open_page(serve(project).server, "Ann")
    orders = []
    for item, key in enumerate(("ArrowLeft", "t", "ArrowRight"), start=1):
        orders.append(shown(project, item))
        next_page(page, lambda key=key: page.keyboard.press(key))
    first, tie, second = (said.ranking for said in project.annotations())
    assert first == tuple((place,) for place in orders[0])
    assert tie == ((0, 1),)
    assert second == tuple((place,) for place in reversed(orders[2]))


def test_a_lost_connection_is_said_and_nothing_is_lost(make_project, serve, open_page):
    project = make_project(items=1, k=2)
    page = open_page(serve(project).server, "Ann")
    page.keyboard.press("1")
    page.keyboard.press("2")
    expect(page.locator("#saved")).to_have_text("draft saved")
    page.context.set_offline(True)
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_contain_text("still on this page")
    page.context.set_offline(False)
    next_page(page, lambda: page.keyboard.press("Enter"))
    assert len(project.annotations()) == 1
    assert any("ERR_INTERNET_DISCONNECTED" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_an_answer_changed_after_its_confirmation_was_lost_is_the_one_that_counts(make_project, serve, open_page):
    project = make_project(items=1, k=2)
    page = open_page(serve(project).server, "Ann")
    path = "**/api/items/1"
    intercept(page, path, lambda route: (route.fetch(), route.abort()))  # it arrives, and the page never hears so
    for key in ("1", "2", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#message")).to_contain_text("still on this page")
    with page.expect_event("requestfailed"):
        page.keyboard.press("Enter")  # the same again
    expect(page.locator("#message")).to_contain_text("still on this page")
    assert len(project.history()) == 1
    page.unroute(path)
    for number, rank in ((0, 2), (1, 1)):
        page.click(f'[data-number="{number}"] [data-rank="{rank}"]')
    next_page(page, lambda: page.click("#submit"))
    (said,) = project.annotations()
    order = shown(project)
    assert said.ranking == ((order[1],), (order[0],))
    page.complaints.clear()  # the lost connections


def test_the_address_bar_and_scripts_do_not_know_the_token(make_project, serve, open_page):
    page = open_page(serve(make_project()).server, "Ann")
    assert "token" not in page.url
    assert page.evaluate("document.cookie") == ""


def test_texts_that_would_run_do_not(make_project, serve, open_page):
    payloads = ["<script>alert(1)</script>", '<img src=x onerror="alert(2)">', "<svg onload=alert(3)>", "\u202eevil"]
    project = make_project(items=0, guidelines=" ".join(payloads))
    project.add_items([NewItem("evil", payloads[0], [Response(text) for text in payloads])])
    page = open_page(serve(project).server, "<b>Ann</b>")
    texts = page.locator(".card .text").all_inner_texts()
    assert sorted(texts) == sorted([*payloads[:3], "⟦U+202E⟧evil"])
    assert page.locator("nav span").inner_text() == "<b>Ann</b>"
    page.wait_for_timeout(200)  # a dialog would be a complaint


def test_the_dashboard_follows_what_comes_in(make_project, serve, open_page, clock):
    project = make_project(items=2, k=2)
    person = serve(project)
    page = open_page(person.server, "Boss", role="owner")
    follow(page, "Dashboard")
    expect(page.locator("#figures")).to_contain_text("0 of 2")
    ann = person("Ann")
    item = ann.next()["item"]
    ann.answer(item, [[0], [1]], "request-1")
    clock.now += 10
    expect(page.locator("#figures")).to_contain_text("1 of 2", timeout=20_000)
    assert page.locator("#figures th[scope=row]").all_inner_texts() == ["Ann"]


@pytest.mark.parametrize("viewport", [None, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_a_serious_finding_of_axe(make_project, serve, open_page, scheme, viewport):
    options = {"color_scheme": scheme} | ({"viewport": viewport} if viewport else {})
    findings = []

    def check(page):
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"] for node in violation["nodes"]]
                findings.append((page.url, violation["id"], nodes))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing hangs out at the side

    for kind, k in (("ranking", 4), ("arena", 2)):
        project = make_project(items=2, k=k, kind=kind, name=f"{kind}.db", guidelines=GUIDELINES)
        server = serve(project).server
        page = open_page(server, role="owner", **options)
        check(page)  # who are you?
        page.fill("#name", "Boss")
        page.keyboard.press("Enter")
        page.wait_for_selector("#item")
        page.wait_for_load_state()
        check(page)
        if kind == "ranking":
            page.keyboard.press("1")
            page.keyboard.press("2")
            page.keyboard.press("n")
            page.click('[data-number="0"] summary')
            check(page)
        for _ in range(2):
            if kind == "arena":
                next_page(page, lambda page=page: page.keyboard.press("ArrowLeft"))
            else:
                for number in range(4):
                    button = page.locator(f'[data-number="{number}"] [data-rank="{number + 1}"]')
                    if button.get_attribute("aria-pressed") == "false":
                        button.click()
                next_page(page, lambda page=page: page.click("#submit"))
        check(page)  # nothing left
        for path in ("dashboard", "answered", "items/1"):
            page.goto(server.url + path)
            check(page)
        page.goto(server.url + "gone")
        check(page)
        page.complaints.clear()  # the page that is not there
    assert findings == []
