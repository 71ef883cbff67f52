"""Simulated annotators rank over HTTP; a reward model trained on the export is as good as one on their rankings."""

import itertools
import threading

import pytest

from reward_models.evaluation import evaluate_reward_model
from reward_models.feedback.create import Plan, Sampling, add_sampled
from reward_models.feedback.export import export
from reward_models.feedback.project import Project
from reward_models.preferences import load_rankings, prompt_key
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv import registry
from textenv.data.records import PromptSet
from textenv.tasks import assistant

RANKINGS, ANNOTATORS, K = 400, 4, 4


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A project of the embedded world's SFT model, and held-out rankings."""
    records = assistant.train_prompts()[: RANKINGS + 200]
    prompts = PromptSet(tuple(record["prompt"] for record in records), {})
    model = registry.language_model("assistant-sft")
    sampling = Sampling(max_new_tokens=24, batch_size=512)
    project = Project.create(tmp_path_factory.mktemp("e2e") / "world.db", "ranking", {"seed": 0})
    add_sampled(project, prompts, [model], K, sampling, Plan(overlap=0.0), lambda done, total: None)
    items = [item for item in project.items() if len(item.responses) > 1]
    held_out = [
        record
        for seed in range(4)
        for record in simulated([(item.prompt, [r.text for r in item.responses]) for item in items[RANKINGS:]], seed)
    ]
    with project.write() as database:
        database.execute("UPDATE items SET needed = 0 WHERE id > ?", (items[RANKINGS - 1].id,))
    yield project, model, held_out
    project.close()


def simulated(shown, seed):
    """Rankings of the world's annotators, of responses in the order shown."""
    prompts, responses = zip(*shown, strict=True)
    return assistant.sample_rankings(prompts, responses, seed)


@pytest.mark.slow
def test_people_over_http_teach_as_much_as_their_rankings_directly(answered, serve, clock, tmp_path):
    project, model, held_out = answered
    person = serve(project)
    direct, errors = [], []

    def work(number):
        someone = person(f"annotator {number}")
        for step in itertools.count():
            clock.now += 1  # a second passes: nobody floods the server
            lease = someone.next()
            if lease["item"] is None:
                return
            (record,) = simulated([(lease["prompt"], lease["responses"])], seed=10_000 * number + step)
            answer = someone.answer(lease["item"], [[i] for i in record["ranking"]], f"request-{number}-{step}")
            if answer.json() != {"saved": True}:
                errors.append(answer.text)
            direct.append(record)

    people = [threading.Thread(target=work, args=(number,)) for number in range(ANNOTATORS)]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    assert errors == []
    counts = export(project, tmp_path / "out")
    assert counts["rankings"] == len(direct) == RANKINGS

    found = []
    config = RewardConfig(learning_rate=1e-3, epochs=3, batch_size=16, freeze_embeddings=True, loss="listwise")
    for rankings in (load_rankings(tmp_path / "out" / "rankings.jsonl"), load_rankings(direct)):
        rankings = sorted(rankings, key=lambda one: (prompt_key(one.prompt), one.responses))  # whoever came first
        found.append([(prompt_key(one.prompt), one.responses) for one in rankings])  # best first
        accuracy = evaluate_reward_model(train_reward_model(model, rankings, config).model, held_out)
        found.append(accuracy["accuracy_per_pair"])
    assert found[:2] == found[2:]
    assert found[1] > 0.6
