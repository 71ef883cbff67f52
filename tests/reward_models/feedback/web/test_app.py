"""The pages over HTTP: what is escaped, what is refused and how, what a failure leaves."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading

import pytest

from reward_models.feedback.project import NewItem, Response
from reward_models.feedback.web import security
from reward_models.feedback.web.app import BODY_LIMIT
from reward_models.feedback.web.lock import only_server
from reward_models.feedback.web.security import HEADERS
from reward_models.feedback.web.serve import Server
from reward_models.feedback.web.text import markdown, visible


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/gone", "/api/next"])
def test_every_answer_keeps_scripts_and_frames_out(make_project, serve, path):
    ann = serve(make_project())("Ann")
    answer = ann.client.get(path)
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    policy = answer.headers["Content-Security-Policy"]
    assert "'unsafe" not in policy
    assert "script-src 'self'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("path", ["/answered", "/api/next"])
def test_an_unforeseen_error_has_a_message_and_the_headers_too(make_project, serve, monkeypatch, path):
    project = make_project()
    ann = serve(project)("Ann")

    def broken(*_):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(type(project), "rows" if path == "/answered" else "item", broken)
    answer = ann.client.get(path)
    assert answer.status_code == 500
    assert "Its owner sees why in the terminal." in answer.text
    assert "secret" not in answer.text
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'};alert(1);//",
    "</script><script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "[x](javascript:alert(1))",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_texts_of_models_and_people_are_shown_and_never_run(make_project, serve, payload):
    project = make_project(items=0, guidelines=payload)
    item = NewItem("evil", payload, [Response(payload + "a"), Response(payload + "b")], needed=2)
    project.add_items([item])
    person = serve(project)
    ann, owner = person(payload[:40]), person("Boss", "owner")
    lease = ann.next()
    draft = {"comment": payload, "ranks": [payload]}
    assert ann.client.put(f"/api/items/{lease['item']}/draft", json=draft).status_code == 200
    pages = [ann.client.get("/").text]
    ann.answer(lease["item"], [[0], [1]], "request-1", comment=payload)
    pages += [ann.client.get(path).text for path in ("/answered", "/items/1", "/")]
    pages += [owner.client.get("/dashboard").text]
    for page in pages:
        allowed = page.replace('<script src="/static/page.js" defer></script>', "")
        assert not re.search(r"<script|<svg|<img|href=\"javascript", allowed, re.I)
        assert "&lt;" in page or "<" not in payload
    assert "49" not in pages[0].split("<main")[1] or "7" not in payload


def test_characters_that_hide_or_turn_text_are_written_out(make_project, serve):
    project = make_project(items=0)
    project.add_items([NewItem("turn", "safe \u202eelif", [Response("a\x00b\u2066"), Response("tab\tline\nok")])])
    page = serve(project)("Ann").client.get("/").text
    assert "⟦U+202E⟧elif" in page
    assert "a⟦U+0000⟧b⟦U+2066⟧" in page
    assert "\u202e" not in page
    assert "tab\tline\nok" in page


def test_marks_of_direction_and_characters_that_nobody_sees_are_written_out():
    hidden = [0x061C, 0x200E, 0x200F, 0x202A, 0x202E, 0x2066, 0x2069, 0x00AD, 0x200B, 0x2060, 0xFEFF, 0xE0041]
    assert visible("".join(map(chr, hidden))) == "".join(f"⟦U+{code:04X}⟧" for code in hidden)
    seen = "naïve 👩‍💻 می‌خواهم 日本 \t\n"  # joiners belong to their letters
    assert visible(seen) == seen


def test_guidelines_are_markdown_without_html_scripts_or_images(make_project, serve):
    text = "# Rules\n**be fair** <b onclick=x>no</b> [ok](https://example.org) [no](data:text/html,x) ![i](http://x/y)"
    page = serve(make_project(guidelines=text))("Ann").client.get("/").text
    assert "<h1>Rules</h1>" in page
    assert "<strong>be fair</strong> &lt;b onclick=x&gt;" in page
    assert '<a href="https://example.org">ok</a>' in page
    assert "<img" not in page
    assert 'href="data:text' not in page


def test_links_of_guidelines_go_to_the_web_or_to_a_mailbox():
    text = "[a](HTTPS://a.org) <mailto:b@b.org> [c](ms-settings:x) [d](ftp://d.org/x) [e](/api/next) [f](//f.org)"
    assert re.findall('href="(.*?)"', markdown(text)) == ["HTTPS://a.org", "mailto:b@b.org"]


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e%2fapp.py", "/static//etc/passwd", "/static/page.js%00", "/project.db"]
)
def test_no_path_leads_to_the_file_system(make_project, serve, path):
    answer = serve(make_project())("Ann").client.get(path)
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_models_and_places_stay_hidden(make_project, serve):
    ann = serve(make_project(kind="arena", k=2))("Ann")
    assert "model" not in json.dumps(ann.next())
    page = ann.client.get("/").text
    assert "model 0" not in page
    assert "sampling" not in page


def test_the_dashboard_is_the_owners(make_project, serve):
    person = serve(make_project())
    assert person("Ann").client.get("/dashboard").status_code == 403
    assert person("Boss", "owner").client.get("/dashboard/figures").status_code == 200


def test_the_dashboard_counts_what_came_in(make_project, serve):
    project = make_project(items=4, k=3, needed=2)
    person = serve(project)
    for name in ("Ann", "Bob"):
        someone = person(name)
        for _ in range(3):
            item = someone.next()["item"]
            shown = project.rows("SELECT shown FROM leases JOIN annotators ON annotators.id = annotator "
                                 "WHERE item = ? AND name = ?", item, name)[0]["shown"]  # fmt: skip
            order = json.loads(shown)
            someone.answer(item, [[order.index(place)] for place in range(3)], f"request-{name}-{item}")
    text = " ".join(re.sub(r"<[^>]+>", " ", person("Boss", "owner").client.get("/dashboard").text).split())
    assert "answers 6 0 skipped, 6 in the last hour" in text
    assert "items done 3 of 4" in text
    assert "Krippendorff’s α 1.00" in text
    assert "Kendall’s W 1.00" in text
    assert re.search(r"Ann 3 0 [\d.]+ 100\.0 – ", text)


def test_an_arena_shows_ratings(make_project, serve):
    person = serve(make_project(items=2, k=2, kind="arena"))
    ann = person("Ann")
    while (lease := ann.next())["item"]:
        first = next(i for i, text in enumerate(lease["responses"]) if text.endswith(" 0"))
        ann.answer(lease["item"], [[first], [1 - first]], f"request-{lease['item']}")
    text = " ".join(re.sub(r"<[^>]+>", " ", person("Boss", "owner").client.get("/dashboard").text).split())
    assert "model 0 : model 1 2 0 0 100.0" in text


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/api/items/1", "{", 400),
        ("POST", "/api/items/1", "[]", 400),
        ("PUT", "/api/items/1/draft", '{"comment": NaN}', 400),
        ("POST", "/api/items/1", "[" * 60_000, 400),
        ("POST", "/api/items/1", json.dumps({"comment": "x" * BODY_LIMIT}), 413),
        ("POST", "/api/items/1", json.dumps({"comment": "x" * 5000, "request": "request-1"}), 413),
        ("POST", "/api/items/1", json.dumps({"ranking": [[0]], "request": "request-1"}), 422),
        ("POST", "/api/items/2", json.dumps({"request": "request-1"}), 404),
        ("POST", f"/api/items/{2**70}", "{}", 404),
        ("PUT", "/api/items/2/draft", "{}", 404),
        ("POST", "/api/undo", "{}", 404),
        ("POST", "/api/join", "{}", 422),
        ("POST", "/api/join", '{"name": 3}', 422),
        ("GET", f"/items/{2**70}", None, 404),
        ("GET", "/items/2", None, 404),
        ("GET", "/items/x", None, 404),
        ("DELETE", "/api/items/1", None, 405),
        ("GET", "/api/items/1", None, 405),
    ],
)
def test_bad_requests_have_their_status_a_message_and_change_nothing(
    make_project, serve, method, path, content, status
):
    project = make_project()
    ann = serve(project)("Ann")
    assert ann.next()["item"] == 1
    headers = {"Content-Type": "application/json"}
    answer = ann.client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    text = answer.json()["error"] if path.startswith("/api") else re.search(r"<p>(.+?)</p>", answer.text)[1]
    assert text.endswith(".")
    assert project.history() == []


def test_nobody_ranks_without_a_name(make_project, serve):
    nobody = serve(make_project())()
    assert nobody.client.get("/api/next").status_code == 403
    assert "Your name" in nobody.client.get("/").text


def test_one_session_cannot_flood_the_server(make_project, serve, clock):
    ann = serve(make_project())("Ann")
    codes = [ann.client.get("/answered").status_code for _ in range(130)]
    assert codes.count(429) >= 10
    clock.now += 11
    assert ann.client.get("/answered").status_code == 200


def test_of_two_requests_of_a_session_at_the_same_time_neither_fails():
    now, others = 0.0, []

    def clock():
        if others and now:  # the other request comes while this one forgets what is old
            other = others.pop()
            other.start()
            other.join(0.2)
        return now

    limit = security.Limit(3, 10.0, clock)
    limit.add("session")
    other = threading.Thread(target=limit.check, args=("session", "requests"))
    now, others = 11.0, [other]
    limit.check("session", "requests")
    other.join()


def test_a_full_disk_is_status_507_and_the_answer_can_be_sent_again(make_project, serve):
    project = make_project(items=1)
    ann = serve(project)("Ann")
    item = ann.next()["item"]
    project.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    project.rows(f"PRAGMA max_page_count={project.rows('PRAGMA page_count')[0][0]}")
    comment = "x" * 4000
    answers = [ann.answer(item, [[0], [1], [2], [3]], "request-1", comment=comment)]
    assert answers[0].status_code == 507
    assert "Free some space" in answers[0].json()["error"]
    assert project.history() == []
    project.rows("PRAGMA max_page_count=1000000")
    assert ann.answer(item, [[0], [1], [2], [3]], "request-1", comment=comment).json() == {"saved": True}


def test_a_file_that_breaks_while_it_is_served_is_status_500_with_a_message(make_project, serve, monkeypatch):
    project = make_project()
    ann = serve(project)("Ann")

    def broken(*_):
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(type(project), "item", broken)
    answer = ann.client.get("/api/next")
    assert answer.status_code == 500
    assert "the project file is damaged (database disk image is malformed)" in answer.json()["error"]


def test_a_file_has_one_server(tmp_path, make_project):
    project = make_project()
    code = (
        "import sys\nfrom pathlib import Path\nfrom reward_models.feedback.web.lock import only_server\n"
        "with only_server(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    path = str(project.path)
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match="which another process serves"),
            only_server(project.path),
        ):
            pass
        other.kill()
    with only_server(project.path):  # a killed server leaves nothing that is in the way
        pass
    assert {own for own in os.listdir(tmp_path) if own.endswith(".lock")} == set()


def test_a_port_that_is_taken_is_named(make_project, serve):
    person = serve(make_project())
    with pytest.raises(ValueError, match="must be able to listen"):
        Server(person.server.app, port=int(person.server.url.rstrip("/").rpartition(":")[2]))
