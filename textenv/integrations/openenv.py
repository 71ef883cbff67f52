"""Any registered id as an OpenEnv server: each session plays episodes of its own.

An action is one token, several, or the rest of the response as text; the observation has the prompt and the response so
far, as text and as tokens, and at the end the environment's info.

Command: ``python -m textenv.integrations.openenv textenv/Assistant-v0 --port 8000`` (``pip install openenv-core``).
"""

import functools
import uuid
from typing import Any

import gymnasium
import numpy as np
from fastapi import FastAPI
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from pydantic import Field

from textenv.env import TextEnv
from textenv.episode import as_batch, observation_tokens
from textenv.registry import environment_spec


class TextAction(Action):
    """How the response goes on: by ``token_ids`` or by ``text``, which ends it."""

    token_ids: list[int] | None = Field(default=None, description="The next tokens, at least one.")
    logprobs: list[float] | None = Field(
        default=None, description="The policy's log-probability of each token, from which the KL is computed."
    )
    text: str | None = Field(
        default=None, description="The rest of the response; it is over at the first ending token, and EOS is added."
    )


class TextObservation(Observation):
    """The state of an episode. ``reward`` is 0 until ``done``."""

    prompt: str
    prompt_ids: list[int]
    response: str
    response_ids: list[int]
    tokens_left: int = Field(description="Length budget that is left, tokens.")
    info: dict[str, Any] = Field(default_factory=dict, description="Scores, KL and their parts, once it is done.")


class TextEnvironment(Environment[TextAction, TextObservation, State]):
    """Episodes of a :class:`textenv.env.TextEnv`."""

    SUPPORTS_CONCURRENT_SESSIONS = True  # models are shared and only read

    def __init__(self, env_id: str, **options: Any) -> None:
        """``options`` are those of ``gym.make``. ValueError: the id belongs to another kind of environment."""
        super().__init__()
        environment_spec(env_id)
        env = gymnasium.make(env_id, **options).unwrapped
        if not isinstance(env, TextEnv):
            rule = f"the id must be that of a text environment, got {env_id!r}, a {type(env).__name__}"
            raise ValueError(f"{rule}. `textenv envs` lists the ids of this package.")
        self._env = env
        self._state = State()
        self._prompt = ""
        self._prompt_ids: list[int] = []
        self._ids: list[int] = []

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        prompt: str | None = None,
        prompt_id: int | None = None,
    ) -> TextObservation:
        """Start an episode on a prompt drawn with ``seed``, on one of the set (``prompt_id``) or on any text."""
        given = {"prompt": prompt, "prompt_id": prompt_id}
        observation, info = self._env.reset(seed=seed, options={k: v for k, v in given.items() if v is not None})
        self._state = State(episode_id=episode_id or uuid.uuid4().hex, step_count=0)
        tokens = observation_tokens(as_batch(observation)[0], self._env.task.prompt_width)
        self._prompt_ids = tokens.prompt_ids[0, tokens.prompt_ids.shape[1] - int(tokens.prompt_lengths[0]) :].tolist()
        self._prompt, self._ids = info["prompt"], []
        return self._observation({}, 0.0, False)

    def step(self, action: TextAction, timeout_s: float | None = None) -> TextObservation:
        """Add the tokens of an action to the response.

        Raises:
            ValueError: they are none, go on after the end, or have another number of log-probabilities.
        """
        ids = self._tokens(action)
        if action.logprobs is not None and len(action.logprobs) != len(ids):
            found = f"{len(action.logprobs)} for {len(ids)}"
            raise ValueError(f"logprobs must be one for each of token_ids, got {found}. Send as many.")
        reward, done, info = 0.0, False, {}
        for place, token in enumerate(ids):
            if action.logprobs is not None:
                self._env.report_logprobs(action.logprobs[place])
            _, reward, done, _, info = self._env.step(token)
            self._ids.append(token)
        self._state.step_count += len(ids)
        return self._observation(_plain(info), reward, done)

    def _tokens(self, action: TextAction) -> list[int]:
        task, left = self._env.task, self._env.task.config.max_new_tokens - len(self._ids)
        if (action.token_ids is None) == (action.text is None):
            raise ValueError(f"an action must have token_ids or text, got {action.model_dump()}. Send one of them.")
        text = action.text
        ids = list(action.token_ids or []) if text is None else task.reference.encode_response(text, eos=True)[:left]
        end = next((place for place, token in enumerate(ids, start=1) if token in task.rule.stop_ids), len(ids))
        if text is not None:
            return ids[:end]
        if not ids or min(end, left) < len(ids):
            rule = f"token_ids must be 1 to {left} tokens, and none after an ending one"
            raise ValueError(f"{rule}, got {ids}. Send the tokens up to the end of the episode.")
        return ids

    def _observation(self, info: dict[str, Any], reward: float, done: bool) -> TextObservation:
        task = self._env.task
        return TextObservation(
            prompt=self._prompt,
            prompt_ids=list(self._prompt_ids),
            response=task.reference.response_texts([self._ids])[0],
            response_ids=list(self._ids),
            tokens_left=task.config.max_new_tokens - len(self._ids),
            info=info,
            reward=reward,
            done=done,
        )

    @property
    def state(self) -> State:
        return self._state


def _plain(info: Any) -> Any:
    """An info as JSON values."""
    if isinstance(info, dict):
        return {key: _plain(value) for key, value in info.items()}
    return info.tolist() if isinstance(info, np.ndarray | np.generic) else info


def make_app(env_id: str, *, max_sessions: int = 8, **options: Any) -> FastAPI:
    """The server of an id, for any ASGI server; its models are loaded now.

    Args:
        env_id: a registered id.
        max_sessions: clients at once.
        options: what to change in the environment, as in ``gym.make``.

    Raises:
        ValueError: the id is none of a text environment, or an option is impossible.
    """
    TextEnvironment(env_id, **options)
    make = functools.partial(TextEnvironment, env_id, **options)
    return create_fastapi_app(make, TextAction, TextObservation, max_concurrent_envs=max_sessions)


def serve(env_id: str, /, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a registered id to OpenEnv clients until Ctrl-C."""
    import uvicorn

    uvicorn.run(make_app(env_id), host=host, port=port)


if __name__ == "__main__":
    import tyro

    tyro.cli(serve)
