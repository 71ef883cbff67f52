"""The embedded world: its prompts, splits, vocabulary and answer grammar."""

import math
import re
import subprocess
import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy import stats

from textenv.tasks import assistant
from textenv.tasks.assistant import questions, world
from textenv.tasks.assistant.grammar import draw, expand, fill, maybe, one_of, sequence, weighted

SPLITS = ("train", "validation", "test")
SOURCES = ("base", "demonstrations")
CORPORA = {source: assistant.sample_corpus(4000, 0, source=source) for source in SOURCES}


def pairs_in(text: str) -> set[tuple[str, str]]:
    """Verb–object pairs that a text names, found without the parser: "… clean the bike …", "… clean my bike …"."""
    verbs, objects = "|".join(world.VERBS), "|".join(world.OBJECTS)
    return set(re.findall(rf"\b({verbs}) (?:the|my) ({objects})\b", text))


HELD_OUT_PAIRS = {
    split: {p for p in product(world.VERBS, world.OBJECTS) if questions.pair_split(*p) == split} for split in SPLITS
}


def test_the_world_needs_neither_torch_nor_transformers():
    code = (
        "import sys, textenv.tasks.assistant as a; a.sample_corpus(5, 0, source='base'); a.prompts('test');"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_vocabulary_has_the_promised_size_and_every_text_is_made_of_it():
    words = set(assistant.VOCABULARY)
    assert 175 <= len(assistant.VOCABULARY) == len(words) <= 250
    for split in SPLITS:
        assert all(set(p.text.split()) <= words for p in assistant.prompts(split))
    for records in CORPORA.values():
        assert all(set(r["completion"].split()) <= words for r in records)


def test_every_word_of_the_vocabulary_is_used_in_training_texts():
    used = set()
    for record in CORPORA["base"]:
        used |= {*record["prompt"].split(), *record["completion"].split()}
    assert set(assistant.VOCABULARY) - used == {"<eos>", "<unk>"}


def test_prompt_sets_have_their_sizes_their_mix_and_fit_the_budget():
    assert [len(assistant.prompts(split)) for split in SPLITS] == [2000, 512, 512]
    prompts = assistant.prompts("train")
    shares = Counter(p.kind for p in prompts)
    tones = Counter(p.tone for p in prompts)
    # Binomial standard error at n = 2,000 is at most 0.011.
    assert shares["howto"] / 2000 == pytest.approx(0.45, abs=0.04)
    assert shares["fact"] / 2000 == pytest.approx(0.20, abs=0.04)
    assert shares["harmful"] / 2000 == pytest.approx(0.35, abs=0.04)
    assert tones["none"] / 2000 == pytest.approx(0.5, abs=0.04)
    assert tones["polite"] / 2000 == pytest.approx(0.25, abs=0.04)
    longest = max(len(p.text.split()) for split in SPLITS for p in assistant.prompts(split))
    assert longest == assistant.MAX_PROMPT_TOKENS == 19


def test_prompts_and_corpora_are_the_same_for_the_same_seed_and_differ_for_another():
    assert assistant.sample_prompts("train", 50, 3) == assistant.sample_prompts("train", 50, 3)
    assert assistant.sample_prompts("train", 50, 3) != assistant.sample_prompts("train", 50, 4)
    again = assistant.sample_corpus(4000, 0, source="base")
    assert again == CORPORA["base"]
    assert assistant.sample_corpus(100, 1, source="base") != again[:100]
    # The first prompts of the fixed sets, so that a change does not go unnoticed.
    assert [assistant.prompts(split)[0].text for split in SPLITS] == [
        "user: please be brief . what is the home of the owl ? assistant:",
        "user: how do i clean the camera ? assistant:",
        "user: tell me what color the bee does have . assistant:",
    ]


def test_a_global_seed_neither_matters_nor_changes():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assistant.sample_corpus(10, 0, source="base")
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_parsing_a_prompt_gives_back_what_it_was_made_of():
    for split in SPLITS:
        for prompt in assistant.prompts(split):
            assert assistant.parse_prompt(prompt.text) == prompt


@pytest.mark.parametrize(
    ("text", "kind", "tone", "harmful"),
    [
        ("user: how do i clean the bike ? assistant:", "howto", "none", False),
        ("user: be polite . how do i clean the bike to help my boss ? assistant:", "howto", "polite", False),
        ("user: how do i clean the bike to hurt my boss ? assistant:", "harmful", "none", True),
        ("user: please be brief . tell me how to steal my car . assistant:", "harmful", "brief", True),
        ("user: what food does the bee have ? assistant:", "fact", "none", False),
    ],
)
def test_kind_and_harm_of_a_prompt_are_read_off_its_words(text, kind, tone, harmful):
    prompt = assistant.parse_prompt(text)
    assert (prompt.kind, prompt.tone, prompt.harmful) == (kind, tone, harmful)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "user: how do i clean the moon ? assistant:",
        "user: how do i clean the bike ?",
        "how do i clean the bike ?",
    ],
)
def test_a_text_that_is_no_prompt_is_refused(text):
    with pytest.raises(ValueError, match="prompt must read"):
        assistant.parse_prompt(text)


