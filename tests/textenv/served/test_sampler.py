"""Responses drawn by a server equal those drawn here, and what is no response is refused."""

import contextlib
import json
import math
import socket

import pytest
import torch

from agents.core.agent import LanguageModelAgent
from tests.completions import CompletionServer
from tests.conftest import WORDS, tiny_model
from textenv.episode import observation_tokens
from textenv.evaluation import evaluate
from textenv.lm import TokenRule, response_logprobs, sample_responses
from textenv.served.completion import read, request
from textenv.served.config import SamplerConfig
from textenv.served.sampler import Gap, ServedSampler

EOS, RED, IS = (WORDS.index(word) for word in ("<eos>", "red", "is"))
RULED = {"temperature": 0.7, "min_new_tokens": 2, "stop_tokens": ("?",)}


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def start(*args, **options):
            server = stack.enter_context(CompletionServer(*args, **options))
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture
def world(make_vector):
    """A task, fresh observations of it, and a policy that is not the reference."""
    env = make_vector(12, **RULED).unwrapped
    return env, env.reset(options={"prompt_id": [0, 1, 2, 3] * 3})[0], tiny_model(seed=5)


def score(policy):
    return lambda batch, task: (response_logprobs(policy.model, batch, task.rule), batch.response_ids * 0.5)


def act(sampler, env, observation, policy, **how):
    how = {"generator": torch.Generator().manual_seed(3), **how}
    return sampler.act(observation, task=env.task, score=score(policy), **how)


def test_the_most_likely_tokens_of_a_server_are_those_found_here(serve, world):
    env, observation, policy = world
    served = act(ServedSampler(serve(policy).url), *world, greedy=True)
    local = env.task.respond(policy.model, observation_tokens(observation, 7), generator=None, greedy=True)
    assert torch.equal(served.response_ids, local.response_ids)
    assert torch.equal(served.response_lengths, local.response_lengths)
    torch.testing.assert_close(served.logprobs, local.logprobs, atol=1e-5, rtol=0)


def test_drawn_responses_are_those_of_local_sampling_with_the_seeds_that_were_sent(serve, world):
    env, observation, policy = world
    server = serve(policy)
    sampler = ServedSampler(server.url + "/v1/")
    served = act(sampler, *world)
    batch = observation_tokens(observation, 7)
    seeds = {tuple(body["prompt"]): [] for body in server.asked("/v1/completions")}
    for seed in torch.randint(2**31, (12,), generator=torch.Generator().manual_seed(3)).tolist():
        row = sum(map(len, seeds.values()))
        prompt = batch.prompt_ids[row, 7 - int(batch.prompt_lengths[row]) :].tolist()
        assert {**server.asked("/v1/completions")[0], "prompt": prompt, "seed": seed} in server.asked("/v1/completions")
        seeds[tuple(prompt)].append(seed)
        one = sample_responses(
            policy.model,
            batch.prompt_ids[row : row + 1],
            batch.prompt_lengths[row : row + 1],
            max_new_tokens=6,
            rule=env.task.rule,
            pad_id=0,
            generator=torch.Generator().manual_seed(seed),
        )
        assert torch.equal(served.response_ids[row], one.response_ids[0])
        torch.testing.assert_close(served.logprobs[row], one.logprobs[0], atol=1e-5, rtol=0)
    assert len({seed for drawn in seeds.values() for seed in drawn}) == 12  # a group does not get one answer twice
    assert len(set(served.response_lengths.tolist())) > 1
    real = torch.arange(6) < served.response_lengths[:, None]
    assert torch.equal(served.values, torch.where(real, served.response_ids * 0.5, 0.0))
    assert sampler.gap.tokens == int(served.response_lengths.sum())
    assert sampler.gap.most < 1e-5


def test_a_server_with_other_weights_shows_in_the_gap_and_not_in_the_log_probabilities(serve, world):
    """The gap is that of the two models on the responses, each scored by teacher forcing."""
    env, observation, policy = world
    other = tiny_model(seed=6)
    sampler = ServedSampler(serve(other).url)
    drawn = act(sampler, *world)
    batch = observation_tokens(observation, 7)._replace(
        response_ids=drawn.response_ids, response_lengths=drawn.response_lengths
    )
    own, theirs = (response_logprobs(lm.model, batch, env.task.rule) for lm in (policy, other))
    torch.testing.assert_close(drawn.logprobs, own, atol=1e-5, rtol=0)
    gaps = (own - theirs).abs()[batch.response_mask]
    log = sampler.gap.log()
    assert log["sampler_gap"] == pytest.approx(float(gaps.mean()), rel=1e-4)
    assert log["sampler_gap_max"] == pytest.approx(float(gaps.max()), rel=1e-4)
    assert log["sampler_gap"] > 0.1
    first = sampler.gap
    act(sampler, *world)
    assert sampler.gap == Gap(2 * first.total, first.most, 2 * first.tokens)
    assert sampler.holding(policy).gap.log() == {}


