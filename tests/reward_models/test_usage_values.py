"""Rules, sums, ensembles, caches, and models over HTTP: every option by a value worked out by hand."""

import http.server
import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

import textenv
from reward_models import cache as cache_module
from reward_models import remote as remote_module
from reward_models import spec as spec_module
from reward_models.cache import CachedRewardModel
from reward_models.ensemble import Ensemble
from reward_models.remote import HTTPRewardModel
from reward_models.serve import RewardServer
from reward_models.transformer import TransformerRewardModel
from reward_models.weighted import Part, WeightedSum
from tests.conftest import tiny_model

ONE = ["p"]


def rule(text, **spec):
    return textenv.reward_model(spec)(ONE, [text])[0]


@pytest.mark.parametrize(
    ("text", "spec", "score"),
    [
        ("abc", {"rule": "regex", "pattern": "b", "score": 2.0, "otherwise": -1.0}, 2.0),
        ("ac", {"rule": "regex", "pattern": "b", "score": 2.0, "otherwise": -1.0}, -1.0),
        ("abc", {"rule": "regex", "pattern": "ab", "whole": True}, 0.0),
        ("abc", {"rule": "regex", "pattern": "bc", "whole": True}, 0.0),
        ("abc", {"rule": "regex", "pattern": "a.c", "whole": True}, 1.0),
        ("a\nc", {"rule": "regex", "pattern": "a.c"}, 1.0),  # a dot is a line break too
        ("ABC", {"rule": "regex", "pattern": "b"}, 0.0),
        ("ABC", {"rule": "regex", "pattern": "b", "ignore_case": True}, 1.0),
        ("aaaa", {"rule": "regex_count", "pattern": "aa", "score": -0.5}, -1.0),  # no overlaps
        ("aAaA", {"rule": "regex_count", "pattern": "a", "ignore_case": True, "maximum": 3, "score": 2.0}, 6.0),
        ("a", {"rule": "regex_count", "pattern": "a", "maximum": 3}, 1.0),
        (" two  words ", {"rule": "length", "score": 0.5}, 1.0),
        ("a b", {"rule": "length", "unit": "characters"}, 3.0),
        ("abcde", {"rule": "length_range", "unit": "characters", "minimum": 2, "maximum": 3}, 0.8),
        ("a", {"rule": "length_range", "unit": "characters", "minimum": 3, "maximum": 9, "slope": 0.25}, 0.5),
        ("abc", {"rule": "length_range", "unit": "characters", "minimum": 3, "maximum": 3, "score": 2.0}, 2.0),
        ("a" * 99, {"rule": "length_range", "unit": "characters", "minimum": 3}, 1.0),
    ],
    ids=str,
)
def test_a_rule_pays_what_it_says(text, spec, score):
    assert rule(text, **spec) == pytest.approx(score)


def test_tokens_are_those_of_the_named_model_without_eos(model_folder):
    assert rule("blue sky ?", rule="length", unit="tokens", language_model=str(model_folder)) == 3.0
    with pytest.raises(ValueError, match="needs a language_model to count tokens, and only then"):
        textenv.reward_model({"rule": "length", "language_model": "assistant-sft"})


@pytest.mark.parametrize(
    ("text", "answer", "options", "score"),
    [
        (" 4 \n", "4", {}, 1.0),
        ("4", " 4", {}, 1.0),
        ("Yes", "yes", {"otherwise": -1.0}, -1.0),
        ("STRASSE", "straße", {"ignore_case": True, "score": 3.0}, 3.0),
        ("3 then 4", "4", {"extract": r"\d"}, 1.0),  # the last match
        ("3 then 4", "3", {"extract": r"\d"}, 0.0),
        ("x=3, y", "3", {"extract": r"x=(\d)"}, 1.0),  # its first group
        ("none", "none", {"extract": r"\d", "otherwise": -2.0}, -2.0),  # nothing found is never right
        ("4", 4, {}, 1.0),  # a number in the record
    ],
    ids=str,
)
def test_an_answer_matches_as_the_options_say(text, answer, options, score):
    model = textenv.reward_model({"rule": "exact_match", "column": "answer", **options})
    assert model(ONE, [text], answer=[answer]) == [score]


