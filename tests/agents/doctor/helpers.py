"""Running single checks on planted faults."""

import dataclasses

from agents.doctor.checks import CHECKS
from agents.doctor.parts import ModelPart
from tests.conftest import tiny_model


def seen(title, part):
    """The levels and texts of what one check sees in a part."""
    kind, _, name = title.partition(": ")
    return [(found.level, found.what) for found in CHECKS[kind][name].run(part)]


def levels(title, part):
    return [level for level, _ in seen(title, part)]


def model_part(change=None, family="gpt2", **fields):
    """A tiny model with one fault: ``change(model)``, or other fields of the ``LanguageModel``."""
    lm = tiny_model(family)
    if change is not None:
        change(lm.model)
    return ModelPart(dataclasses.replace(lm, **fields))
