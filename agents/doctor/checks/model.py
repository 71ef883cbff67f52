"""The language model: its weights, and whether every way to its log-probabilities leads to the same ones."""

import json
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from scipy import stats
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from agents.doctor.finding import Check, Seen
from agents.doctor.parts import ModelPart
from textenv.conformance.subject import Skipped
from textenv.lm import LanguageModel, Responses, TokenRule, response_logprobs, response_outputs
from textenv.lm.adapters import adapter_base
from textenv.lm.decoding import decodes_with_cache
from textenv.lm.load import load_language_model
from textenv.training.isolation import untouched_globals
from textenv.training.trainable import check_trainable

IMPLAUSIBLE = 1e-4
"""p-value below which what is sampled is not what is scored."""
MAX_SAVED = 2**30
"""Bytes of weights that are written to a temporary folder."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
}
"""Settings of ``generate`` that change the distribution, and the values with which they do not; None is neutral too."""


def complete(part: ModelPart) -> Iterator[Seen]:
    """Every weight of the files has a place in a causal language model (one that lacks weights is not loaded)."""
    if part.files is None:
        raise Skipped("the model does not come from a folder or hub id of its own")
    with untouched_globals():
        hf_logging.set_verbosity_error()
        options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(part.files, **options)
    unplaced = sorted(loaded[1]["unexpected_keys"])
    family = type(part.lm.model).__name__
    if unplaced:
        yield Seen("warning", f"without a place in {family}: {len(unplaced)} weights, {', '.join(unplaced[:3])}")


def finite(part: ModelPart) -> Iterator[Seen]:
    """Weights and log-probabilities are finite numbers."""
    if part.broken:
        yield Seen("error", part.broken)


def precision(part: ModelPart) -> Iterator[Seen]:
    """Weights to train are in float32."""
    try:
        check_trainable(part.lm.model)
    except ValueError:
        yield Seen("error", f"weights to train are in {part.lm.model.dtype}")
    settings = part.folder and part.folder / "config.json"
    if settings and settings.is_file():
        config = json.loads(settings.read_text("utf-8"))
        saved = config.get("dtype", config.get("torch_dtype"))
        if saved not in (None, "float32", "float64"):
            yield Seen("note", f"saved in {saved}; loaded in {part.lm.model.dtype} here, as saved by dtype='auto'")


def dropout(part: ModelPart) -> Iterator[Seen]:
    """Two passes over the same tokens agree: no dropout, in training mode either."""
    change = float((part.scored() - part.scored()).abs().max())
    if not change <= part.tolerance / 100:
        mode = "training" if part.lm.model.training else "evaluation"
        yield Seen("error", f"in {mode} mode, two passes over the same tokens differ by {change:.2g} nats")
        return
    settings = part.lm.model.config.to_dict()
    rates = [f"{name} {rate:g}" for name, rate in settings.items() if _is_dropout(name) and rate]
    if rates:
        yield Seen("note", f"the configuration has {', '.join(rates)}, which this package switches off")


def _is_dropout(name: str) -> bool:
    return name.endswith(("pdrop", "dropout")) and not name.startswith(("summary", "classifier"))


def batch(part: ModelPart) -> Iterator[Seen]:
    """The log-probabilities of a response do not depend on the rest of its batch."""
    for size in (1, 8):
        change = float((part.scored(size) - part.own).abs().max())
        if not change <= part.tolerance:
            yield Seen("error", f"in batches of {size}, a log-probability moves by {change:.2g} nats")


def left_padding(part: ModelPart) -> Iterator[Seen]:
    """Masked padding on the left does not change the log-probabilities of a response."""
    rows = [part.few.select(torch.tensor([row])) for row in range(len(part.own))]
    try:
        padded = {left: torch.cat([part.plain_logprobs(row, left) for row in rows]) for left in (1, 3)}
    except TypeError:
        raise Skipped("the family takes no positions") from None
    except (IndexError, RuntimeError) as error:
        yield Seen("warning", f"the model cannot read rows padded on the left: {error}")
        return
    changes = {left: float((logprobs - part.own).abs().max()) for left, logprobs in padded.items()}
    left = max(changes, key=lambda name: changes[name])
    if not changes[left] <= part.tolerance:
        yield Seen("warning", f"after {left} columns of padding, a log-probability moves by {changes[left]:.2g} nats")


def cache(part: ModelPart) -> Iterator[Seen]:
    """Decoding a padded batch with a cache yields what the model says of each row by itself."""
    part.need_finite()
    try:
        right = decodes_with_cache(part.lm.model)
    except ValueError as error:
        yield Seen("error", str(error))
        return
    if not right:
        yield Seen("warning", "it does not: responses are decoded here by whole passes, which is slow and right")


def first_ratio(part: ModelPart) -> Iterator[Seen]:
    """Log-probabilities taken while sampling equal those of teacher forcing: the first ratio is 1."""
    rows, sampled = part.drawn
    again = response_logprobs(part.lm.model, rows, part.rule)
    change = float((again - sampled.logprobs).abs().max())
    if not change <= part.tolerance:
        worst = float((again - sampled.logprobs).exp().sub(1).abs().max()) + 1
        yield Seen("error", f"they differ by up to {change:.2g} nats: the ratio of an untrained policy is {worst:.4g}")


def sampler(part: ModelPart) -> Iterator[Seen]:
    """Sampled tokens follow the distribution that scores them, by χ²."""
    yield from drawn_otherwise(part.lm, part.drawn[0], part.rule)


@torch.no_grad()
def drawn_otherwise(lm: LanguageModel, rows: Responses, rule: TokenRule) -> Iterator[Seen]:
    """An error where responses are not draws from what a model says under a rule."""
    generator = torch.Generator().manual_seed(1)
    places: list[float] = []
    for index in torch.arange(len(rows.prompt_lengths)).split(16):
        few = rows.select(index)
        probabilities = response_outputs(lm.model, few.to(lm.device), rule)[0].exp().double().cpu()
        own = probabilities.gather(1, few.response_ids[few.response_mask][:, None])
        above = torch.where(probabilities > own, probabilities, 0.0).sum(1)
        equal = torch.where(probabilities == own, probabilities, 0.0).sum(1)
        places += (above + equal * torch.rand(len(above), generator=generator, dtype=torch.float64)).tolist()
    # Where a token lies in its distribution, the likeliest first, is uniform in [0, 1] if it was drawn from it.
    seen = torch.histc(torch.tensor(places).clamp(0.0, 1.0), 10, 0.0, 1.0).numpy()
    p = float(stats.chisquare(seen).pvalue) if seen.sum() else 0.0
    if not p >= IMPLAUSIBLE:
        tenths = " ".join(f"{count:.0f}" for count in seen)
        yield Seen("error", f"χ² of {len(places)} tokens has p = {p:.0e}; by tenth, the likeliest first: {tenths}")


def generation_config(part: ModelPart) -> Iterator[Seen]:
    """The settings of generate leave the model's distribution as it is."""
    config: Any = part.lm.model.generation_config
    values = {name: getattr(config, name, None) for name in NEUTRAL}
    found = [f"{name} {value}" for name, value in values.items() if value is not None and value not in NEUTRAL[name]]
    if found:
        yield Seen("warning", f"generation_config has {', '.join(found)}")


