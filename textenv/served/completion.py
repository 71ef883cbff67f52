"""The wire: one request for one response of ``/v1/completions``, token ids in and token ids out.

Text is never tokenised again: the tokens of a text are not always those that were drawn.
"""

import json
import math
import sys
from typing import Any, NamedTuple, NoReturn

from textenv.data.http import excerpt
from textenv.lm import TokenRule

PATH = "/v1/completions"


class Completion(NamedTuple):
    """One response of a server."""

    ids: list[int]
    """The ending token included."""
    logprobs: list[float]
    """What the server says of each token; NaN where it says nothing."""


def request(
    prompt: list[int], rule: TokenRule, *, model: str | None, max_new_tokens: int, seed: int | None, greedy: bool
) -> bytes:
    """The body that asks for one response drawn from the distribution of ``rule``.

    Everything that could change that distribution is stated: servers take defaults from the model's own generation
    config. ``ignore_eos`` is left out, since SGLang would then ignore all ending tokens.
    """
    whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
    plain = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    ending = {"stop_token_ids": list(rule.stop_ids), "min_tokens": rule.min_new_tokens, "max_tokens": max_new_tokens}
    drawn = {"temperature": 0.0 if greedy else rule.temperature, "seed": seed, "n": 1}
    told = {"logprobs": 1, "return_token_ids": True}
    named = {} if model is None else {"model": model}
    return json.dumps({**named, "prompt": prompt, **drawn, **ending, **whole, **plain, **told}).encode()


def read(answer: bytes, rule: TokenRule, *, max_new_tokens: int, vocab_size: int) -> Completion:
    """The response in an answer.

    An ending token that the server names, but leaves out of the ids, is put back.

    Raises:
        ValueError: the answer is no response under ``rule``: no ids, tokens that the policy does not have, no
            log-probabilities, another ending, too many tokens or too few.
    """
    stops = set(rule.stop_ids)
    try:
        [choice] = json.loads(answer)["choices"]
        ids = choice.get("token_ids", choice.get("response_token_ids"))
        reason, named = choice.get("finish_reason"), [choice.get(key) for key in ("stop_reason", "matched_stop")]
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    except (AttributeError, KeyError, TypeError, ValueError):
        _refuse("be one completion", repr(excerpt(answer)), "Name a server of OpenAI's /v1/completions")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        remedy = "Use vLLM 0.10.2 or later, or an SGLang whose /v1/completions has return_token_ids"
        _refuse("have token_ids", repr(excerpt(answer)), remedy)
    ending = next((value for value in named if value is not None), None)
    if reason == "stop" and type(ending) is int and ending in stops and ids[-1:] != [ending]:
        ids = [*ids, ending]
    unknown = [token for token in ids if not 0 <= token < vocab_size]
    if unknown:
        rule_ = f"have tokens of the policy's vocabulary of {vocab_size}"
        _refuse(rule_, f"token {unknown[0]}", "Serve the policy's own model")
    _check_ending(ids, reason, ending, rule, max_new_tokens)
    if not isinstance(logprobs, list) or not all(map(_is_finite, logprobs)):
        _refuse("have a finite log-probability of each token", f"{logprobs!r:.200}", "Let the server report logprobs")
    if not len(ids) - 1 <= len(logprobs) <= len(ids) or (len(logprobs) < len(ids) and ids[-1] not in stops):
        found = f"{len(logprobs)} for {len(ids)} tokens"
        _refuse("have a finite log-probability of each token", found, "Let the server report logprobs")
    return Completion(ids, [*map(float, logprobs), *[math.nan] * (len(ids) - len(logprobs))])


def _check_ending(ids: list[int], reason: Any, ending: Any, rule: TokenRule, max_new_tokens: int) -> None:
    count, stops = len(ids), set(rule.stop_ids)
    if count > max_new_tokens:
        _refuse(f"have at most {max_new_tokens} tokens (max_tokens)", str(count), "Use a server that heeds max_tokens")
    early = next((place for place, token in enumerate(ids[:-1]) if token in stops), None)
    if early is not None:
        found = f"ending token {ids[early]} in place {early + 1} of {count}"
        _refuse("end at the first ending token", found, "Use a server that heeds stop_token_ids")
    ended = ids[-1:] != [] and ids[-1] in stops and not isinstance(ending, str)
    if ended and count <= rule.min_new_tokens:
        rule_ = f"have {rule.min_new_tokens} tokens or more before its ending token (min_tokens)"
        _refuse(rule_, str(count - 1), "Use a server that heeds min_tokens")
    if ended or (reason == "length" and count == max_new_tokens):
        return
    if reason == "length":
        remedy = "Raise the server's context (vLLM: --max-model-len, SGLang: --context-length)"
        _refuse(f"have {max_new_tokens} tokens if it does not end by itself", f"{count}, cut short", remedy)
    found = f"finish_reason {reason!r} ({ending!r}) after token {ids[-1] if ids else None}"
    remedy = "Name that token in stop_tokens, or take it out of the server's generation config"
    _refuse(f"end with an ending token of the task ({sorted(stops)}) or at its budget", found, remedy)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _refuse(rule: str, found: str, remedy: str) -> NoReturn:
    raise ValueError(f"a response of the sampler must {rule}, got {found}. {remedy}.")
