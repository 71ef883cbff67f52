"""Readers of the layouts: a record, or the rated rows of one prompt, and an option → common fields.

These are ``prompt``, ``responses`` and ``ranking``, indices into the responses, best first, with a list for those that
are tied. Margins are taken only where the data state a strength: training reads them as log-odds. Ratings give ranks
alone.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward_models.preferences.dialogues import beside_prompt, split_dialogue, split_messages
from textenv.data.records import flag, messages_of

COMMON = ("margin", "category", "gold", "finish_reasons")
"""Optional fields of the project's own layouts."""
SCALES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _number(name: str, value: Any) -> float:
    """A finite number; CSV files hold them as text."""
    try:
        number = math.nan if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name!r} must be a finite number, got {value!r}. Drop the record or give the number.")
    return number


def _items(name: str, values: Any, *keys: str) -> list[Mapping[str, Any]]:
    """A list of objects that have all of ``keys``."""
    for value in values if isinstance(values, list) else [None]:
        if not isinstance(value, Mapping) or any(value.get(key) is None for key in keys):
            raise ValueError(f"{name!r} must be a list of objects with {listed(keys)}, got {value!r} in it.")
    return values


def _best_first(scores: Sequence[float]) -> list[list[int]]:
    """A ranking by score, the higher the better; equal scores are tied."""
    levels = sorted(set(scores), reverse=True)
    return [[i for i, score in enumerate(scores) if score == level] for level in levels]


def _pair(prompt: Any, a: Any, b: Any, preference: float, **fields: Any) -> dict[str, Any]:
    """Two responses; a positive ``preference`` is for the first, 0 a tie."""
    for text in (a, b):
        if isinstance(text, str) and not text.strip():
            raise ValueError(f"a response of a pair must have text, got {text!r}. Drop the record.")
    return {"prompt": prompt, "responses": [a, b], "ranking": _best_first([preference, 0.0]), **fields}


def _one_of(name: str, value: Any, values: Mapping[Any, float]) -> float:
    """What a label says, as a preference for the first of two."""
    key = str(value).lower()
    if key not in values:
        raise ValueError(f"{name!r} must be one of {listed(list(values))}, got {value!r}.")
    return values[key]


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: record[key] for key in COMMON if record.get(key) is not None}
    if isinstance(fields.get("margin"), str):
        fields["margin"] = _number("margin", fields["margin"])
    return fields


def ranking(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    if flag("tie", record.get("tie")):
        raise ValueError("'tie' belongs to a pair, got it in a ranking. Put equals into a list: [[0, 2], 1].")
    responses = record["responses"]
    responses = list(map(_text, responses)) if isinstance(responses, list) else responses
    return {
        **_common(record),
        "prompt": messages_of(record.get("prompt")),
        "responses": responses,
        "ranking": record["ranking"],
    }


def scored(record: Mapping[str, Any], option: str) -> dict[str, Any]:
    scores, responses = record["scores"], record["responses"]
    if [len(side) if isinstance(side, list) else -1 for side in (scores, responses)] != [len(responses)] * 2:
        raise ValueError(f"'scores' must hold one number per response, got {scores!r}.")
    return ranking({**record, "ranking": _best_first([_number("scores", score) for score in scores])}, option)


def _text(response: Any) -> str:
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], Mapping):
        response = response[0].get("content")
    if not isinstance(response, str):
        raise ValueError(f"a response must be a string or one assistant message, got {response!r}.")
    return response