def test_values_of_another_type_are_no_options():
    for options in ({"score": True}, {"ignore_case": 1}, {"maximum": 1.5}, {"pattern": 3}, {"score": float("inf")}):
        with pytest.raises(ValueError, match=r"of rule 'regex_count' must be"):
            textenv.reward_model({"rule": "regex_count", "pattern": "a", **options})
    assert rule("aa", rule="regex_count", pattern="a", score=2) == 4.0  # a whole number is a number


def test_sentiment_is_scaled():
    pytest.importorskip("vaderSentiment")
    once, twice = (rule("great", rule="sentiment", score=score) for score in (1.0, -2.0))
    assert twice == pytest.approx(-2 * once)
    assert once > 0


def test_sums_inside_sums_multiply_their_weights_and_name_their_parts():
    def one(prompts, completions):
        return [1.0, 2.0]

    inner = WeightedSum({"a": Part(one, 2.0), "b": Part(one, -1.0)})
    outer = WeightedSum({"x": Part(inner, 10.0), "y": Part(one, 0.5)})
    terms = outer.terms(["p", "q"], ["c", "d"])
    assert {name: values.tolist() for name, values in terms.items()} == {
        "x/a": [20.0, 40.0],
        "x/b": [-10.0, -20.0],
        "y": [0.5, 1.0],
    }
    assert outer(["p", "q"], ["c", "d"]) == [10.5, 21.0]


def test_an_identity_tells_everything_apart_that_changes_a_score():
    specs = [
        {"rule": "length"},
        {"rule": "length", "score": 2.0},
        {"rule": "regex", "pattern": "a"},
        {"rule": "regex", "pattern": "b"},
        {"weighted": {"a": {"model": {"rule": "length"}}}},
        {"weighted": {"a": {"model": {"rule": "length"}, "weight": 2.0}}},
        {"ensemble": [{"rule": "length"}]},
        {"ensemble": [{"rule": "length"}], "combine": "min"},
        {"ensemble": [{"rule": "length"}], "combine": "uncertainty", "coefficient": 1.0},
        {"ensemble": [{"rule": "length"}], "combine": "uncertainty", "coefficient": 2.0},
    ]
    identities = [textenv.reward_model(spec).identity for spec in specs]  # type: ignore[attr-defined]
    assert None not in identities
    assert len(set(identities)) == len(specs)


def test_an_ensemble_of_one_pays_nothing_for_doubt_and_a_coefficient_is_one_unless_given():
    def value(prompts, completions, x):
        return list(x)

    members = {"a": value, "b": lambda prompts, completions: [0.0] * len(prompts)}
    assert Ensemble({"a": value}, combine="mean_minus_std")(ONE, ONE, x=[5.0]) == [5.0]
    assert Ensemble(members, combine="mean_minus_std")(ONE, ONE, x=[4.0]) == [0.0]  # mean 2, deviation 2
    assert Ensemble(members, combine="uncertainty")(ONE, ONE, x=[4.0]) == [-2.0]  # mean 2, variance 4
    assert Ensemble(members, combine="uncertainty", coefficient=0.0)(ONE, ONE, x=[4.0]) == [2.0]
    with pytest.raises(ValueError, match=r"coefficient \(=-1\.0\)"):
        Ensemble(members, combine="uncertainty", coefficient=-1.0)


def test_members_that_read_differently_get_their_own_tokens_and_chats():
    models = {}
    for seed, template in ((1, "the {{ messages[0]['content'] }} "), (2, "what {{ messages[0]['content'] }} ? ")):
        lm = tiny_model(seed=seed)
        lm.tokenizer.chat_template = template
        models[str(seed)] = TransformerRewardModel.from_language_model(lm)
        models[str(seed)].model.score.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    chat = [[{"role": "user", "content": "sky"}]]
    apart = [model(["?"], ["blue"], chat=chat)[0] for model in models.values()]
    assert Ensemble(models)(["?"], ["blue"], chat=chat)[0] == pytest.approx(np.mean(apart), abs=1e-5)
    assert models["1"](["the sky "], ["blue"])[0] == pytest.approx(apart[0], abs=1e-5)


