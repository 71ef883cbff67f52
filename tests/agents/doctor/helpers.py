"""Running single checks on planted faults."""

import dataclasses

from tokenizers.processors import TemplateProcessing

from agents.doctor.checks import CHECKS
from agents.doctor.parts import ModelPart
from tests.conftest import tiny_model, word_tokenizer
from textenv.lm.load import wrap_language_model

TURNS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
ASK = "{% if add_generation_prompt %}assistant {% endif %}"
GOOD = TURNS + ASK


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


def chat_part(template, *, bos=False, ending=True, words=("user", "assistant", "system"), texts=()):
    """A tiny model with a chat template, whose turns end with ``<end>`` and whose texts may start with ``<bos>``."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<end>"]})
    tokenizer.add_tokens(["QUESTION", "ANSWER", "SYSTEM", "question", *words])
    if bos:
        special = [("<bos>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=special)
    tokenizer.chat_template = template
    lm = tiny_model()
    lm.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")]
    lm.model.generation_config.eos_token_id = ends if ending else ends[0]
    return ModelPart(wrap_language_model(lm.model, tokenizer), texts=texts)


def demonstration(prompt="the sky is", completion="blue", **more):
    return {"prompt": prompt, "completion": completion, **more}


def pair(chosen="blue", rejected="red", prompt="the sky is"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
