"""The wire between a reward model and its server: what is sent, what is retried, what is refused."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

import pytest

from reward_models.scorers.remote import HTTPRewardModel

GOOD = (200, {}, b'{"scores": [7]}')


@pytest.fixture
def scripted(run):
    """A server that gives the answers of a list, one after another, and notes the requests."""

    def serve(*answers):
        left, seen = list(answers), []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen.append((self.path, self.headers.get("Authorization"), json.loads(body)))
                status, headers, content = left.pop(0)
                if status is None:
                    self.wfile.write(content)  # whatever it is, it is not HTTP
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                seen.append((self.path, self.headers.get("Authorization"), None))
                self.send_error(500)

            def log_message(self, format, *args):
                pass

        return run(HTTPServer(("127.0.0.1", 0), Handler)), seen

    return serve


@pytest.fixture
def pauses(monkeypatch):
    """Seconds slept between attempts; nobody waits."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


TRANSIENT = {
    "500": (500, {}, b"oops"),
    "503": (503, {}, b"busy"),
    "too many requests": (429, {}, b"slowly"),
    "no HTTP": (None, {}, b"nonsense\r\n"),
    "nothing": (None, {}, b""),
    "cut short": (200, {"Content-Length": "100"}, b'{"scores"'),
}


@pytest.mark.parametrize("failure", TRANSIENT)
def test_a_transient_error_is_retried_after_twice_the_time(failure, scripted, pauses):
    url, seen = scripted(*[TRANSIENT[failure]] * 3, GOOD)
    assert HTTPRewardModel(url, backoff=0.5, retries=3)(["p"], ["a"]) == [7.0]
    assert len(seen) == 4
    assert pauses == [0.5, 1.0, 2.0]
    url, seen = scripted(*[TRANSIENT[failure]] * 3, GOOD)
    with pytest.raises(ValueError, match=r"/score must answer, got .* in the last of 3 attempts"):
        HTTPRewardModel(url, backoff=0.5, retries=2)(["p"], ["a"])
    assert len(seen) == 3


FINAL = {
    "bad request": ((400, {}, b"what?"), r"must accept the request, got status 400 with body 'what\?'"),
    "no such place": ((404, {}, b""), "status 404"),
    "a redirect": ((302, {"Location": "/elsewhere"}, b""), "status 302"),
    "no JSON": ((200, {}, b"hello"), r"must answer .*scores.*got 'hello'"),
    "no scores": ((200, {}, b'{"score": [1]}'), "must answer"),
    "a list": ((200, {}, b"[1]"), "must answer"),
    "null": ((200, {}, b'{"scores": [null]}'), "must answer"),
    "a string of digits": ((200, {}, b'{"scores": "7"}'), r"must answer .*scores.*got '{\"scores\": \"7\"}'"),
    "an object": ((200, {}, b'{"scores": {"7": 1}}'), "must answer"),
    "a number": ((200, {}, b'{"scores": 7}'), "must answer"),
    "a list of strings": ((200, {}, b'{"scores": ["7"]}'), "must answer"),
    "a truth value": ((200, {}, b'{"scores": [true]}'), "must answer"),
    "too large": ((200, {}, b'{"scores": [1%s]}' % (b"0" * 400)), "one finite score per text"),
    "too few": ((200, {}, b'{"scores": []}'), r"got 0 scores for 1 texts"),
    "too many": ((200, {}, b'{"scores": [1, 2]}'), r"got 2 scores for 1 texts"),
    "no number": ((200, {}, b'{"scores": [NaN]}'), "one finite score per text"),
    "infinity": ((200, {}, b'{"scores": [-Infinity]}'), "one finite score per text"),
}


@pytest.mark.parametrize("answer", FINAL)
def test_any_other_answer_is_an_error_at_once(answer, scripted, pauses):
    given, message = FINAL[answer]
    url, seen = scripted(given, GOOD, GOOD)
    with pytest.raises(ValueError, match=message):
        HTTPRewardModel(url)(["p"], ["a"])
    assert len(seen) == 1  # not even a redirect is followed: it would lose the texts and give the token away
    assert pauses == []


@pytest.mark.parametrize("slow", ["head", "body"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up_in_time(slow, run):
    over = threading.Event()

    class Trickle(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if slow == "body" else b"X-Slow: "))
            while not over.wait(0.05):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return

        def log_message(self, format, *args):
            pass

    url, start = run(ThreadingHTTPServer(("127.0.0.1", 0), Trickle)), time.monotonic()
    threading.Timer(5.0, over.set).start()  # a client that waits for the whole answer waits 5 s
    try:
        with pytest.raises(ValueError, match=r"must answer, got no answer within 0.3 s in the last of 2 attempts"):
            HTTPRewardModel(url, timeout=0.3, retries=1, backoff=0.0)(["p"], ["a"])
    finally:
        over.set()
    assert 0.6 <= time.monotonic() - start < 3.0


WRONG_URLS = [
    "http://",
    "http:///score",
    "127.0.0.1:8000",
    "ftp://host/",
    "http://127.0.0.1:99999/score",
    "http://127.0.0.1:0/score",
    "http://127.0.0.1:port/score",
    "http://[::1/score",
    "http://exa mple/score",
    "http://host/a score",
    "http://host/score\n",
    "http://host/größe",
    "http://a..b/score",
    "http://user:secret@host/score",
]


@pytest.mark.parametrize("url", WRONG_URLS)
def test_an_impossible_url_is_refused_before_any_request(url):
    with pytest.raises(ValueError, match=r"url must start with .* name a host.*, got "):
        HTTPRewardModel(url)


@pytest.mark.parametrize("url", ["http://h", "https://a-b.example:65535/s?q=1%20", "http://[::1]:8000/score"])
def test_a_possible_url_is_accepted(url):
    assert HTTPRewardModel(url).url == url


def test_batches_have_the_size_asked_for_in_order_with_all_columns_and_the_token(scripted, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_A_TEST", "s3cret")
    url, seen = scripted(
        (200, {}, b'{"scores": [1, 2]}'), (200, {}, b'{"scores": [3, 4]}'), (200, {}, b'{"scores": [5]}')
    )
    model = HTTPRewardModel(url, batch_size=2, token_variable="TOKEN_OF_A_TEST")
    scores = model(list("pqrst"), list("abcde"), topic=[1, None, "x", [2], {"y": 3}])
    assert scores == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert seen == [
        ("/score", "Bearer s3cret", {"prompts": ["p", "q"], "completions": ["a", "b"], "topic": [1, None]}),
        ("/score", "Bearer s3cret", {"prompts": ["r", "s"], "completions": ["c", "d"], "topic": ["x", [2]]}),
        ("/score", "Bearer s3cret", {"prompts": ["t"], "completions": ["e"], "topic": [{"y": 3}]}),
    ]
    assert model([], []) == []
    with pytest.raises(ValueError, match="columns must be JSON values"):
        model(["p"], ["a"], topic=[object()])
    assert len(seen) == 3


def test_no_token_is_sent_where_none_is_named(scripted):
    url, seen = scripted(GOOD)
    HTTPRewardModel(url)(["p"], ["a"])
    assert seen[0][1] is None
