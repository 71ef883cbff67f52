"""The wire between a reward model and its server: what is sent, what is retried, what is refused."""

import contextlib
import http.client
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from reward_models.scorers.remote import HTTPRewardModel
from reward_models.serve import MAX_BODY, RewardServer

GOOD = (200, {}, b'{"scores": [7]}')


@pytest.fixture
def run():
    """Start servers in threads, and stop them in the end."""
    servers = []

    def start(server):
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


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


def length(prompts, completions, bonus=None):
    return [len(c) + (b or 0) for c, b in zip(completions, bonus or [0] * len(completions), strict=True)]


BATCH = json.dumps({"prompts": ["p"], "completions": ["abc"]}).encode()


def post(url, body, **headers):
    """Status and answer of one raw request."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.putrequest("POST", place.path)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None and "Content_Length" not in headers:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    with contextlib.closing(connection):
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    "batch",
    [
        {"prompts": ["p"], "completions": ["a", "b"]},
        {"prompts": ["p", "q"], "completions": ["a"]},
        {"prompts": ["p"], "completions": ["a"], "bonus": [1, 2]},
        {"prompts": ["p"], "completions": "a"},
        {"prompts": ["p"], "completions": ["a"], "bonus": "1"},
        {"prompts": ["p"]},
        {"completions": ["a"]},
        ["p"],
    ],
    ids=str,
)
def test_a_server_refuses_a_batch_whose_lists_do_not_fit(batch, run):
    def lenient(prompts, completions, bonus=None):  # this model accepts anything: the server must refuse
        return [1.0] * len(prompts)

    status, answer = post(run(RewardServer(lenient)), json.dumps(batch).encode())
    assert (status, list(answer)) == (400, ["error"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "a request must be an object with 'prompts' and 'completions', got []. Send both."),
        (b'{"prompts": []}', "a request must be an object with 'prompts' and 'completions', got the keys ['prompts']. "
                             "Send both."),
        (b'{"prompts": ["p"], "completions": [null]}', "completions must be a list of strings, got null. Send one for "
                                                       "each text to score."),
        (b'{"prompts": ["p", 1], "completions": ["a", "b"]}', "prompts must be a list of strings or chats, got 1. Send "
                                                              "one for each text to score."),
        (b'{"prompts": "p", "completions": ["a"]}', 'prompts must be a list of strings or chats, got "p". Send one for '
                                                    "each text to score."),
        (b"{", "the body must be JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
    ids=str,
)  # fmt: skip
def test_a_server_says_in_plain_words_what_a_request_lacks(body, message, run):
    assert post(run(RewardServer(length)), body) == (400, {"error": message})


def test_a_server_passes_columns_on_and_refuses_who_lacks_the_token(run):
    good = json.dumps({"prompts": ["p"], "completions": ["abc"], "bonus": [2], "other": ["x"]}).encode()
    assert post(run(RewardServer(length)), good) == (200, {"scores": [5.0]})
    url = run(RewardServer(length, host="0.0.0.0", token="t"))  # with a token it may listen to others
    assert post(url, good, Authorization="Bearer t") == (200, {"scores": [5.0]})
    for header in ({}, {"Authorization": "t"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer tt"}):
        assert post(url, good, **header)[0] == 401
    url = run(RewardServer(length, token=""))  # an empty token is one
    assert post(url, good)[0] == 401


def test_a_server_reads_no_body_of_unknown_or_excessive_length(run):
    url = run(RewardServer(length))
    assert post(url, None)[0] == 413
    assert post(url, None, Content_Length="many")[0] == 413
    assert post(url, None, Content_Length=str(MAX_BODY + 1))[0] == 413
    assert post(url, b"{")[0] == 400


def test_a_server_reports_what_failed_and_goes_on(run):
    def fails(prompts, completions):
        if completions == ["a"]:
            raise RuntimeError("out of memory")
        return [float("inf") if completions == ["b"] else 1.0]

    url = run(RewardServer(fails))
    answers = [post(url, json.dumps({"prompts": ["p"], "completions": [c]}).encode()) for c in "abc"]
    assert answers[0] == (500, {"error": "RuntimeError: out of memory"})
    assert answers[1][0] == 400
    assert "finite" in answers[1][1]["error"]
    assert answers[2] == (200, {"scores": [1.0]})


def test_a_server_runs_its_model_for_one_batch_at_a_time(run):
    together, entered = [], threading.Barrier(2)

    def model(prompts, completions):
        try:  # two requests at the same time would meet here
            entered.wait(timeout=0.3)
            together.append(completions)
        except threading.BrokenBarrierError:
            entered.reset()
        return [1.0]

    client = HTTPRewardModel(run(RewardServer(model)))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda text: client(["p"], [text]), ["a", "b"])) == [[1.0], [1.0]]
    assert together == []


class CountingServer(RewardServer):
    """Counts connections."""

    connections = 0

    def get_request(self):
        self.connections += 1
        return super().get_request()


def test_batches_go_over_one_connection_also_after_a_refusal_of_the_model(run):
    server = CountingServer(length)
    model = HTTPRewardModel(run(server), batch_size=1)
    assert model(list("pqr"), ["a", "bb", "ccc"]) == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="status 400"):
        model(["p"], ["a"], bonus=["no number"])
    assert pickle.loads(pickle.dumps(model))(["p"], ["abcd"]) == [4.0]
    assert server.connections == 1


def test_a_body_that_was_not_read_is_not_taken_for_the_next_request(run):
    url = run(RewardServer(length, token="t"))
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as wire:
        inner = (
            f"POST /score HTTP/1.1\r\nAuthorization: Bearer t\r\nContent-Length: {len(BATCH)}\r\n\r\n".encode() + BATCH
        )
        wire.sendall(f"POST /score HTTP/1.1\r\nContent-Length: {len(inner)}\r\n\r\n".encode() + inner)
        answer = b"".join(iter(lambda: wire.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 401")
    assert answer.count(b"HTTP/1.1") == 1


FORKED = """
import os, sys
from reward_models.scorers.remote import HTTPRewardModel
model = HTTPRewardModel(sys.argv[1], retries=0)
model(["p"], ["a"])
child = os.fork()
scores = model(["p"], ["abc"])
if child == 0:
    os._exit(int(scores[0]))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3 and scores == [3.0]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no fork")
def test_a_fork_does_not_use_the_connection_of_its_parent(run):
    server = CountingServer(length)
    subprocess.run([sys.executable, "-c", FORKED, run(server)], check=True, timeout=60)
    assert server.connections == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_for_this_machine_only_needs_no_token(host):
    RewardServer(length, host=host).server_close()


def test_a_server_listens_at_an_ipv6_address_and_its_url_says_so(run):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = RewardServer(length, host="::1")
    run(server)
    assert server.url == f"http://[::1]:{server.server_address[1]}/score"
    assert HTTPRewardModel(server.url)(["p"], ["abc"]) == [3.0]


@pytest.mark.parametrize(
    "place", [{"port": "taken"}, {"port": 99_999}, {"port": -1}, {"host": "no.such.host.invalid"}], ids=str
)
def test_a_server_that_cannot_listen_says_where(place):
    with RewardServer(length) as other:
        given = {"host": "127.0.0.1", "token": "t", **place}
        if given.get("port") == "taken":
            given["port"] = other.server_address[1]
        named = rf"must be able to listen .*{given['host']}' and port {given.get('port', 0)}:"
        with pytest.raises(ValueError, match=named):
            RewardServer(length, **given)
