"""Projects made of sampled responses and of preferences."""

from collections import Counter

import pytest

from reward_models.feedback.create import (
    Plan,
    Sampling,
    add_battles,
    add_rankings,
    add_sampled,
    distinct_responses,
    turn,
)
from reward_models.feedback.project import Project
from reward_models.feedback.queue import EVERYONE
from reward_models.preferences import load_rankings
from tests.conftest import PROMPTS, tiny_model
from textenv.data.records import PromptSet

SAMPLING = Sampling(max_new_tokens=6, batch_size=8)
PROMPT_SET = PromptSet(tuple(PROMPTS), {"category": ("a", "b", None, "c")})


def ignore(*_):
    """No progress bar."""


def always_the_same(model, prompts, *_):
    return [("same", "eos")] * len(prompts)


@pytest.fixture(scope="module")
def models():
    return [tiny_model(), tiny_model("llama")]


def make(path, models, k=3, plan=Plan(), sampling=SAMPLING, advance=ignore):  # noqa: B008
    project = Project.create(path, "ranking", {"seed": sampling.seed})
    return project, add_sampled(project, PROMPT_SET, models, k, sampling, plan, advance)


def test_each_prompt_has_k_different_responses_of_the_models_in_turn(tmp_path, models):
    project, short = make(tmp_path / "p.db", models)
    items = project.items()
    assert short == 0
    assert [item.prompt for item in items] == PROMPTS
    assert [item.category for item in items] == ["a", "b", "", "c"]
    counts = Counter()
    for place, item in enumerate(items):
        assert len({response.text.strip() for response in item.responses}) == 3
        names = [response.model for response in item.responses]
        assert names == [models[(place + slot) % 2].name for slot in range(3)]
        counts.update(names)
        for response in item.responses:
            assert response.sampling == {"max_new_tokens": 6, "temperature": 1.0, "seed": 0}
            assert response.finish_reason in ("eos", "length")
    assert set(counts.values()) == {6}
    project.close()


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path, models):
    def kill(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed.db", models, advance=kill)
    with Project(tmp_path / "killed.db") as project:
        assert 0 < project.count() < 4
    killed, _ = make(tmp_path / "killed.db", models)
    whole, _ = make(tmp_path / "whole.db", models)
    assert killed.items() == whole.items()
    killed.close()
    whole.close()


def test_a_model_that_always_says_the_same_is_counted_and_not_shown(tmp_path, models, monkeypatch):
    monkeypatch.setattr(
        "reward_models.feedback.create._draw", lambda model, prompts, *_: [("same", "eos")] * len(prompts)
    )
    project, short = make(tmp_path / "p.db", models)
    assert short == 4
    assert [len(item.responses) for item in project.items()] == [1] * 4
    assert project.rows("SELECT MAX(needed) AS most FROM items")[0]["most"] == 0
    project.close()


def test_a_text_that_comes_again_is_drawn_again(models, monkeypatch):
    texts = iter(["x", "x ", "x", "y", "y", "z"])

    def draw(model, prompts, *_):
        return [(next(texts), "eos") for _ in prompts]

    monkeypatch.setattr(
        "reward_models.feedback.create._draw", lambda model, prompts, *_: [(next(texts), "eos") for _ in prompts]
    )
    (found,) = distinct_responses(["q"], models[:1], [[0, 0, 0]], SAMPLING, 0)
    assert [response.text for response in found] == ["x", "y", "z"]


@pytest.mark.parametrize("add", [lambda *given: add_sampled(*given[:3], 2, *given[3:]), add_battles])
def test_a_prompt_that_one_of_the_models_cannot_answer_is_named_before_any_response_is_drawn(tmp_path, models, add):
    chat = [{"role": "user", "content": "the sky"}]
    refused = PromptSet(("red", "blue", "green", chat), {}, ("a.jsonl, line 1", "a.jsonl, line 3", "b", "c"))
    long = PromptSet(("red", "red " * 70), {}, ("a.jsonl, line 1", "a.jsonl, line 3"))
    project = Project.create(tmp_path / "p.db", "ranking", {"seed": 0})
    for prompts, says in (
        (refused, r"^c: a chat prompt needs a chat template, which the tokenizer of"),
        (
            long,
            r"^a\.jsonl, line 3: a prompt and max_new_tokens must fit the context of .* \(64\), got 76 tokens\. Lower",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            add(project, prompts, models, SAMPLING, Plan(), ignore)
        assert project.items() == []


def test_a_share_of_the_items_goes_to_several_annotators():
    plan = Plan(overlap=0.25, annotators=3)
    needed = Counter(plan.needed(f"prompt {i}", seed=1) for i in range(4000))
    assert set(needed) == {1, 3}
    assert needed[3] == pytest.approx(1000, abs=100)
    assert [plan.needed(f"prompt {i}", 1) for i in range(50)] != [plan.needed(f"prompt {i}", 2) for i in range(50)]


def test_items_of_every_kind_go_to_as_many_annotators_as_the_plan_says(tmp_path, models):
    def needed(name, kind, add):
        with Project.create(tmp_path / name, kind, {"seed": 0}) as project:
            add(project)
            return {row["needed"] for row in project.rows("SELECT needed FROM items")}

    plan = Plan(overlap=1.0, annotators=3)
    records = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    made = [
        needed("s.db", "ranking", lambda project: add_sampled(project, PROMPT_SET, models, 2, SAMPLING, plan, ignore)),
        needed("b.db", "arena", lambda project: add_battles(project, PROMPT_SET, models, SAMPLING, plan, ignore)),
        needed("r.db", "ranking", lambda project: add_rankings(project, load_rankings(records), plan, 0)),
    ]
    assert made == [{3}, {3}, {3}]


def test_each_chunk_and_each_seed_draws_for_itself(models):
    def draw(seed, chunk):
        sampling = Sampling(max_new_tokens=6, seed=seed)
        (found,) = distinct_responses(["the sky"], models[:1], [[0, 0, 0]], sampling, chunk)
        return [response.text for response in found]

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 4)
    assert draw(0, 0) != draw(1, 0)


def test_battles_are_balanced_between_the_sides_at_random():
    turns = [turn(place, "0 1", seed=0) for place in range(1000)]
    assert all(turns[i] + turns[i + 1] == 1 for i in range(0, 1000, 2))
    assert 200 < sum(turns[::2]) < 300


def test_each_seed_and_each_two_models_have_turns_of_their_own():
    rows = [[turn(place, group, seed) for place in range(64)] for group, seed in (("0 1", 0), ("0 2", 0), ("0 1", 1))]
    assert rows[0] != rows[1] != rows[2] != rows[0]


def test_of_two_items_one_after_the_other_each_has_another_turn(tmp_path, models):
    def turns(name, kind, add):
        with Project.create(tmp_path / name, kind, {"seed": 0}) as project:
            add(project)
            return [row["turn"] for row in project.rows("SELECT turn FROM items ORDER BY id")]

    records = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    plan = Plan(overlap=0.0)
    made = (
        turns("s.db", "ranking", lambda project: add_sampled(project, PROMPT_SET, models, 2, SAMPLING, plan, ignore)),
        turns("b.db", "arena", lambda project: add_battles(project, PROMPT_SET, models, SAMPLING, plan, ignore)),
        turns("r.db", "ranking", lambda project: add_rankings(project, load_rankings(records), plan, 0)),
    )
    for own in made:
        assert (len(own), own[0] + own[1], own[2] + own[3]) == (4, 1, 1)


def test_an_arena_has_a_battle_for_each_prompt_and_two_models(tmp_path, models):
    three = [*models, tiny_model("qwen2")]
    project = Project.create(tmp_path / "p.db", "arena", {"seed": 0})
    for _ in range(2):  # the second call adds nothing
        add_battles(project, PROMPT_SET, three, SAMPLING, Plan(overlap=0.0), ignore)
    battles = Counter(tuple(response.model for response in item.responses) for item in project.items())
    names = [model.name for model in three]
    assert battles == {(names[0], names[1]): 4, (names[0], names[2]): 4, (names[1], names[2]): 4}
    answers = {(item.prompt, r.model): r.text for item in project.items() for r in item.responses}
    assert all(answers[item.prompt, r.model] == r.text for item in project.items() for r in item.responses)
    project.close()


def test_equal_answers_of_two_models_are_nobodys_work(tmp_path, models, monkeypatch):
    monkeypatch.setattr(
        "reward_models.feedback.create._draw", lambda model, prompts, *_: [("same", "eos")] * len(prompts)
    )
    project = Project.create(tmp_path / "p.db", "arena", {"seed": 0})
    add_battles(project, PROMPT_SET, models, SAMPLING, Plan(overlap=1.0), ignore)
    assert {row["needed"] for row in project.rows("SELECT needed FROM items")} == {0}
    project.close()


def test_preferences_are_ranked_anew_and_checks_keep_their_ranking(tmp_path):
    rankings = load_rankings(
        [
            {"prompt": "p", "chosen": "good", "rejected": "bad"},
            {"prompt": "q", "responses": ["c", "a", "b"], "ranking": [1, [0, 2]], "category": "k"},
        ]
    )
    project = Project.create(tmp_path / "p.db", "ranking", {"seed": 0})
    add_rankings(project, rankings, Plan(overlap=0.0), 0)
    add_rankings(project, rankings, Plan(), 0, checks=True)
    first, second, check, tied = project.items()
    assert [response.text for response in first.responses] == ["good", "bad"]
    assert first.known is None
    assert second.category == "k"
    assert check.known == ((0,), (1,))
    assert tied.known == ((0,), (1, 2))
    assert tied.responses[0].text == "a"
    assert [row["needed"] for row in project.rows("SELECT needed FROM items")] == [1, 1, EVERYONE, EVERYONE]
    project.close()
