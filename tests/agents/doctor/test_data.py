"""Faults of demonstrations and preferences, with figures worked out by hand."""

import json

import pytest

from agents.doctor import diagnose
from agents.doctor.data import read_data, read_prompts
from tests.agents.doctor.helpers import demonstration, levels, pair, seen
from textenv.conformance.subject import Skipped
from textenv.data.records import write_jsonl
from textenv.tasks.assistant import sample_corpus, sample_rankings

COLOURS = ("red", "green", "blue", "sky", "grass")


def test_healthy_demonstrations_are_silent(read):
    part = read([demonstration(colour, "the sky") for colour in COLOURS], held_out=["what"])
    for name in ("endings", "context", "empty completions", "duplicates", "leakage"):
        assert not seen(f"demonstrations: {name}", part)


def test_a_completion_that_is_cut_does_not_teach_its_end(read):
    [(level, what)] = seen("demonstrations: endings", read([demonstration(), demonstration("red", "sky " * 70)]))
    assert level == "warning"
    assert "1 of 2" in what
    assert "0 marked as truncated, 1 cut at 64 tokens" in what
    fits = demonstration("red", "sky " * 62)  # 1 + 62 + EOS = 64
    assert not seen("demonstrations: endings", read([demonstration(), fits]))
    one_more = demonstration("red", "sky " * 64)
    assert levels("demonstrations: endings", read([demonstration(), one_more])) == ["warning"]


def test_completions_that_are_all_truncated_are_an_error(read):
    [(level, what)] = seen("demonstrations: endings", read([demonstration(truncated=True)] * 3))
    assert level == "error"
    assert "3 marked as truncated, 0 cut" in what


def test_a_few_truncated_completions_are_a_note(read):
    part = read([demonstration(truncated=True), *[demonstration()] * 10])
    assert levels("demonstrations: endings", part) == ["note"]


def test_an_ending_token_in_the_text_is_found(read):
    [(level, what)] = seen("demonstrations: endings", read([demonstration(completion="blue <eos>"), demonstration()]))
    assert level == "warning"
    assert "1 of 2 completions end twice" in what


def test_a_prompt_longer_than_the_context_is_found(read):
    [(level, what)] = seen("demonstrations: context", read([demonstration("sky " * 63), demonstration()]))
    assert level == "warning"
    assert "1 of 2 prompts" in what
    assert not seen("demonstrations: context", read([demonstration("sky " * 62)]))


def test_margins_below_0_contradict_their_label(read):
    records = [pair() | {"margin": margin} for margin in (-1.0, "-2.5", 0, 1)]
    [(level, what)] = seen("preferences: margins", read(records))
    assert level == "error"
    assert "2 of 4 margins are below 0, the least -2.5" in what
    assert not seen("preferences: margins", read([*records[2:], pair()]))


def test_preferences_longer_than_the_context_are_counted(read):
    """A word is a token, and EOS one more: 1 + 62 + 1 are 64, and one more of either is too many."""
    fits, starts, ends = pair("sky " * 62, prompt="red"), pair("sky " * 62, prompt="red red"), pair("sky " * 64)
    [(level, what)] = seen("preferences: context", read([fits, starts, ends]))
    assert level == "warning"
    assert "of 6 responses, 1 lose their end, and 1 the beginning of their prompt, to fit 64 tokens" in what
    assert not seen("preferences: context", read([fits]))


@pytest.mark.parametrize("completion", ["", " ", "\n"])
def test_an_empty_completion_is_found(read, completion):
    assert levels("demonstrations: empty completions", read([demonstration(completion=completion)])) == ["warning"]


def test_without_a_model_what_needs_one_is_skipped(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [demonstration()])
    with pytest.raises(Skipped):
        seen("demonstrations: endings", read_data(tmp_path / "data.jsonl", None, None))


@pytest.mark.parametrize(("repeats", "level"), [(1, "note"), (2, "warning")])
def test_duplicates_are_counted(read, repeats, level):
    records = [demonstration(" ".join(["red"] * n)) for n in range(1, 11)]
    [(found, what)] = seen("demonstrations: duplicates", read(records + records[:repeats]))
    assert found == level
    assert f"{repeats} of {10 + repeats} records" in what
    other = read([demonstration(), demonstration(completion="red")])
    assert not seen("demonstrations: duplicates", other)


@pytest.mark.parametrize("held_out", ["the sky is", " The  sky IS"])
def test_a_held_out_prompt_that_is_trained_on_is_found(read, held_out):
    for record, kind in ((demonstration(), "demonstrations"), (pair(), "preferences")):
        [(level, what)] = seen(f"{kind}: leakage", read([record], held_out=[held_out, "red"]))
        assert level == "error"
        assert "1 of 2 held-out prompts (50%)" in what
    assert not seen("preferences: leakage", read([pair()], held_out=["the sky"]))


