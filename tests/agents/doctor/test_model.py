"""Faults of a language model, planted one by one; the healthy neighbour of each is silent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import textenv
from agents.doctor import diagnose, examine
from agents.doctor.checks import CHECKS
from agents.doctor.parts import ModelPart
from tests.agents.doctor.helpers import levels, model_part, seen
from tests.conftest import tiny_model
from textenv.conformance.subject import Skipped
from textenv.data.records import write_jsonl
from textenv.lm import TokenRule, load_language_model, sample_responses

NUMERIC = ["finite", "precision", "dropout", "batch", "left padding", "cache", "first ratio", "sampler", "saving"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_healthy_model_has_no_fault_of_its_numbers(family):
    part = model_part(family=family)
    found = {name: seen(f"model: {name}", part) for name in [*NUMERIC, "generation config"]}
    assert {name for name, what in found.items() if what} <= {"dropout"}
    assert all(level == "note" for level, _ in found["dropout"])


def changed_file(folder, change):
    tiny_model("llama").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def changed_part(folder, change):
    return ModelPart(load_language_model(changed_file(folder, change)), str(folder))


def test_a_checkpoint_without_its_head_is_found(tmp_path):
    folder = changed_file(tmp_path / "lm", lambda weights: weights.pop("lm_head.weight"))
    [finding] = examine(model=str(folder))
    assert (finding.check, finding.level) == ("model: loading", "error")
    assert "without 1 of them (lm_head.weight)" in finding.what


def test_weights_without_a_place_are_found(tmp_path):
    assert not seen("model: complete", changed_part(tmp_path / "whole", lambda weights: None))
    part = changed_part(tmp_path / "lm", lambda weights: weights.update({"other.weight": torch.ones(2)}))
    [(level, what)] = seen("model: complete", part)
    assert level == "warning"
    assert "other.weight" in what


def test_a_reward_model_given_as_a_language_model_is_found():
    folder = str(textenv.registry.registered_sources("reward model")["assistant-rm"])
    [(level, what)] = seen("model: complete", ModelPart(load_language_model(folder), folder))
    assert level == "warning"
    assert "score.weight" in what


def test_a_model_in_memory_has_no_files_to_check():
    with pytest.raises(Skipped):
        seen("model: complete", model_part())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_broken_weight_is_found(value):
    def spoil(model):
        model.transformer.ln_f.bias.data[3] = value

    [(level, what)] = seen("model: finite", model_part(spoil))
    assert level == "error"
    assert "transformer.ln_f.bias" in what


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checks_that_need_numbers_are_skipped_where_there_are_none(family):
    def spoil(model):
        next(model.parameters()).data.fill_(float("nan"))

    part = model_part(spoil, family)
    for name in NUMERIC[2:]:
        with pytest.raises(Skipped, match="not finite"):
            seen(f"model: {name}", part)


def test_a_set_up_on_a_model_without_numbers_has_one_error(tmp_path):
    changed_file(tmp_path / "lm", lambda weights: weights["lm_head.weight"].fill_(float("nan")))
    record = {"prompt": "what is", "chosen": "the sky", "rejected": "not red"}
    write_jsonl(tmp_path / "data.jsonl", [record])
    reward_model = {"rule": "length", "score": 1.0}
    diagnosis = diagnose(model=str(tmp_path / "lm"), reward_model=reward_model, data=[tmp_path / "data.jsonl"])
    errors = [finding.check for finding in diagnosis.findings if finding.level == "error"]
    assert errors == ["model: finite"]
    assert "not finite" in diagnosis.skipped["environment: contract"]
    assert "not finite" in diagnosis.skipped["environment: cost"]
    assert "reward model: finite" in diagnosis.ran


def test_weights_to_train_below_float32_are_found():
    assert levels("model: precision", model_part(lambda model: model.bfloat16())) == ["error"]
    assert levels("model: precision", model_part(lambda model: model.double())) == []


def test_a_folder_saved_in_bfloat16_is_noted(tmp_path):
    lm = tiny_model()
    lm.save_pretrained(tmp_path)
    assert levels("model: precision", ModelPart(lm, str(tmp_path))) == []
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert levels("model: precision", ModelPart(lm, str(tmp_path))) == ["note"]


def switch_dropout_on(model):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1


def faulty(change):
    """A part whose model is changed after the package has wrapped it."""
    part = model_part()
    change(part.lm.model)
    return part


def test_dropout_in_training_mode_is_found():
    [(level, what)] = seen("model: dropout", faulty(switch_dropout_on))
    assert level == "error"
    assert "in training mode" in what


def test_training_mode_without_dropout_is_no_error():
    assert "error" not in levels("model: dropout", faulty(lambda model: model.train()))


def mix_rows(model):
    """Every row is centred by its batch, like batch normalisation."""

    def hook(module, args, output):
        output.last_hidden_state = output.last_hidden_state - 0.5 * output.last_hidden_state.mean(0, keepdim=True)
        return output

    model.base_model.register_forward_hook(hook)


def test_rows_that_depend_on_their_batch_are_found():
    assert "error" in levels("model: batch", faulty(mix_rows))


def ignore_mask(model):
    def hook(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None, "position_ids": None}

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


def test_a_model_that_reads_its_padding_is_found():
    part = faulty(ignore_mask)
    assert levels("model: left padding", part) == ["warning"]
    assert levels("model: cache", part) == ["warning"]


def test_a_recurrent_family_is_decoded_without_a_cache():
    part = model_part(family="mamba")
    assert levels("model: cache", part) == ["warning"]
    assert levels("model: first ratio", part) == []


def see_the_future(model):
    def hook(module, args, output):
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.flip(1)
        return output

    model.base_model.register_forward_hook(hook)


def test_a_model_that_sees_later_tokens_is_found():
    assert levels("model: cache", faulty(see_the_future)) == ["error"]


def sharper_when_sampling(model):
    """Only decoding with a cache in large batches passes single columns of many rows."""

    def hook(module, args, output):
        if output.last_hidden_state.shape[1] == 1 and len(output.last_hidden_state) > 8:
            output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.base_model.register_forward_hook(hook)


def test_a_sampler_that_differs_from_the_scorer_is_found_in_two_ways():
    part = faulty(sharper_when_sampling)
    [(level, what)] = seen("model: first ratio", part)
    assert level == "error"
    assert "the ratio of an untrained policy" in what
    assert levels("model: sampler", part) == ["error"]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_samples_at_another_temperature_are_found(temperature):
    part = model_part()
    batch, lm = part.drawn[0], part.lm
    rule = TokenRule(temperature=temperature, stop_ids=lm.ending_ids)
    generator = torch.Generator().manual_seed(0)
    options = {"max_new_tokens": 16, "rule": rule, "pad_id": lm.pad_id, "generator": generator}
    sampled = sample_responses(lm.model, batch.prompt_ids, batch.prompt_lengths, **options)
    rows = batch._replace(response_ids=sampled.response_ids, response_lengths=sampled.response_lengths)
    part.__dict__["drawn"] = rows, sampled
    [(level, what)] = seen("model: sampler", part)
    assert level == "error"
    counts = [int(count) for count in what.rpartition(": ")[2].split()]
    likeliest, rarest = counts[0], counts[-1]
    assert (likeliest > rarest) == (temperature < 1)


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_k": 50}, {"top_p": 0.9}, {"repetition_penalty": 1.1}])
def test_settings_of_generate_that_change_the_distribution_are_found(setting):
    part = model_part()
    for name, value in setting.items():
        setattr(part.lm.model.generation_config, name, value)
    [(level, what)] = seen("model: generation config", part)
    assert level == "warning"
    assert next(iter(setting)) in what


def test_neutral_settings_of_generate_are_silent():
    part = model_part()
    for name, value in {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}.items():
        setattr(part.lm.model.generation_config, name, value)
    assert not seen("model: generation config", part)


def test_what_is_lost_on_saving_is_found():
    def outside_the_model(model):
        shift = torch.randn(32, generator=torch.Generator().manual_seed(0))

        def hook(module, args, output):
            output.last_hidden_state = output.last_hidden_state + shift
            return output

        model.base_model.register_forward_hook(hook)

    assert levels("model: saving", faulty(outside_the_model)) == ["error"]


def test_every_check_of_a_model_states_what_holds_of_a_healthy_one():
    for check in CHECKS["model"].values():
        assert check.rule.endswith(".")
