"""Model cards say what was trained on what, with which result, and travel to the hub with the model."""

import json

import pytest
import yaml
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_model
from tests.hub_server import HubServer
from textenv.cli import main
from textenv.data.cards import Card, card_text
from textenv.data.folders import check_replaceable

RECORDS = [{"prompt": "what is the sky ?", "completion": "blue"}, {"prompt": "red", "completion": "green grass"}]
RANKINGS = [
    {"prompt": "red", "chosen": "green", "rejected": "red"},
    {"prompt": "the", "chosen": "sky", "rejected": "is"},
]


@pytest.fixture
def hub(monkeypatch):
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def started(tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    for name, records in (("demos", RECORDS), ("pairs", RANKINGS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def train(command, folder, capsys, *more):
    data = "demos" if command == "sft" else "pairs"
    arguments = ["--model", folder / "start", "--data", folder / f"{data}.jsonl", "--output", folder / command]
    code = main([command, *map(str, arguments), "--json", *more])
    return code, capsys.readouterr()


def metadata(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize(
    ("command", "task", "setting"),
    [
        ("sft", "text-generation", "turns"),
        ("reward", "text-classification", "tie_strength"),
        ("dpo", "text-generation", "beta"),
    ],
)
def test_a_trained_folder_has_a_card_and_is_pushed_whole(command, task, setting, started, hub, capsys):
    code, printed = train(command, started, capsys, "--push-to-hub", "me/tiny", "--learning-rate", "0.0123")
    assert code == 0, printed.err
    figures = json.loads(printed.out)
    assert figures["pushed_to"] == f"{hub.url}/me/tiny"
    assert [repository.get("visibility") for repository in hub.made] == ["private"]
    folder, pushed = started / command, hub.files["me/tiny"]
    local = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= pushed.keys()
    assert {name: content for name, content in pushed.items() if name != ".gitattributes"} == local
    head, body = metadata(pushed["README.md"].decode())
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", task)
    assert "base_model" not in head  # a folder of this machine is no address
    assert str(started) not in body
    assert "**Base model:** start" in body
    assert f"**Data:** {'demos' if command == 'sft' else 'pairs'}.jsonl" in body
    assert "| learning_rate | 0.0123 |" in body
    assert f"| {setting} |" in body
    assert f"| steps | {figures['steps']:.4g} |" in body
    check_replaceable(folder)  # the card belongs to the result


def test_the_policy_of_a_learner_is_pushed_without_what_only_resumes_it(tmp_path, hub, capsys):
    arguments = ["ppo", "--env-id", "textenv/Micro-v0", "--output", str(tmp_path / "ppo"), "--push-to-hub", "me/ppo"]
    arguments += ["--total-episodes", "32", "--batch-size", "32", "--num-envs", "32", "--lora-rank", "2", "--json"]
    arguments += ["--merge-into", str(tmp_path / "merged")]
    assert main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pushed_to"].endswith("/me/ppo")
    pushed = hub.files["me/ppo"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= pushed.keys()
    assert not {"state.json", "optimizer.pt", "value.safetensors"} & pushed.keys()
    head, body = metadata(pushed["README.md"].decode())
    assert head["library_name"] == "peft"
    assert "**Base model:** micro-reference" in body
    assert "**Data:** micro" in body
    assert "| environment | textenv/Micro-v0 |" in body
    assert "| reward_model | micro-gold |" in body
    assert f"| kl | {figures['kl']:.4g} |" in body
    for folder in ("ppo", "merged"):
        check_replaceable(tmp_path / folder)
    assert metadata((tmp_path / "merged" / "README.md").read_text("utf-8"))[0]["library_name"] == "transformers"


def test_what_the_hub_holds_is_named_in_the_metadata(tmp_path):
    spec = {"classifier": str(tmp_path), "label": "GOOD"}
    card = Card("PPO", "text-generation", "org/base", "org/data", {"reward_model": spec, "x": None}, {"kl": 0.123456})
    head, body = metadata(card_text(card, tmp_path))
    assert (head["base_model"], head["datasets"]) == ("org/base", ["org/data"])
    assert head["tags"] == ["textenv", "ppo"]
    assert f"| reward_model | classifier: {tmp_path.name}, label: GOOD |" in body
    assert "| kl | 0.1235 |" in body
    assert "| x |" not in body


def rows_of(settings, folder):
    """The lines of the card's last table."""
    text = card_text(Card("PPO", "text-generation", "org/base", "org/data", settings, {}), folder)
    return text.partition("| setting | |\n|---|---|\n")[2].splitlines()


def test_lists_and_nested_settings_are_a_line_each_without_the_folders_of_this_machine(tmp_path):
    mixed = json.dumps({"mean": [f"{tmp_path}/one", "org/two"]})
    settings = {
        "data": [f"{tmp_path}/a.jsonl", "org/set"],
        "reward": {"steps": (1, 0.25), "cache": {"folder": f"{tmp_path}/rm"}},
        "reward_model": mixed,
    }
    assert rows_of(settings, tmp_path) == [
        "| data | a.jsonl, org/set |",
        "| reward | steps: 1, 0.25, cache: folder: rm |",
        "| reward_model | mean: one, org/two |",
    ]


def test_a_setting_does_not_break_the_table(tmp_path):
    assert rows_of({"pattern": "please|thank\nyou"}, tmp_path) == [r"| pattern | please\|thank you |"]


def test_without_a_token_or_with_a_bad_name_nothing_is_trained(started, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, printed = train("sft", started, capsys, "--push-to-hub", "me/tiny")
    assert code != 0
    assert "push_to_hub needs a token of the hub, got none for 'me/tiny'. Run: hf auth login" in printed.err
    code, printed = train("sft", started, capsys, "--push-to-hub", "me/ti ny")
    assert code != 0
    assert "push_to_hub must be OWNER/NAME, got 'me/ti ny'" in printed.err
    code, printed = train("sft", started, capsys, "--push-to-hub", "tiny")
    assert code != 0
    assert "push_to_hub must be OWNER/NAME, got 'tiny'. Say whose it is." in printed.err
    assert not (started / "sft").exists()


def test_without_the_hub_nothing_is_trained(started, hub, monkeypatch, capsys):
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    code, printed = train("sft", started, capsys, "--push-to-hub", "me/tiny")
    assert code != 0
    assert "push_to_hub needs the hub, for 'me/tiny'. The hub (http://127.0.0.1:9) cannot be reached" in printed.err
    assert not (started / "sft").exists()


def test_a_hub_that_refuses_leaves_the_model_and_says_how_to_push_it(started, hub, capsys):
    hub.refuse = 403
    code, printed = train("sft", started, capsys, "--push-to-hub", "me/tiny")
    assert code != 0
    assert "the hub must take 'me/tiny', got" in printed.err
    assert f"hf upload me/tiny {started / 'sft'}" in printed.err
    assert AutoModelForCausalLM.from_pretrained(started / "sft") is not None
