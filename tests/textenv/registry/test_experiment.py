"""Experiment files: what is read, what is refused and where, and that nothing is half-registered."""

import dataclasses
import json
import subprocess
import sys

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

import textenv
from textenv import registry
from textenv.conformance import check
from textenv.registry.experiment import AgentPlan, RunPlan

TEXT = """\
language_models: {exp-sft: ./sft}
reward_models: {exp-polite: exp_module:politeness}
prompts:
  exp-mine: ./prompts.jsonl
environments:
  exp/Polite-v0: {prompts: exp-mine, reference: exp-sft, reward_model: exp-polite, max_prompt_tokens: 7,
                  max_new_tokens: 6, kl_coef: 1e-1, description: politely}
  exp/Other-v0:
    prompts: [red, {prompt: green, answer: blue}]
    reference: ./sft
    reward_model: micro-gold
    max_prompt_tokens: 7
    max_new_tokens: 6
agents:
  ppo-small:
    algorithm: ppo
    learning_rate: 3e-4
    batch_size: 256
run:
  environments: [exp/Polite-v0, textenv/Micro-v0]
  agents: [ppo-small, reference]
  seeds: [1, 2, 3]
  total_episodes: 5120
  output: runs/polite
"""


@pytest.fixture
def write(tmp_path, model_folder, monkeypatch):
    """Writes ``TEXT`` with replacements, beside all that it names; what it registers is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "sft").symlink_to(model_folder)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what is the sky ?"}\n{"prompt": "red"}\n')
    (tmp_path / "exp_module.py").write_text("def politeness(prompts, completions): return [1.5] * len(prompts)\n")

    def write(*replacements: tuple[str, str]):
        text = TEXT
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "exp.yaml"
        path.write_text(text)
        return path

    stores = [
        *registry.sources._sources.values(),
        registry.sources._loaded,
        registry.ids._descriptions,
        gymnasium.registry,
    ]
    before = [dict(store) for store in stores]
    yield write
    sys.modules.pop("exp_module", None)
    for store, content in zip(stores, before, strict=True):
        store.clear()
        store.update(content)


def test_a_file_becomes_plans_with_paths_beside_it(write, tmp_path):
    experiment = textenv.load_experiment(write())
    assert experiment.language_models == {"exp-sft": str(tmp_path / "sft")}
    assert experiment.prompts == {"exp-mine": str(tmp_path / "prompts.jsonl")}
    assert experiment.reward_models == {"exp-polite": "exp_module:politeness"}
    assert experiment.environments["exp/Polite-v0"] == {
        "prompts": "exp-mine",
        "reference": "exp-sft",
        "reward_model": "exp-polite",
        "max_prompt_tokens": 7,
        "max_new_tokens": 6,
        "kl_coef": 0.1,
        "description": "politely",
    }
    assert experiment.environments["exp/Other-v0"]["reference"] == str(tmp_path / "sft")
    options = {"learning_rate": 0.0003, "batch_size": 256}
    assert experiment.agents == {"ppo-small": AgentPlan(name="ppo-small", algorithm="ppo", options=options)}
    assert experiment.agents["ppo-small"].places["learning_rate"] == f"{tmp_path / 'exp.yaml'}, line 17"
    assert experiment.run == RunPlan(
        environments=("exp/Polite-v0", "textenv/Micro-v0"),
        agents=("ppo-small", "reference"),
        seeds=(1, 2, 3),
        total_episodes=5120,
        output=str(tmp_path / "runs/polite"),
    )
    json.dumps(dataclasses.asdict(experiment))


def test_reading_registers_nothing_and_registering_makes_ids_that_keep_the_contract(write):
    before = dict(gymnasium.registry)
    experiment = textenv.load_experiment(write())
    assert dict(gymnasium.registry) == before
    experiment.register()
    assert textenv.registered_ids()["exp/Polite-v0"] == "politely"
    env = gymnasium.make("exp/Polite-v0")
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert env.reset(seed=3)[1] == again.reset(seed=3)[1]
    assert again.step(0)[4]["rm_score"] == 1.5
    assert check("exp/Polite-v0").failures == {}
    assert check("exp/Other-v0").failures == {}


def test_registering_twice_or_the_same_file_again_changes_nothing_and_warns_of_nothing(write):
    path = write()
    textenv.load_experiment(path).register()
    model = textenv.language_model("exp-sft")
    textenv.load_experiment(path).register()
    assert textenv.language_model("exp-sft") is model


def test_a_registration_that_fails_midway_leaves_nothing(write, monkeypatch):
    experiment = textenv.load_experiment(write())
    before = dict(gymnasium.registry), [registry.registered_sources(kind) for kind in registry.sources._sources]
    real = registry.register

    def fails_for_other(env_id, **options):
        if env_id == "exp/Other-v0":
            raise ValueError("no")
        real(env_id, **options)

    monkeypatch.setattr(registry, "register", fails_for_other)
    with pytest.raises(ValueError, match="no"):
        experiment.register()
    assert (
        dict(gymnasium.registry),
        [registry.registered_sources(kind) for kind in registry.sources._sources],
    ) == before


def test_merge_keys_share_options_and_a_later_one_wins(write):
    other = "  exp/Other-v0:\n    prompts: [red, {prompt: green, answer: blue}]\n    reference: ./sft\n"
    experiment = textenv.load_experiment(
        write(
            ("  exp/Polite-v0: {", "  exp/Polite-v0: &polite {"),
            (other, "  exp/Other-v0:\n    <<: *polite\n    kl_coef: 0.7\n"),
        )
    )
    made = experiment.environments["exp/Other-v0"]
    assert (made["prompts"], made["reward_model"], made["kl_coef"]) == ("exp-mine", "micro-gold", 0.7)


def test_data_sets_are_named_beside_the_file_or_on_the_hub(write, tmp_path):
    beside = ("./prompts.jsonl", "{dataset: prompts.jsonl, column: prompt}")
    experiment = textenv.load_experiment(write(beside))
    assert experiment.prompts["exp-mine"] == {"dataset": str(tmp_path / "prompts.jsonl"), "column": "prompt"}
    experiment.register()
    assert textenv.prompt_set("exp-mine").prompts == ("what is the sky ?", "red")
    hub = ("./prompts.jsonl", "{dataset: org/name, column: prompt, split: test}")
    assert (
        textenv.load_experiment(write(hub, ("exp-mine", "exp-hub"), ("exp/Polite", "exp/Hub"))).prompts["exp-hub"][
            "dataset"
        ]
        == "org/name"
    )


BAD = [
    ([("kl_coef: 1e-1", "kl_coeff: 1e-1")], 7, "exp/Polite-v0 → kl_coeff: unknown key.*Did you mean 'kl_coef'"),
    ([("environments:\n  exp/P", "enviroments:\n  exp/P")], 5, "'enviroments'.*Did you mean 'environments'"),
    ([("reference: exp-sft", "reference: exp-stf")], 6, "→ reference: language model must.*Did you mean 'exp-sft'"),
    ([("prompts: exp-mine", "prompts: mine")], 6, r"→ prompts: prompts must be .* got 'mine'"),
    ([("reward_model: micro-gold", "reward_model: mikro-gold")], 11, "Did you mean 'micro-gold'"),
    ([("reference: ./sft", "reference: ./stf")], 10, r"must exist, got './stf', which is not at '.*/stf'"),
    ([("exp-sft: ./sft", "exp-sft: /no/such/sft")], 1, r"exp-sft: must exist, got '/no/such/sft'"),
    ([("./prompts.jsonl", "./prompt.jsonl")], 4, r"exp-mine: must exist, got './prompt.jsonl'"),
    ([("./prompts.jsonl", "{dataset: ./nope, column: p}")], 4, r"→ dataset: must exist, got './nope'"),
    ([("./prompts.jsonl", "{dataset: org/name, spilt: test}")], 4, "Did you mean 'split'"),
    ([("./prompts.jsonl", "[]")], 4, "exp-mine: prompts must hold at least one prompt"),
    ([("[red, {", "['', {")], 9, "record 1: a prompt"),
    ([("exp_module:p", "exp_modul:p")], 2, "must be importable.*Install 'exp_modul' or put it into"),
    ([("exp-polite: exp_module:politeness", "exp-polite: 3")], 2, r"must be a registered name.* got 3"),
    ([("    max_new_tokens: 6\nagents", "agents")], 8, "exp/Other-v0: max_new_tokens must be given"),
    ([("max_prompt_tokens: 7\n", "max_prompt_tokens: seven\n")], 12, "max_prompt_tokens must be a whole number"),
    ([("max_prompt_tokens: 7\n", "max_prompt_tokens: 0\n")], 12, "max_prompt_tokens must be 1 or more"),
    ([("kl_coef: 1e-1", "kl_coef: -1e-1")], 7, "kl_coef must be 0 or more, got -0.1"),
    ([("exp/Other-v0:", "exp Other:")], 8, "Malformed environment ID"),
    ([("exp/Other-v0:", "textenv/Micro-v0:")], 8, "an id must keep its options.*new version"),
    ([("{exp-polite:", "{micro-gold:")], 2, "must keep its source.*Choose another name"),
    ([("exp_module:politeness", "micro-gold")], 2, "must not be a registered name, got 'micro-gold'"),
    ([("{exp-sft: ./sft}", "[./sft]")], 1, "language_models: must be a mapping of names"),
    ([("    algorithm: ppo\n", "")], 15, r"ppo-small: algorithm must be a name, got None"),
    ([("ppo-small, reference", "ppo-smal, reference")], 21, r"agents → 0: .*'ppo-smal'\. Did you mean 'ppo-small'"),
    ([("[exp/Polite-v0, text", "[exp/Polit-v0, text")], 20, "environments → 0: .*Did you mean 'exp/Polite-v0'"),
    ([("[1, 2, 3]", "[1, 2, 2]")], 22, r"seeds → 2: an item must appear once, got 2"),
    ([("[1, 2, 3]", "3")], 22, "seeds: must be a list of whole numbers"),
    ([("[1, 2, 3]", "[]")], 22, "seeds: must be a list of whole numbers"),
    ([("total_episodes: 5120", "total_episodes: 5k")], 23, "must be a whole number, 1 or more"),
    ([("total_episodes: 5120", "episodes: 5120")], 23, "unknown key.*Did you mean 'total_episodes'"),
    ([("  output: runs/polite\n", "")], 19, "run: output must be given"),
    ([("    algorithm: ppo", "    algorithm: [ppo")], 17, "not valid YAML"),
    ([("    batch_size: 256", "    learning_rate: 256")], 18, r"got 'learning_rate' twice"),
    ([("  seeds:", "  off:")], 22, r"a key must be text, got 'off'. Quote it"),
    ([("[1, 2, 3]", "!!python/object/apply:os.getcwd []")], 22, "a value must be plain"),
    ([("ppo-small:\n", "ppo-small: &again\n"), ("256", "[*again]")], 18, "20 levels or fewer"),
]


@pytest.mark.parametrize(("replacements", "line", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_mistake_is_one_error_with_file_line_key_and_remedy_and_registers_nothing(write, replacements, line, message):
    path = write(*replacements)
    before = dict(gymnasium.registry), [registry.registered_sources(kind) for kind in registry.sources._sources]
    with pytest.raises(ValueError, match=message) as error:
        textenv.load_experiment(path)
    assert str(error.value).startswith(f"{path}, line {line}: ")
    assert (
        dict(gymnasium.registry),
        [registry.registered_sources(kind) for kind in registry.sources._sources],
    ) == before


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    (tmp_path / "old.yaml").write_bytes("a: 1\n# café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"old\.yaml, line 2: .* UTF-8 text, got byte 0xe9\. Save it as UTF-8"):
        textenv.load_experiment(tmp_path / "old.yaml")
    with pytest.raises(ValueError, match=r"must be a YAML file, got '.*none.yaml'"):
        textenv.load_experiment(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ValueError, match="must be a mapping of the keys language_models"):
        textenv.load_experiment(tmp_path / "empty.yaml")


def test_reading_and_registering_load_no_torch_and_import_no_module_that_is_named(write):
    code = (
        f"import sys, textenv; textenv.load_experiment({str(write())!r}).register(); "
        "assert not {'torch', 'transformers', 'exp_module'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