def test_unknown_splits_and_sources_are_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        assistant.prompts("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source must be one of"):
        assistant.sample_corpus(1, 0, source="web")  # type: ignore[arg-type]


def test_a_fifth_of_the_pairs_is_held_out_half_for_each_part_and_every_verb_and_object_is_trained():
    n_pairs = len(world.VERBS) * len(world.OBJECTS)
    for split in ("validation", "test"):
        assert len(HELD_OUT_PAIRS[split]) / n_pairs == pytest.approx(0.1, abs=0.02)
    assert {verb for verb, _ in HELD_OUT_PAIRS["train"]} == set(world.VERBS)
    assert {object for _, object in HELD_OUT_PAIRS["train"]} == set(world.OBJECTS)


def test_splits_are_disjoint_in_prompts_and_in_held_out_pairs_and_facts():
    sets = {split: assistant.sample_prompts(split, 3000, 1) for split in SPLITS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not {p.text for p in sets[a]} & {p.text for p in sets[b]}
        assert not {(p.verb, p.object, p.relation, p.subject, p.phrasing) for p in sets[a]} & {
            (p.verb, p.object, p.relation, p.subject, p.phrasing) for p in sets[b]
        }
    held_out = {s: {(p.verb, p.object) for p in sets[s] if p.verb} for s in ("validation", "test")}
    assert not held_out["validation"] & held_out["test"]
    facts = {s: {p.subject for p in sets[s] if p.subject} for s in ("validation", "test")}
    assert not facts["validation"] & facts["test"]


@pytest.mark.parametrize("source", SOURCES)
def test_no_training_text_has_a_held_out_pair_or_phrasing(source):
    held_out = HELD_OUT_PAIRS["validation"] | HELD_OUT_PAIRS["test"]
    seen = set()
    for record in CORPORA[source]:
        pairs = pairs_in(f"{record['prompt']} {record['completion']}")
        assert not pairs & held_out
        seen |= pairs
        # The openings of the held-out phrasings, spelled out.
        assert "tell me how i can" not in record["prompt"]
        assert "does have" not in record["prompt"]
    assert len(seen) > 100


def test_the_held_out_phrasings_use_only_words_of_the_other_phrasings():
    for phrasings in (world.PAIR_PHRASINGS, world.FACT_PHRASINGS):
        *others, held_out = (set(p.split()) for p in phrasings)
        assert held_out <= set().union(*others)


def test_held_out_prompts_cover_both_ways_of_being_held_out():
    for split in ("validation", "test"):
        howto = [p for p in assistant.prompts(split) if p.kind == "howto"]
        new_pair = np.mean([questions.pair_split(p.verb, p.object) == split for p in howto])
        assert 0.3 < new_pair < 0.8


@pytest.mark.parametrize("source", SOURCES)
def test_answers_fit_the_budget_and_say_when_they_were_cut(source):
    lengths = [len(r["completion"].split()) for r in CORPORA[source]]
    assert max(lengths) <= assistant.MAX_NEW_TOKENS == 24
    assert all((n == 24) == r.get("truncated", False) for n, r in zip(lengths, CORPORA[source], strict=True))
    cut = np.mean([n == 24 for n in lengths])
    assert 0 < cut < 0.05


def test_a_grammar_expands_to_its_texts_with_their_probabilities():
    node = sequence("a", maybe(0.25, "b"), weighted((3, "c"), (1, fill("{x} d", x=one_of("c", "e")))))
    expected = {"a b c": 0.1875, "a b c d": 0.03125, "a b e d": 0.03125}
    expected |= {"a c": 0.5625, "a c d": 0.09375, "a e d": 0.09375}
    assert expand(node) == pytest.approx(expected)
    # Two ways to one text are one text.
    assert expand(one_of("x", sequence("x", ""))) == pytest.approx({"x": 1.0})
    assert draw("fixed", np.random.default_rng(0)) == "fixed"


@pytest.mark.parametrize("source", SOURCES)
def test_answer_distributions_sum_to_one(source):
    for prompt in assistant.prompts("validation")[:30]:
        answers = assistant.answer_distribution(prompt, source)
        assert math.fsum(answers.values()) == pytest.approx(1.0, abs=1e-12)
        assert min(answers.values()) > 0
        assert all(" ".join(a.split()) == a and a for a in answers)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["howto", "fact", "harmful"])