def test_a_cache_tells_prompts_versions_and_columns_apart_in_any_number_of_queries(tmp_path, monkeypatch):
    def product(prompts, completions, x):
        calls.append(len(prompts))
        return [len(p) * len(c) * v for p, c, v in zip(prompts, completions, x, strict=True)]

    calls: list[int] = []
    monkeypatch.setattr(cache_module, "_CHUNK", 2)
    cached = CachedRewardModel(product, tmp_path / "c.sqlite", version="1")
    prompts, completions, x = ["p", "pp", "p", "p", "ppp"], ["c", "c", "cc", "c", "c"], [1.0, 1.0, 1.0, 3.0, 2.0]
    expected = [1.0, 2.0, 2.0, 3.0, 6.0]
    assert cached(prompts, completions, x=x) == expected == cached(prompts, completions, x=x)
    assert calls == [5]
    assert cached(["p", "new"], ["c", "c"], x=[1.0, 7.0]) == [1.0, 21.0]  # the new text with its own column
    assert calls == [5, 1]
    CachedRewardModel(product, tmp_path / "c.sqlite", version="2")(["p"], ["c"], x=[1.0])
    assert calls == [5, 1, 1]


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers what the test wrote down, in order, and keeps what it was asked."""

    answers: list[tuple[int, bytes, dict[str, str]]]
    asked: list[tuple[dict[str, str], bytes]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked.append((dict(self.headers), body))
        status, answer, headers = type(self).answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, format, *args):
        pass


@pytest.fixture
def scripted():
    class Handler(Scripted):
        answers, asked = [], []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{server.server_address[1]}/score"
    server.shutdown()
    server.server_close()


def scores(*values: float) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps({"scores": values}).encode(), {}


def test_batches_carry_their_own_texts_and_a_bearer_token(scripted, monkeypatch):
    handler, url = scripted
    monkeypatch.setenv("RM_TOKEN", "secret")
    handler.answers += [scores(1, 2), scores(3)]
    model = HTTPRewardModel(url, batch_size=2, token_variable="RM_TOKEN")
    assert model(["p", "q", "r"], ["a", "b", "c"], x=[1, 2, 3]) == [1.0, 2.0, 3.0]
    bodies = [json.loads(body) for _, body in handler.asked]
    assert bodies == [
        {"prompts": ["p", "q"], "completions": ["a", "b"], "x": [1, 2]},
        {"prompts": ["r"], "completions": ["c"], "x": [3]},
    ]
    assert {headers["Authorization"] for headers, _ in handler.asked} == {"Bearer secret"}


@pytest.mark.parametrize(("status", "tries"), [(429, 3), (500, 3), (503, 3), (400, 1), (404, 1), (413, 1)])
def test_only_failures_that_may_pass_are_asked_again_after_waits_that_double(scripted, monkeypatch, status, tries):
    handler, url = scripted
    waits: list[float] = []
    monkeypatch.setattr(remote_module.time, "sleep", waits.append)
    handler.answers += [(status, b"no", {})] * 3
    with pytest.raises(ValueError, match=f"status {status}"):
        HTTPRewardModel(url, retries=2, backoff=0.5)(ONE, ONE)
    assert len(handler.asked) == tries
    assert waits == ([0.5, 1.0] if tries == 3 else [])


def test_a_redirect_is_an_error_and_the_token_stays(scripted, monkeypatch):
    handler, url = scripted
    monkeypatch.setenv("RM_TOKEN", "secret")
    handler.answers += [(302, b"", {"Location": url}), scores(1)]
    with pytest.raises(ValueError, match="status 302"):
        HTTPRewardModel(url, token_variable="RM_TOKEN")(ONE, ONE)
    assert len(handler.asked) == 1


@pytest.mark.parametrize(
    "answer", [b"[1]", b'{"scores": [1, 2]}', b'{"scores": []}', b'{"scores": ["a"]}', b"{", b"\xff"]
)
def test_an_answer_that_is_not_one_number_a_text_is_refused(scripted, answer):
    handler, url = scripted
    handler.answers.append((200, answer, {}))
    with pytest.raises(ValueError, match="must answer"):
        HTTPRewardModel(url)(ONE, ONE)


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture
def serving():
    servers = []

    def start(model, **options):
        servers.append(RewardServer(model, **options))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].url

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_says_what_is_wrong_by_its_status(serving, monkeypatch):
    def breaks(prompts, completions):
        raise RuntimeError("out of memory")

    good = json.dumps({"prompts": ["p"], "completions": ["c"]}).encode()
    guarded = serving(lambda prompts, completions: [1.0], token="secret")
    assert post(guarded, good, Authorization="Bearer secret") == (200, {"scores": [1.0]})
    assert post(guarded, good)[0] == 401
    assert post(guarded, good, Authorization="Bearer secre")[0] == 401
    url = serving(breaks)
    assert post(url, good) == (500, {"error": "RuntimeError: out of memory"})
    assert post(url, b"{")[0] == 400
    status, answer = post(url, json.dumps({"prompts": ["p", "q"], "completions": ["c"]}).encode())
    assert (status, "lists of one length" in answer["error"]) == (400, True)
    monkeypatch.setattr("reward_models.serve.MAX_BODY", 8)
    assert post(url, good)[0] == 413


def test_a_server_asks_its_model_for_one_batch_at_a_time(serving):
    inside, most = [0], [0]

    def slow(prompts, completions):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return [1.0]

    url = serving(slow)
    body = json.dumps({"prompts": ["p"], "completions": ["c"]}).encode()
    threads = [threading.Thread(target=post, args=(url, body)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_every_option_of_a_description_reaches_its_model(tmp_path, monkeypatch):
    monkeypatch.setenv("RM_TOKEN", "x")
    options = {
        "timeout": 3.0,
        "batch_size": 5,
        "retries": 1,
        "backoff": 0.25,
        "token_variable": "RM_TOKEN",
        "version": "7",
    }
    made = textenv.reward_model({"http": "http://127.0.0.1:9/", **options})
    found = {name: getattr(made, name) for name in ("timeout", "batch_size", "retries", "backoff")}
    assert found == {name: options[name] for name in found}
    assert json.loads(made.identity)["version"] == "7"  # type: ignore[attr-defined]

    TransformerRewardModel.from_language_model(tiny_model()).save_pretrained(tmp_path / "rm")
    classifier = textenv.reward_model({"classifier": str(tmp_path / "rm"), "batch_size": 3, "dtype": "bfloat16"})
    assert (classifier.batch_size, classifier.model.dtype) == (3, torch.bfloat16)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="dtype must be one of torch's"):
        textenv.reward_model({"classifier": str(tmp_path / "rm"), "dtype": "float33"})

    ensemble = textenv.reward_model(
        {"ensemble": [{"rule": "length"}, {"rule": "length"}], "combine": "uncertainty", "coefficient": 3.0}
    )
    assert (len(ensemble.members), ensemble.combine, ensemble.coefficient) == (2, "uncertainty", 3.0)  # type: ignore[attr-defined]
    one = textenv.reward_model({"cache": str(tmp_path / "s"), "of": {"rule": "length"}, "version": "1"})
    two = textenv.reward_model({"cache": str(tmp_path / "s"), "of": {"rule": "length"}, "version": "2"})
    assert one.identity != two.identity  # type: ignore[attr-defined]
    part = textenv.reward_model({"weighted": {"any name": {"model": {"rule": "length"}}}})
    assert part.parts["any name"].weight == 1.0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"with keys \(=\['wieght'\]\) unknown"):
        textenv.reward_model({"weighted": {"a": {"model": "micro-gold", "wieght": 1.0}}})


def test_a_model_that_holds_itself_is_refused():
    spec = {"ensemble": ["a-loop"]}
    textenv.register_reward_model("a-loop", spec)
    with pytest.raises(ValueError, match="must not hold itself"):
        spec_module.build_reward_model(spec)
