"""Who is let in: tokens, cookies, other sites and hosts."""

import json
import re

import httpx2
import pytest

from reward_models.feedback.web import security
from reward_models.feedback.web.serve import tokens_from
from tests.reward_models.feedback.conftest import TOKENS


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_cannot_use(make_project, serve):
    ann = serve(make_project())("Ann")
    cookie = ann.welcome.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert 'content="0; url=/"' in ann.welcome.text  # the address bar forgets the token
    assert TOKENS["annotator"] not in cookie + ann.welcome.text
    assert ann.client.get("/").status_code == 200


def test_a_program_can_rank_with_what_the_first_page_gives_it(make_project, serve):
    """The steps of docs/feedback.md, one request each."""
    with httpx2.Client(base_url=serve(make_project()).server.url) as client:
        welcome = client.get("/", params={"token": TOKENS["annotator"]})
        [token] = re.findall('<meta name="csrf" content="(.+?)">', welcome.text)
        client.headers["X-CSRF-Token"] = token
        assert client.post("/api/join", json={"name": "Robot"}).status_code == 200
        item = client.get("/api/next").json()["item"]
        answer = {"ranking": [[2], [0, 3], [1]], "request": "a-name-of-its-own"}
        assert client.post(f"/api/items/{item}", json=answer).status_code == 200
    assert "<nav" not in welcome.text


def test_behind_a_proxy_with_tls_the_cookie_is_for_tls_alone(make_project, serve):
    url = serve(make_project()).server.url
    for scheme in ("http", "https"):
        headers = {"X-Forwarded-Proto": scheme}
        answer = httpx2.get(url, params={"token": TOKENS["annotator"]}, headers=headers)
        assert ("Secure" in answer.headers["set-cookie"]) is (scheme == "https")


def test_a_page_renews_its_lease_well_before_it_ends(make_project, serve):
    for name, lease, renew in (("short.db", 30.0, 10.0), ("long.db", 600.0, 60.0)):
        page = serve(make_project(name=name), lease_seconds=lease)("Ann").client.get("/").text
        assert f"&#34;renew&#34;: {renew}" in page


@pytest.mark.parametrize("path", ["/", "/answered", "/items/1", "/api/next", "/dashboard"])
def test_without_a_token_nothing_is_shown(make_project, serve, path):
    person = serve(make_project())
    answer = httpx2.get(person.server.url + path[1:])
    assert answer.status_code == 401
    assert "prompt 0" not in answer.text


@pytest.mark.parametrize("token", ["", "wrong", TOKENS["annotator"][:-1], TOKENS["annotator"] + "x", "é"])
def test_a_wrong_token_is_refused(make_project, serve, token):
    answer = httpx2.get(serve(make_project()).server.url, params={"token": token})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_many_wrong_tokens_must_wait_a_minute(make_project, serve, clock):
    server = serve(make_project()).server
    codes = [httpx2.get(server.url, params={"token": "wrong"}).status_code for _ in range(12)]
    assert codes == [403] * 10 + [429] * 2
    clock.now += 61
    assert httpx2.get(server.url, params={"token": TOKENS["annotator"]}).status_code == 200


def test_tokens_are_compared_in_constant_time(make_project, serve, monkeypatch):
    compared = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    httpx2.get(serve(make_project()).server.url, params={"token": "wrong"})
    assert compared == [(b"wrong", token.encode()) for token in TOKENS.values()]


def test_page_tokens_are_compared_in_constant_time(make_project, serve, monkeypatch):
    ann = serve(make_project())("Ann")
    compared = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    right = ann.client.headers["X-CSRF-Token"]
    ann.client.post("/api/undo", json={}, headers={"X-CSRF-Token": "wrong"})
    assert compared == [(b"wrong", right.encode())]


def test_the_project_file_holds_no_cookie(make_project, serve):
    project = make_project()
    ann = serve(project)("Ann")
    (cookie,) = ann.client.cookies.jar
    assert cookie.value not in str([tuple(row) for row in project.rows("SELECT * FROM sessions")])


def test_a_cookie_outlives_the_server_but_not_a_month(make_project, serve, clock):
    project = make_project()
    ann = serve(project)("Ann")
    again = serve(project)
    ann.client.base_url = again.server.url
    assert ann.next()["item"] == 1
    clock.now += 31 * 86_400
    assert ann.client.get("/api/next").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-CSRF-Token": ""}, 403),
        ({"X-CSRF-Token": "0" * 64}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_a_change_must_come_from_our_own_page(make_project, serve, headers, status):
    project = make_project()
    ann = serve(project)("Ann")
    item = ann.next()["item"]
    body = json.dumps({"ranking": [[0], [1], [2], [3]], "request": "request-1"})
    sent = {"Content-Type": "application/json", **headers}
    assert ann.client.post(f"/api/items/{item}", content=body, headers=sent).status_code == status
    assert project.history() == []


def test_another_sessions_page_token_is_of_no_use(make_project, serve):
    person = serve(make_project())
    ann, bob = person("Ann"), person("Bob")
    bob.client.headers["X-CSRF-Token"] = ann.client.headers["X-CSRF-Token"]
    assert bob.post("/api/undo", {}).status_code == 403


def test_a_name_of_another_host_is_refused(make_project, serve):
    answer = httpx2.get(serve(make_project()).server.url, headers={"Host": "attacker.example"})
    assert answer.status_code == 400


def test_a_public_address_demands_a_token_and_says_what_it_means(monkeypatch):
    with pytest.raises(ValueError, match=r"token that you chose.*without TLS everyone on the way can read it"):
        tokens_from(None, "0.0.0.0")
    monkeypatch.setenv("SHORT", "x" * 15)
    with pytest.raises(ValueError, match=r"16 characters or more, got 'SHORT' with 15"):
        tokens_from("SHORT", "0.0.0.0")
    monkeypatch.setenv("LONG", "x" * 16)
    assert tokens_from("LONG", "0.0.0.0")["annotator"] == "x" * 16
    assert len(tokens_from(None, "127.0.0.1")["annotator"]) > 40
    assert len(set(tokens_from("LONG", "127.0.0.1").values())) == 2