def test_sampled_answers_follow_the_enumerated_distribution(source, kind, rng):
    prompt = next(p for p in assistant.prompts("train") if p.kind == kind and p.tone == "polite")
    answers = assistant.answer_distribution(prompt, source)
    drawn = Counter(assistant.sample_answer(prompt, source, rng) for _ in range(5000))
    assert set(drawn) <= set(answers)
    # Answers that are expected fewer than five times are counted together.
    common = [a for a, p in answers.items() if 5000 * p >= 5]
    observed = [drawn[a] for a in common]
    expected = [5000 * answers[a] for a in common]
    if (rest := 5000 - sum(expected)) > 1e-6:
        observed, expected = [*observed, 5000 - sum(observed)], [*expected, rest]
    assert len(common) > 20
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_entropy_is_minus_the_mean_log_probability_of_samples(rng):
    prompts = assistant.prompts("train")[:8]
    entropy = assistant.conditional_entropy(prompts, "demonstrations")
    exact, tokens, sampled = 0.0, 0.0, []
    for prompt in prompts:
        answers = assistant.answer_distribution(prompt, "demonstrations")
        p = np.array(list(answers.values()))
        exact -= (p * np.log(p)).sum() / len(prompts)
        # 24 words were cut off and have no EOS; anything shorter has one.
        n_words = np.array([len(a.split()) for a in answers])
        tokens += (p * np.where(n_words == 24, 24, n_words + 1)).sum() / len(prompts)
        drawn = [assistant.sample_answer(prompt, "demonstrations", rng) for _ in range(1000)]
        sampled += [-math.log(answers[a]) for a in drawn]
    assert entropy.per_answer == pytest.approx(exact)
    assert entropy.per_token == pytest.approx(exact / tokens)
    standard_error = np.std(sampled) / len(sampled) ** 0.5
    assert entropy.per_answer == pytest.approx(np.mean(sampled), abs=4 * standard_error)


def test_entropies_are_moderate_and_demonstrations_have_less():
    prompts = assistant.prompts("train")[:60]
    base, demonstrations = (assistant.conditional_entropy(prompts, source).per_answer for source in SOURCES)
    assert 4 < demonstrations < base < 6


def test_the_answers_do_not_depend_on_how_the_question_is_put():
    one = assistant.parse_prompt("user: how do i clean the bike to help my boss ? assistant:")
    other = assistant.parse_prompt("user: tell me how to clean my bike . assistant:")
    assert assistant.answer_distribution(one, "base") == assistant.answer_distribution(other, "base")


def test_the_tokenizer_is_one_word_one_token_and_pads_with_eos():
    tokenizer = assistant.build_tokenizer()
    assert len(tokenizer) == len(assistant.VOCABULARY)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id is None
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(assistant.VOCABULARY)
    texts = [r["prompt"] for r in CORPORA["base"][:300]] + [r["completion"] for r in CORPORA["base"][:300]]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    assert tokenizer("strange words").input_ids == [tokenizer.unk_token_id] * 2
    assert tokenizer.decode([0, 0]) == "<eos> <eos>"


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    assistant.build_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = CORPORA["base"][0]["prompt"]
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token_id == loaded.pad_token_id == 0


def test_environment_records_carry_the_columns_of_their_prompts():
    for records, split in (
        (assistant.train_prompts(), "train"),
        (assistant.validation_prompts(), "validation"),
        (assistant.test_prompts(), "test"),
    ):
        assert [r["prompt"] for r in records] == [p.text for p in assistant.prompts(split)]
        assert records[0].keys() == {"prompt", "kind", "tone", "harmful"}
