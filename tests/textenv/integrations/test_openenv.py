"""OpenEnv's own client against a server of ours."""

import importlib.util
import socket
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest

pytest.importorskip("openenv", reason="needs openenv-core: make test-openenv")
pytestmark = pytest.mark.filterwarnings("ignore")

MICRO = "textenv/Micro-v0"


@pytest.fixture(scope="module")
def url():
    """A server of the exact world."""
    import uvicorn

    from textenv.integrations.openenv import make_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(MICRO), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def client(url):
    from openenv.core import GenericEnvClient

    with GenericEnvClient(base_url=url).sync() as env:
        yield env


def test_an_episode_over_the_wire_is_that_of_the_environment(client):
    env = gymnasium.make(MICRO).unwrapped
    for seed in range(4):
        _, begun = env.reset(seed=seed)
        start = client.reset(seed=seed, episode_id=f"e{seed}")
        assert (start.done, start.reward, start.observation["prompt"]) == (False, 0.0, begun["prompt"])
        assert env.reference.encode_prompt(begun["prompt"]) == start.observation["prompt_ids"]
        done = False
        for token in (3, 2, 4, 5):
            env.report_logprobs(-1.5)
            _, reward, done, _, info = env.step(token)
            result = client.step({"token_ids": [token], "logprobs": [-1.5]})
            assert (result.done, result.reward) == (done, pytest.approx(reward))
        assert done
        seen = result.observation
        assert seen["response_ids"] == [3, 2, 4, 5]
        assert (seen["response"], seen["tokens_left"]) == (info["response"], 0)
        assert seen["info"]["kl_per_token"] == pytest.approx(info["kl_per_token"].tolist())
        assert seen["info"]["reward_terms"] == pytest.approx(info["reward_terms"])
        assert (client.state()["episode_id"], client.state()["step_count"]) == (f"e{seed}", 4)


def test_several_tokens_are_one_action_and_text_ends_the_response(client):
    first = client.reset(prompt_id=2).observation
    whole = client.step({"token_ids": [3, 2, 4, 5], "logprobs": [-1.0, -2.0, -1.0, -2.0]})
    assert whole.done
    words = whole.observation["response"].split()
    assert client.reset(prompt_id=2).observation["prompt"] == first["prompt"]
    assert client.step({"token_ids": [3]}).observation["response"] == words[0]
    rest = client.step({"text": " ".join(words[1:])})
    assert (rest.done, rest.observation["response_ids"]) == (True, [3, 2, 4, 5])
    assert rest.observation["info"]["finish_reason"] == "length"
    assert rest.observation["info"]["rm_score"] == pytest.approx(whole.observation["info"]["rm_score"])
    assert client.reset(prompt=first["prompt"]).observation["prompt_ids"] == first["prompt_ids"]
    assert client.step({"text": words[0]}).observation["info"]["finish_reason"] == "eos"


def test_a_text_is_over_where_it_spells_an_ending_token(client):
    client.reset(prompt_id=2)
    ended = client.step({"text": "c <eos> b"})
    assert (ended.done, ended.observation["response_ids"]) == (True, [3, 0])
    assert ended.observation["info"]["finish_reason"] == "eos"


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ({}, "must have token_ids or text"),
        ({"token_ids": [3], "text": "a"}, "must have token_ids or text"),
        ({"token_ids": []}, "must be 1 to 4 tokens"),
        ({"token_ids": [3] * 5}, "must be 1 to 4 tokens"),
        ({"token_ids": [3, 0, 3]}, "none after an ending one"),
        ({"token_ids": [3, 3], "logprobs": [-1.0]}, "logprobs must be one for each of token_ids, got 1 for 2"),
        ({"token_ids": [99]}, "must be a token of the vocabulary"),
        ({"tokens": [3]}, "VALIDATION_ERROR"),
    ],
)
def test_an_impossible_action_is_an_error_and_the_episode_goes_on(client, action, says):
    client.reset(seed=1)
    with pytest.raises(Exception, match=says):
        client.step(action)
    assert client.step({"token_ids": [3, 2, 4, 5]}).done


def test_sessions_play_episodes_of_their_own(client, url):
    from openenv.core import GenericEnvClient

    with GenericEnvClient(base_url=url).sync() as other:
        client.reset(prompt_id=0)
        other.reset(prompt_id=1)
        client.step({"token_ids": [3]})
        assert other.step({"token_ids": [4]}).observation["response_ids"] == [4]
        assert client.step({"token_ids": [2]}).observation["response_ids"] == [3, 2]


def test_the_example_plays_the_reference_whose_kl_is_zero(url):
    path = Path(__file__).parents[3] / "examples" / "openenv_client.py"
    spec = importlib.util.spec_from_file_location("examples_openenv_client", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ends = example.play(url, "micro-reference", 40)
    assert [end["info"]["kl"] for end in ends] == pytest.approx([0.0] * 40, abs=1e-4)
    assert [end["reward"] for end in ends] == pytest.approx([end["info"]["rm_score"] for end in ends], abs=1e-4)
    assert len({end["prompt"] for end in ends}) > 1
    # J of the reference, by enumeration of the exact world; four standard errors.
    rewards = np.array([end["reward"] for end in ends])
    assert rewards.mean() == pytest.approx(0.1147, abs=4 * rewards.std() / 40**0.5)


def test_another_kind_of_environment_is_refused():
    from textenv.integrations.openenv import make_app

    with pytest.raises(ValueError, match="must be that of a text environment, got 'CartPole-v1'"):
        make_app("CartPole-v1")
    with pytest.raises(ValueError, match="Did you mean 'textenv/Micro-v0'"):
        make_app("textenv/Micr-v0")
