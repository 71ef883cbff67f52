"""Published experiments: small sets with the columns of the hub's, and a machine that cannot reach it."""

import gymnasium
import pytest
from huggingface_hub import constants

import textenv
from textenv.registry import clear_cache, environment_spec
from textenv.tasks import hub

IDS = ["textenv/HH-v0", "textenv/TLDR-v0", "textenv/IMDB-v0"]
ROWS = {
    (hub.HH, "train"): [
        {"chosen": "\n\nHuman: what ?\n\nAssistant: sky\n\nHuman: not\n\nAssistant: blue", "rejected": ""},
        {"chosen": "\n\nHuman: red ?\n\nAssistant: grass", "rejected": ""},
        {"chosen": "\n\nHuman: red ?\n\nAssistant: is", "rejected": ""},
    ],
    (hub.TLDR, "validation"): [{"prompt": "the sky is blue TL;DR:", "completion": " blue"}] * 2,
    (hub.IMDB, "train"): [{"text": f"review {i}", "label": i // 10} for i in range(20)],
    (hub.IMDB, "test"): [{"text": f"held out {i}", "label": 0} for i in range(10)],
}


@pytest.fixture
def local(monkeypatch):
    def read(dataset, split):
        return {f"record {i}": row for i, row in enumerate(ROWS[dataset, split])}

    clear_cache()
    monkeypatch.setattr(hub, "read_records", read)
    yield
    clear_cache()


@pytest.fixture
def unreachable(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    clear_cache()


def test_prompts_end_where_the_answer_begins_and_stand_once(local):
    first = "\n\nHuman: what ?\n\nAssistant: sky\n\nHuman: not\n\nAssistant:"
    assert textenv.prompt_set("hh-train").prompts == (first, "\n\nHuman: red ?\n\nAssistant:")
    assert textenv.prompt_set("tldr-validation").prompts == ("the sky is blue TL;DR:",)


def test_reviews_are_split_four_to_one_and_mixed_the_same_every_time(local):
    train, validation, test = (textenv.prompt_set(f"imdb-{split}").prompts for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (16, 4, 2)
    assert {*train, *validation} == {row["text"] for row in ROWS[hub.IMDB, "train"]}
    assert len({*train, *validation}) == 20
    assert train[:8] != tuple(f"review {i}" for i in range(8))  # the data set is sorted by label
    clear_cache()
    assert textenv.prompt_set("imdb-train").prompts == train
    assert {text.split()[0] for text in test} == {"held"}


@pytest.mark.parametrize("env_id", IDS)
def test_an_id_with_models_of_ones_own_runs_on_its_prompts(env_id, local, text_options):
    own = {name: text_options[name] for name in ("reference", "reward_model")}
    prompts = {"textenv/HH-v0": "hh-train", "textenv/TLDR-v0": "tldr-validation", "textenv/IMDB-v0": "imdb-test"}[
        env_id
    ]
    env = gymnasium.make(env_id, **own, prompts=prompts, max_prompt_tokens=20, max_new_tokens=4)
    env.reset(seed=0)
    env.step(1)
    *_, terminated, _, info = env.step(0)
    assert terminated
    assert info["kl_coef"] == {"textenv/HH-v0": 0.001, "textenv/TLDR-v0": 0.05, "textenv/IMDB-v0": 0.1}[env_id]


@pytest.mark.parametrize("env_id", IDS)
def test_without_the_hub_an_error_names_what_to_give_instead(env_id, unreachable, text_options):
    with pytest.raises(ValueError, match=r"(?s)Name a folder on this machine instead|Pass reference=\.\.\."):
        gymnasium.make(env_id)
    own = {name: text_options[name] for name in ("reference", "reward_model")}
    named = environment_spec(env_id).kwargs["prompts"]
    with pytest.raises(ValueError, match=r'(?s)from the data set .* cannot be reached.*prompts="prompts\.jsonl"'):
        gymnasium.make(env_id, **own, max_prompt_tokens=20, max_new_tokens=4, prompts=named)