def test_held_out_prompts_are_read_from_records_of_every_kind(tmp_path):
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    for record, prompt in (
        ({"prompt": "red"}, "red"),
        (demonstration("red"), "red"),
        (pair(prompt="red"), "red"),
        ({"messages": chat}, chat[:1]),
    ):
        write_jsonl(tmp_path / "held.jsonl", [record])
        assert read_prompts(tmp_path / "held.jsonl") == [prompt]


def test_equal_responses_and_malformed_records_are_counted(read):
    part = read([pair(), pair("blue", "blue"), {"prompt": "red", "chosen": "blue"}, pair("red", "sky")])
    found = seen("preferences: records", part)
    assert [level for level, _ in found] == ["warning", "error"]
    assert "1 of 4 records have equal responses" in found[0][1]
    assert "1 of 4 records cannot be read" in found[1][1]
    assert not seen("preferences: records", read([pair()]))


def test_contradicting_labels_are_a_rate_with_an_interval(read):
    """Eight pairs labelled twice, two of them both ways: 25 %, Wilson 7 to 59 %; noise (1 − √(1 − 0.5)) / 2 = 15 %."""
    agreed = [pair(prompt=colour) for colour in ("a", "b", "c", "d", "e", "f")]
    split = [record for prompt in "gh" for record in (pair(prompt=prompt), pair("red", "blue", prompt))]
    [(level, what)] = seen("preferences: label noise", read(agreed * 2 + split))
    assert level == "note"
    assert "of 8 times" in what
    assert "25% (7% to 59%)" in what
    assert "15% of the labels" in what
    assert not seen("preferences: label noise", read(agreed * 2))
    with pytest.raises(Skipped):
        seen("preferences: label noise", read(agreed))


def test_labels_that_are_coin_flips_are_a_warning(read):
    records = [record for n in range(10) for record in (pair(prompt=f"p {n}"), pair("red", "blue", f"p {n}"))]
    [(level, what)] = seen("preferences: label noise", read(records))
    assert level == "warning"
    assert "100%" in what


def long_pairs(longer, shorter):
    """Pairs of which so many prefer the longer and the shorter response."""
    rows = [pair("blue sky", "red", f"p {n}") for n in range(longer)]
    return rows + [pair("red", "blue sky", f"q {n}") for n in range(shorter)]


@pytest.mark.parametrize(
    ("longer", "shorter", "level"), [(90, 10, "warning"), (10, 90, "warning"), (62, 38, "note"), (52, 48, None)]
)
def test_a_preference_for_length_is_found(read, longer, shorter, level):
    found = seen("preferences: length bias", read(long_pairs(longer, shorter)))
    assert [seen_level for seen_level, _ in found] == ([] if level is None else [level])
    if level is not None:
        assert f"in {longer}% of 100 pairs" in found[0][1]
        assert f"an accuracy of 0.{max(longer, shorter)}" in found[0][1]


def shown(place, prompt, key="ranking"):
    order = [place, 1 - place]
    return {"prompt": prompt, "responses": ["blue", "red"]} | (
        {"ranking": order} if key == "ranking" else {"scores": [1 - place, place]}
    )


@pytest.mark.parametrize("key", ["ranking", "scores"])
def test_a_place_that_wins_too_often_is_found(read, key):
    biased = read([shown(int(n < 5), f"p {n}", key) for n in range(40)])
    [(level, what)] = seen("preferences: position bias", biased)
    assert level == "warning"
    assert "88% of 40" in what
    assert "50% by chance" in what
    assert not seen("preferences: position bias", read([shown(n % 2, f"p {n}", key) for n in range(40)]))


@pytest.mark.parametrize("scores", [["10", "9", "2"], [10, 9, 2], ["1e1", "9", "-2"]])
def test_places_are_those_of_the_loader_which_reads_scores_as_numbers(read, scores):
    """As text, "9" would be above "10": the best would never be the first."""
    records = [{"prompt": f"p {n}", "responses": ["blue", "red", "sky"], "scores": scores} for n in range(40)]
    [(_, what)] = seen("preferences: position bias", read(records))
    assert "the first one in 100% of 40" in what
    assert "33% by chance" in what
    turned = [{**record, "scores": scores[n % 3 :] + scores[: n % 3]} for n, record in enumerate(records)]
    assert not seen("preferences: position bias", read(turned))


@pytest.mark.parametrize(
    ("best", "places"),
    [
        ({"ranking": [[0], 1]}, "100% of 40"),
        ({"ranking": [[1], [0]]}, "0% of 40"),
        ({"winner": "MODEL_B"}, "0% of 40"),
        ({"labels": "1"}, "100% of 40"),
    ],
)
def test_places_are_read_in_every_form_that_the_loader_takes(read, best, places):
    chat = lambda word: [{"role": "user", "content": "q"}, {"role": "assistant", "content": word}]  # noqa: E731
    shown = {
        "ranking": {"prompt": "q", "responses": ["blue", "red"]},
        "winner": {"conversation_a": chat("blue"), "conversation_b": chat("red")},
        "labels": {"history": "q", "human_ref_A": "blue", "human_ref_B": "red"},
    }
    [key] = best
    [(_, what)] = seen("preferences: position bias", read([shown[key] | best] * 40))
    assert places in what


