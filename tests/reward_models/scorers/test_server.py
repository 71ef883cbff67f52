"""A reward model's server: what it answers, what it refuses, and that it goes on."""

import contextlib
import http.client
import json
import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from reward_models.scorers.remote import HTTPRewardModel
from reward_models.serve import MAX_BODY, RewardServer


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