def chosen_rejected(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    """Texts, single messages, chats or lists of several texts. A prompt beside two whole chats repeats what they hold,
    or adds a system turn. The last turns of dialogues may be empty, the texts of a pair may not."""
    tie = flag("tie", record.get("tie"))
    prompt, *sides = (messages_of(record.get(key)) for key in ("prompt", "chosen", "rejected"))
    chats = [
        isinstance(side, list) and bool(side) and all(isinstance(part, Mapping) for part in side) for side in sides
    ]
    follow = [chat and side[0].get("role") == "assistant" for chat, side in zip(chats, sides, strict=True)]
    if all(chats) and any(len(side) > 1 for side in sides) and prompt is not None and all(follow):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt, *texts = split_messages([*before, *sides[0]], [*before, *sides[1]])
    elif all(chats) and (prompt is None or any(len(side) > 1 for side in sides)):
        prompt, *texts = split_messages(*beside_prompt(prompt, sides))
    elif prompt is None and all(isinstance(side, str) for side in sides):
        prompt, *texts = split_dialogue(*sides)
    else:
        several = [
            list(map(_text, side)) if isinstance(side, list) and not chat else [_text(side)]
            for side, chat in zip(sides, chats, strict=True)
        ]
        for side, found in zip(("chosen", "rejected"), several, strict=True):
            if not found or not all(text.strip() for text in found):
                raise ValueError(
                    f"{side!r} must have text, got {record[side]!r}. Drop the record, or put a response that ended at "
                    "once into 'responses' with a 'ranking'."
                )
        good, texts = len(several[0]), [*several[0], *several[1]]
        if good > 1 or len(texts) > 2:
            ranking = [list(range(good)), list(range(good, len(texts)))]
            return {**_common(record), "prompt": prompt, "responses": texts, "ranking": ranking}
    return {**_common(record), "prompt": prompt, "responses": texts, "ranking": [[0, 1]] if tie else [0, 1]}


def dialogues(record: Mapping[str, Any], option: str) -> dict[str, Any]:
    return chosen_rejected({key: value for key, value in record.items() if key != "prompt"}, option)


def benchmarked(record: Mapping[str, Any], option: str) -> dict[str, Any]:
    return {**chosen_rejected(record, option), "category": record["subset"]}


def rated_pair(chosen_key: str, rejected_key: str) -> Callable[[Any, str], dict[str, Any]]:
    def read(record: Mapping[str, Any], option: str) -> dict[str, Any]:
        chosen, rejected = _number(chosen_key, record[chosen_key]), _number(rejected_key, record[rejected_key])
        if chosen < rejected:
            raise ValueError(f"{chosen_key!r} must not be below {rejected_key!r}, got {chosen:g} < {rejected:g}.")
        return chosen_rejected({**record, "tie": chosen == rejected}, option)

    return read


def helpsteer2(rows: Sequence[Mapping[str, Any]], option: str) -> dict[str, Any]:
    weights: dict[str, float] = {}
    for sign, weight, scale in re.findall(r"([+-]?)(?:([\d.]+)\*)?([^+*-]+)", option or "helpfulness"):
        weights[scale] = (-1 if sign == "-" else 1) * _number("weight", weight or 1)
    if unknown := [scale for scale in weights if scale not in SCALES]:
        raise ValueError(f"a scale must be one of {', '.join(SCALES)}, got {unknown[0]!r}. Write a+0.5*b.")
    scores = [sum(weight * _number(scale, row[scale]) for scale, weight in weights.items()) for row in rows]
    responses = [row["response"] for row in rows]
    return {"prompt": rows[0]["prompt"], "responses": responses, "ranking": _best_first([round(s, 9) for s in scores])}


def helpsteer3(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    strength = -_number("overall_preference", record["overall_preference"])
    fields = {"margin": abs(strength), "category": record.get("domain") or ""}
    return _pair(record["context"], record["response1"], record["response2"], strength, **fields)


def ultrafeedback(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    answers = _items("completions", record["completions"], "response", "overall_score")
    scores = [_number("overall_score", answer["overall_score"]) for answer in answers]
    responses = [answer["response"] for answer in answers]
    return {"prompt": record["instruction"], "responses": responses, "ranking": _best_first(scores)}


def nectar(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    answers = _items("answers", record["answers"], "answer", "rank")
    ranking = _best_first([-_number("rank", answer["rank"]) for answer in answers])
    return {"prompt": record["prompt"], "responses": [answer["answer"] for answer in answers], "ranking": ranking}


def shp(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    preference = _one_of("labels", record["labels"], {"1": 1.0, "0": -1.0})
    ratio = _number("score_ratio", record.get("score_ratio") or 1)
    if ratio < 1:
        raise ValueError(f"'score_ratio' must be 1 or more, got {ratio:g}. It divides the higher score by the lower.")
    fields = {"margin": math.log(ratio), "category": record.get("domain") or ""}
    return _pair(record["history"], record["human_ref_A"], record["human_ref_B"], preference, **fields)


def pku_saferlhf(record: Mapping[str, Any], option: str) -> dict[str, Any]:
    labels = [name for name in ("better", "safer") if record.get(f"{name}_response_id") is not None]
    if option not in labels and (option or len(labels) != 1):
        raise ValueError(
            f"a record of PKU-SafeRLHF must have one label or a choice of them, got labels {labels} and choice "
            f"{option or None!r}. Name the format pku-saferlhf:better or pku-saferlhf:safer."
        )
    key = f"{option or labels[0]}_response_id"
    preference = _one_of(key, record[key], {"0": 1.0, "1": -1.0})
    return _pair(record["prompt"], record["response_0"], record["response_1"], preference)


def summaries(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    info = record["info"] if isinstance(record["info"], Mapping) else {}
    heads = {"SUBREDDIT: r/": "subreddit", "TITLE: ": "title", "POST: ": "post", "ARTICLE: ": "article"}
    parts = [head + info[key] for head, key in heads.items() if info.get(key)]
    if not info.get("post") and not info.get("article"):
        raise ValueError(f"'info' must have a 'post' or an 'article', got {record['info']!r}.")
    texts = [summary["text"] for summary in _items("summaries", record["summaries"], "text")]
    if len(texts) != 2:
        raise ValueError(f"'summaries' must hold two, got {len(texts)}.")
    preference = _one_of("choice", record["choice"], {"0": 1.0, "1": -1.0})
    return _pair("\n\n".join([*parts, "TL;DR:"]), texts[0], texts[1], preference)


def question(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    question, history = record["question"], record.get("history")
    prompt: Any = question
    if history is not None or record.get("system") is not None:
        prompt = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        for turn in history or []:
            if not isinstance(turn, list) or len(turn) != 2:
                raise ValueError(f"'history' must hold pairs of question and answer, got {turn!r}.")
            prompt += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
        prompt.append({"role": "user", "content": question})
    return _pair(prompt, record["response_chosen"], record["response_rejected"], 1.0)


def arena(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    ties = dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), 0.0)
    preference = _one_of("winner", record["winner"], {"model_a": 1.0, "model_b": -1.0, **ties})
    chats = [
        [dict(message) for message in _items(key, record[key], "role", "content")]
        for key in ("conversation_a", "conversation_b")
    ]
    return _pair(*split_messages(*chats), preference)


def unpaired(record: Mapping[str, Any], _: str) -> dict[str, Any]:
    raise ValueError(
        f"a preference must compare responses to one prompt, got one 'completion' with the 'label' {record['label']!r}."
        ' Join the good and the bad ones of each prompt: {"prompt", "chosen": [...], "rejected": [...]}.'
    )
