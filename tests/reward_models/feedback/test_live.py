"""The model that learns while people rank, and the order that asks first where models disagree."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit

from reward_models.feedback.live import LiveModel, split
from reward_models.feedback.order import disagreement, order_by_disagreement
from reward_models.feedback.project import NewItem, Response
from reward_models.feedback.queue import Queue
from reward_models.training.trainer import RewardConfig
from tests.conftest import tiny_model

CONFIG = RewardConfig(learning_rate=3e-3, epochs=8, batch_size=8)


def rank(project, clock, count):
    """Somebody likes blue better than red."""
    queue = Queue(project, clock=clock)
    with project.write() as database:
        database.execute("INSERT OR IGNORE INTO sessions VALUES ('s', 'annotator', NULL, 0)")
    queue.join("s", "Ann")
    for _ in range(count):
        lease = queue.next(1, "s")
        blue = next(i for i, place in enumerate(lease.shown) if "blue" in lease.item.responses[place].text)
        answer = {"ranking": [[blue], [1 - blue]], "request": f"request-{lease.item.id}"}
        queue.submit(lease.item.id, 1, "s", answer)


@pytest.fixture
def project(make_project):
    made = make_project(items=0)
    words = ("sky", "grass", "what", "the")
    prompts = [f"{a} {b} {c}" for a in words for b in words for c in words]
    made.add_items([NewItem(p, p, [Response("is red"), Response("is blue")]) for p in prompts])
    return made


def test_it_learns_from_what_came_in_and_is_measured_on_what_it_never_saw(project, clock):
    live = LiveModel(project, tiny_model(), CONFIG)
    assert live.figures()[0].value == "not yet"
    rank(project, clock, 3)
    live.update()
    assert live.agreement is None  # the first held-out prompt is the fourth
    rank(project, clock, 37)
    live.update()
    assert live.trained == 30
    assert live.agreement["prompts"] == 10
    assert live.agreement["accuracy_per_pair"] == 1.0
    assert live.figures()[0].value == "100.0 %"
    assert "10 pairs of 10 held-out prompts, after 30 rankings" in live.figures()[0].note
    rank(project, clock, 1)
    live.update()
    assert live.trained == 30  # too little is new


def test_an_answer_at_the_very_end_finds_the_project_closed_and_says_nothing(project, clock):
    live = LiveModel(project, tiny_model(), CONFIG)
    project.close()
    live.update()
    assert live.agreement is None


def test_a_prompt_stays_on_its_side_as_more_come_in():
    def rows(count):
        return [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(count)]

    small, large = split(rows(9)), split(rows(30))
    for few, many in zip(small, large, strict=True):
        assert {ranking.prompt for ranking in few} <= {ranking.prompt for ranking in many}
    assert [ranking.prompt for ranking in small[1]] == ["p3", "p7"]
    assert split([]) == ([], [])


def test_all_rankings_of_a_prompt_are_on_one_side():
    rows = [{"prompt": f"p{i // 2}", "chosen": "a", "rejected": "b"} for i in range(8)]
    train, held_out = split(rows)
    assert [ranking.prompt for ranking in train] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert [ranking.prompt for ranking in held_out] == ["p3", "p3"]


def test_it_never_trains_on_what_it_is_measured_on(project, clock, monkeypatch):
    seen = {}

    def train(model, rankings, config):
        seen["train"] = {ranking.prompt for ranking in rankings}
        return SimpleNamespace(model=model)

    def evaluate(model, rankings):
        seen["held out"] = {ranking.prompt for ranking in rankings}
        return {}

    monkeypatch.setattr("reward_models.feedback.live.train_reward_model", train)
    monkeypatch.setattr("reward_models.feedback.live.evaluate_reward_model", evaluate)
    rank(project, clock, 8)
    LiveModel(project, None, CONFIG).update()
    assert (len(seen["train"]), len(seen["held out"])) == (6, 2)
    assert seen["train"].isdisjoint(seen["held out"])


def test_disagreement_by_hand():
    assert disagreement(np.array([[1.0, 0.0], [3.0, 2.0]])) == 0  # the same difference
    assert disagreement(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx((expit(1) - expit(-1)) / 2)
    # Three responses: the models agree on one pair of three.
    scores = np.array([[0.0, 0.0, 5.0], [0.0, 0.0, -5.0]])
    assert disagreement(scores) == pytest.approx(2 / 3 * (expit(5) - expit(-5)) / 2)


def test_the_item_on_which_models_disagree_is_asked_first(make_project, clock):
    project = make_project(items=0)
    project.add_items([NewItem(p, p, [Response("is red"), Response("is blue")]) for p in ("agreed", "disputed")])

    def model(sign):
        return lambda prompts, texts: [sign * (p == "disputed") * ("red" in t) for p, t in zip(prompts, texts)]

    order_by_disagreement(project, [model(1.0), model(-1.0)])
    queue = Queue(project, clock=clock)
    with project.write() as database:
        database.execute("INSERT INTO sessions VALUES ('s', 'annotator', NULL, 0)")
    queue.join("s", "Ann")
    assert queue.next(1, "s").item.prompt == "disputed"


def test_one_model_cannot_disagree(project):
    with pytest.raises(ValueError, match="two or more reward models, got 1"):
        order_by_disagreement(project, [lambda prompts, completions: [0.0] * len(prompts)])