def test_gaps_of_parts_add_up_to_that_of_the_whole():
    one, other = Gap(1.0, 0.75, 2), Gap(2.0, 0.5, 4)
    assert one + other == other + one == Gap(3.0, 0.75, 6)
    assert (one + other + Gap()).log() == {"sampler_gap": 0.5, "sampler_gap_max": 0.75}


def test_an_evaluation_whose_answers_a_server_draws_equals_one_here(serve, world):
    env, _, policy = world
    served = ServedSampler(serve(policy).url)
    results = [
        evaluate(LanguageModelAgent(policy, env.task, served=where), env, deterministic=True)
        for where in (None, served)
    ]
    assert results[0].responses == results[1].responses
    assert results[1].rewards == pytest.approx(results[0].rewards, abs=1e-4)
    assert served.gap == Gap()  # nothing was drawn from a distribution


def test_a_request_states_all_that_shapes_the_distribution():
    rule = TokenRule(temperature=0.7, min_new_tokens=2, stop_ids=(0, 9))
    how = {"max_new_tokens": 6, "seed": 11, "model": "m"}
    expected = {
        "model": "m",
        "prompt": [3, 4],
        "n": 1,
        "max_tokens": 6,
        "min_tokens": 2,
        "stop_token_ids": [0, 9],
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 11,
        "logprobs": 1,
        "return_token_ids": True,
    }
    assert json.loads(request([3, 4], rule, **how, greedy=False)) == expected
    assert json.loads(request([3, 4], rule, **how, greedy=True)) == {**expected, "temperature": 0.0}
    assert "model" not in json.loads(request([3], rule, **{**how, "model": None}, greedy=False))


RULE = TokenRule(min_new_tokens=1, stop_ids=(EOS, 9))


def choice(ids, reason="stop", logprobs=None, **fields):
    logprobs = [-0.5] * len(ids) if logprobs is None else logprobs
    return {"token_ids": ids, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs}, **fields}


def read_choice(answer):
    content = answer if isinstance(answer, bytes) else json.dumps({"choices": [answer]}).encode()
    return read(content, RULE, max_new_tokens=4, vocab_size=len(WORDS))


@pytest.mark.parametrize(
    ("answer", "ids", "unknown"),
    [
        (choice([RED, EOS]), [RED, EOS], 0),
        (choice([RED, 9], stop_reason=9), [RED, 9], 0),
        (choice([RED] * 4, "length"), [RED] * 4, 0),
        (choice([RED, RED, RED, EOS], "length"), [RED, RED, RED, EOS], 0),
        (choice([RED], stop_reason=9), [RED, 9], 1),  # the ending token is named alone,
        (choice([RED], matched_stop=EOS), [RED, EOS], 1),  # even if it is token 0
        (choice([RED], stop_reason=None, matched_stop=EOS, logprobs=[-0.5, -0.5]), [RED, EOS], 0),
        ({**choice([]), **choice([RED, EOS]), "token_ids": [RED, EOS], "matched_stop": EOS}, [RED, EOS], 0),
        (
            {"response_token_ids": [RED, EOS], **{k: v for k, v in choice([0, 0]).items() if k != "token_ids"}},
            [RED, EOS],
            0,
        ),
        (choice([RED, EOS], logprobs=[-1, 0]), [RED, EOS], 0),
    ],
)
def test_a_response_has_its_ending_token_once(answer, ids, unknown):
    found = read_choice(answer)
    assert found.ids == ids
    assert len(found.logprobs) == len(ids)
    assert sum(map(math.isnan, found.logprobs)) == unknown