def test_places_are_read_from_a_table_too(tmp_path):
    rows = [f'q {n},"[""blue"", ""red""]","[0, 1]"' for n in range(30)]
    (tmp_path / "data.csv").write_text("\n".join(["prompt,responses,ranking", *rows]))
    assert levels("preferences: position bias", read_data(tmp_path / "data.csv", None, None)) == ["warning"]


def test_a_layout_that_puts_the_best_first_has_no_places(read):
    with pytest.raises(Skipped):
        seen("preferences: position bias", read([pair()]))


def test_a_battle_won_by_the_first_model_is_a_place(read):
    chat = lambda word: [{"role": "user", "content": "q"}, {"role": "assistant", "content": word}]  # noqa: E731
    battle = {"conversation_a": chat("blue"), "conversation_b": chat("red"), "winner": "model_a"}
    assert levels("preferences: position bias", read([battle] * 30)) == ["warning"]


def test_the_embedded_data_is_healthy(tmp_path):
    corpus = sample_corpus(300, 0, source="demonstrations")
    write_jsonl(tmp_path / "demonstrations.jsonl", corpus)
    prompts = [record["prompt"] for record in corpus]
    answers = [[record["completion"], other["completion"]] for record, other in zip(corpus, corpus[1:] + corpus[:1])]
    answers = [pair[:: (-1) ** number] for number, pair in enumerate(answers)]  # the proper answer in both places
    different = [number for number, (one, other) in enumerate(answers) if one != other]
    rankings = sample_rankings([prompts[n] for n in different], [answers[n] for n in different], seed=0)
    write_jsonl(tmp_path / "preferences.jsonl", rankings)
    files = [tmp_path / "demonstrations.jsonl", tmp_path / "preferences.jsonl"]
    diagnosis = diagnose(data=files)
    assert not [finding for finding in diagnosis.findings if finding.level != "note"], diagnosis.findings
    assert "preferences: position bias" in diagnosis.ran


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (json.dumps({"question": "a", "answer": "b"}) + "\n", "columns question, answer"),
        (json.dumps(pair("blue", "blue")) + "\n", "a good record"),
        ("nonsense\n", "line 1"),
        (f"{json.dumps(demonstration())}\nnonsense\n", "line 2"),
        (f"{json.dumps(demonstration())}\n\n{json.dumps(demonstration(completion=None))}\n", "line 3"),
    ],
)
def test_data_that_does_not_load_is_a_finding_and_the_rest_goes_on(tmp_path, text, message):
    (tmp_path / "data.jsonl").write_text(text)
    write_jsonl(tmp_path / "good.jsonl", [demonstration()])
    diagnosis = diagnose(data=[tmp_path / "data.jsonl", tmp_path / "good.jsonl"])
    [finding] = diagnosis.findings
    assert (finding.check, finding.level) == ("data: loading", "error")
    assert message in finding.what
    assert str(tmp_path / "data.jsonl") in finding.what
    assert "demonstrations: duplicates" in diagnosis.ran


def test_held_out_prompts_that_do_not_load_are_a_finding(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [demonstration()])
    (tmp_path / "held.jsonl").write_text("nonsense\n")
    diagnosis = diagnose(data=[tmp_path / "data.jsonl"], held_out=tmp_path / "held.jsonl")
    [finding] = diagnosis.findings
    assert (finding.check, finding.level) == ("held-out prompts: loading", "error")
    assert "held.jsonl, line 1" in finding.what
    assert "demonstrations: leakage" in diagnosis.skipped


def test_a_line_of_preferences_that_is_no_json_is_counted(tmp_path):
    lines = ["{", *[json.dumps(pair(prompt=colour)) for colour in COLOURS], '{"prompt": "red", "chosen"']
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    [(level, what)] = seen("preferences: records", read_data(tmp_path / "data.jsonl", None, None))
    assert level == "error"
    assert "2 of 7 records cannot be read" in what
    assert "line 1" in what


def test_a_first_preference_without_a_response_is_counted(read):
    [(level, what)] = seen("preferences: records", read([{"prompt": "red", "chosen": "blue"}, pair()]))
    assert level == "error"
    assert "1 of 2" in what


def test_a_missing_file_is_a_clear_error(tmp_path):
    for part in (
        {"data": [tmp_path / "gone.jsonl"]},
        {"env_id": "textenv/Micro-v0", "held_out": tmp_path / "gone.jsonl"},
    ):
        with pytest.raises(ValueError, match=r"gone\.jsonl"):
            diagnose(**part)