def saving(part: ModelPart) -> Iterator[Seen]:
    """A model that is saved and loaded says the same as before."""
    model, before = part.lm.model, part.scored()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > MAX_SAVED:
        raise Skipped(f"the weights have {size / 2**30:.1f} GiB")
    with tempfile.TemporaryDirectory(prefix="textenv-doctor-") as folder:
        part.lm.save_pretrained(folder)
        if adapter_base(folder) is not None:
            raise Skipped("an adapter is saved without its base")
        again = load_language_model(folder, dtype=model.dtype, device=part.lm.device)
    logprobs = response_logprobs(again.model, part.few, part.rule)
    change = float((logprobs - before).abs().max())
    if not change <= part.tolerance:
        yield Seen("error", f"a log-probability moves by {change:.2g} nats")
    text = part.lm.decode(part.few.prompt_ids[-1].tolist())
    if again.encode_prompt(text) != part.lm.encode_prompt(text):
        yield Seen("error", f"the tokenizer reads {text[:40]!r} differently")


MODEL_CHECKS = {
    "complete": Check(
        complete,
        "transformers draws missing weights at random and only warns, so a headless or renamed checkpoint trains from "
        "noise (OpenRLHF 1342: a head lost on saving).",
        "Load a folder that save_pretrained of a causal language model wrote.",
    ),
    "finite": Check(
        finite,
        "One NaN spreads to every weight at the first step, and shows as a flat curve or as an error of the sampler "
        "(trl 229; LlamaFactory 551).",
        "Load the checkpoint before the divergence; lower the learning rate or clip gradients.",
    ),
    "precision": Check(
        precision,
        "bfloat16 has 8 bits of mantissa: Adam's steps of 1e-5 round to nothing, and the policy does not move (apex "
        "1728; keras-hub 2629).",
        "Load in float32; the environment's dtype='bfloat16' computes in bfloat16 over float32 weights.",
    ),
    "dropout": Check(
        dropout,
        "Old and new log-probabilities would come from two networks, so the first ratio is not 1 (DeepSpeed-Chat; trl "
        "454; trlx 508).",
        "Set all rates to 0, or call textenv.lm.disable_dropout(model); elsewhere, model.eval() in every pass.",
    ),
    "batch": Check(
        batch,
        "The ratio of a sample would depend on its neighbours (OpenRLHF 217; reward-bench 137).",
        "Look for layers that mix rows (batch norm, expert capacity), or compute in float32.",
    ),
    "left padding": Check(
        left_padding,
        "Prompts are padded on the left to be decoded together; positions or masks that ignore it change what is said "
        "(OpenRLHF 217; trl 469; transformers 18388).",
        "Pass attention_mask and position_ids wherever the model is used; here, rows are then padded on the right.",
    ),
    "cache": Check(
        cache,
        "Sampling with a broken cache draws from another policy than the one that is trained (verl 2088).",
        "Use attn_implementation='eager' or another family; for one with recurrent layers this is the price.",
    ),
    "first ratio": Check(
        first_ratio,
        "PPO's ratio must be 1 before the first step, else clipping starts at once (trl 744; trlx 107; verl 2305).",
        "Sample and score with one model in one precision, without dropout; never with another engine's numbers.",
    ),
    "sampler": Check(
        sampler,
        "If what is sampled is not what is scored, the KL turns negative and training collapses (trl 235, 1005, 3029; "
        "OpenRLHF 853).",
        "Sample without top-k, top-p, penalties, or a temperature that the scorer does not know.",
    ),
    "generation config": Check(
        generation_config,
        "Here it is not used; model.generate elsewhere reads it, and evaluates another distribution than the one that "
        "was trained (trl 925, 4159).",
        "Evaluate with the training's settings, or reset these in generation_config.json.",
    ),
    "saving": Check(
        saving,
        "What was trained is not what is used later: weights lost or tied anew on saving (OpenRLHF 1342, 1343).",
        "Save with LanguageModel.save_pretrained; check tie_word_embeddings and parts outside the model.",
    ),
}