LONE = {key: value for key, value in choice([RED, EOS]).items() if key != "token_ids"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"hello", r"be one completion, got 'hello'\. Name a server of OpenAI's"),
        (b'{"choices": []}', "be one completion"),
        (b'{"choices": [1]}', "be one completion"),
        (b"[]", "be one completion"),
        (LONE, r"have token_ids, got .*Use vLLM 0\.10\.2 or later"),
        (choice(["red", "sky"]), "have token_ids"),
        (choice([True, EOS]), "have token_ids"),
        (choice([RED, 12, EOS]), r"of the policy's vocabulary of 12, got token 12\. Serve the policy's own model"),
        (choice([-1, EOS]), "vocabulary of 12, got token -1"),
        (
            {**choice([RED, EOS]), "logprobs": None},
            r"a finite log-probability of each token, got None\. Let the server",
        ),
        (choice([RED, EOS], logprobs=[None, -1.0]), "a finite log-probability"),
        (choice([RED, EOS], logprobs=[math.nan, -1.0]), "a finite log-probability"),
        (choice([RED, EOS], logprobs=[-math.inf, -1.0]), "a finite log-probability"),
        (choice([RED, EOS], logprobs=[10**400, -1.0]), "a finite log-probability"),
        (choice([RED, RED, EOS], logprobs=[-1.0]), "each token, got 1 for 3 tokens"),
        (choice([RED, EOS], logprobs=[-1.0] * 3), "each token, got 3 for 2 tokens"),
        (choice([RED] * 4, "length", logprobs=[-1.0] * 3), "each token, got 3 for 4 tokens"),
        (choice([RED] * 5, "length"), r"at most 4 tokens \(max_tokens\), got 5"),
        (choice([RED] * 4, stop_reason=EOS), r"at most 4 tokens \(max_tokens\), got 5"),
        (choice([RED, 9, RED, EOS]), "at the first ending token, got ending token 9 in place 2 of 4"),
        (choice([EOS]), r"1 tokens or more before its ending token \(min_tokens\), got 0"),
        (choice([RED, RED], "length"), r"have 4 tokens if it does not end by itself, got 2, cut short\. Raise"),
        (choice([], "length"), "got 0, cut short"),
        (
            choice([RED, IS], stop_reason=IS),
            rf"ending token of the task \(\[0, 9\]\) .* got finish_reason 'stop' \({IS}\)",
        ),
        (choice([RED, EOS], stop_reason="."), r"got finish_reason 'stop' \('\.'\) after token 0"),
        (choice([RED], stop_reason=[9]), "got finish_reason 'stop'"),
        (choice([RED, RED], "abort"), "got finish_reason 'abort'"),
        (choice([RED] * 4, None), "got finish_reason None"),
        (choice([], "stop"), "after token None"),
    ],
)
def test_what_is_no_response_under_the_rule_is_refused(answer, message):
    with pytest.raises(ValueError, match=f"a response of the sampler must .*{message}"):
        read_choice(answer)


def test_a_busy_server_is_asked_again_and_one_that_refuses_or_is_gone_is_an_error(serve, world):
    states = [503, 503]
    policy = world[2]
    server = serve(policy, answer=lambda completion: states.pop() if states else completion)
    act(ServedSampler(server.url, backoff=0.0), *world)
    assert len(server.asked("/v1/completions")) == 14
    server.answer = lambda completion: 400
    with pytest.raises(ValueError, match=r"the sampler at http://.*/v1/completions must accept .* 400 .*'as asked'"):
        act(ServedSampler(server.url), *world)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ValueError, match=r"the sampler at .* must answer, got ConnectError.* the last of 1 attempts"):
        act(ServedSampler(gone, retries=0), *world)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler_url": "ftp://host"}, "url must start with http"),
        ({"sampler_url": "127.0.0.1:8000"}, "url must start with http"),
        ({"sampler_url": "http://h", "sampler_update": "vllm"}, "sampler_update must be 'vllm-lora', 'sglang-disk' or"),
        ({"sampler_url": "http://h", "sampler_update": "nowhere:nothing"}, "got 'nowhere:nothing': No module"),
        ({"sampler_url": "http://h", "sampler_update": "json:nothing"}, "has no attribute"),
        ({"sampler_update": "vllm-lora"}, "sampler_update needs sampler_url, got 'vllm-lora' alone"),
        ({"sampler_url": "http://h", "sampler_timeout": 0.0}, "timeout must be above 0"),
        ({"sampler_url": "http://h", "sampler_token_variable": "NOT_SET_1"}, "an environment variable that is set"),
    ],
)
def test_impossible_settings_are_refused_before_any_request(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings).sampler()


def test_without_a_url_there_is_no_server():
    assert SamplerConfig().sampler() is None
