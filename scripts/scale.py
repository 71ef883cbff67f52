"""The tables of docs/scale.md: memory, time and cost of PPO with large policies, by the formulas that stand there.

Command: ``python -m scripts.scale``.
"""

from typing import NamedTuple

DEVICES, MEMORY, PRICE = 8, 80e9, 3.0
"""GPUs, bytes and dollars per hour of each."""
FLOPS, BANDWIDTH = 0.4 * 989e12, 0.6 * 3.35e12
"""Reached by each device: share of the peak × peak, per second; bytes per second."""
EPISODES, PROMPT, RESPONSE, EPOCHS, PASS = 512, 512, 512, 4, 16_384
"""Of an update; tokens; passes over a batch; tokens per forward pass."""
ADAPTERS = 0.006
"""Parameters of LoRA (rank 16 on every linear layer) as a share of all."""


class Model(NamedTuple):
    name: str
    parameters: float
    layers: int
    width: int
    kv_width: int
    devices: int
    """That hold one copy while sampling."""
    rows: int
    """Sequences that one copy samples at once."""


MODELS = (Model("7 B", 7e9, 32, 4096, 1024, 1, 64), Model("70 B", 70e9, 80, 8192, 1024, 8, 512))


class Method(NamedTuple):
    name: str
    bytes_per_parameter: float
    flops_per_token: float
    """In units of N, for a token that is trained."""


METHODS = (Method("full", 16 + 2 + 2, 8), Method("LoRA", 2 + 2 + 16 * ADAPTERS, 6))


def memory(model: Model, method: Method) -> list[float]:
    """Bytes of all weights and states; of each device if they are sharded; of activations; of the cache of keys."""
    states = method.bytes_per_parameter * model.parameters
    cache = 4 * model.layers * model.kv_width * (PROMPT + RESPONSE) * model.rows / model.devices
    return [states, states / DEVICES, 4 * PASS * model.width * model.layers, cache]


def memory_in_shares(model: Model) -> list[float]:
    """Bytes of each device in full training by FSDP2.

    In an update: shares of weights, gradient and moments, one whole block, reference and reward model, activations. The
    same with ``offload_frozen``. In a rollout: weights whole and in shares, moments in shares, reference and reward
    model, cached keys.
    """
    n, (_, _, activations, cache) = model.parameters, memory(model, METHODS[0])
    update = 16 * n / DEVICES + 4 * n / model.layers + activations
    return [update + 4 * n, update, 4 * n + 12 * n / DEVICES + 4 * n + cache]


def sampled_per_second(model: Model) -> float:
    """Response tokens per second of all devices, each step bound by reading the weights and the cached keys."""
    cached = 4 * model.layers * model.kv_width * (PROMPT + RESPONSE / 2) * model.rows
    step = (2 * model.parameters + cached) / (BANDWIDTH * model.devices)
    return model.rows / step * DEVICES / model.devices


def seconds(model: Model, method: Method) -> list[float]:
    """Of an update: to read prompts and sample; to score by two models; to train."""
    n, speed = model.parameters, DEVICES * FLOPS
    sample = EPISODES * RESPONSE / sampled_per_second(model) + 2 * n * EPISODES * PROMPT / speed
    tokens = EPISODES * (PROMPT + RESPONSE)
    return [sample, 2 * 2 * n * tokens / speed, method.flops_per_token * n * tokens * EPOCHS / speed]


def tables() -> list[str]:
    """The lines of all tables."""
    lines = ["| | weights and states, GB | the same over 8 devices | activations | keys and values | fits unsharded |"]
    lines += ["|---|---|---|---|---|---|"]
    pairs = [(model, method) for model in MODELS for method in METHODS]
    for model, method in pairs:
        found = memory(model, method)
        fits = "yes" if found[0] + found[2] + found[3] < MEMORY else "no"
        lines.append(f"| {model.name}, {method.name} | {' | '.join(f'{x / 1e9:,.1f}' for x in found)} | {fits} |")
    lines += [
        "| full training by FSDP2 | update | update with `offload_frozen` | rollout | fits |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        found = memory_in_shares(model)
        fits = "yes" if max(found[0], found[2]) < MEMORY else "no"
        lines.append(f"| {model.name} | {' | '.join(f'{x / 1e9:,.1f}' for x in found)} | {fits} |")
    lines += ["| | sampled tokens/s | sampling, s | scoring, s | training, s | $ per 1,000 updates |"]
    lines += ["|---|---|---|---|---|---|"]
    for model, method in pairs:
        found = seconds(model, method)
        cost = sum(found) * 1000 / 3600 * DEVICES * PRICE
        shown = [f"{sampled_per_second(model):,.0f}", *(f"{x:,.1f}" for x in found), f"{cost:,.0f}"]
        lines.append(f"| {model.name}, {method.name} | {' | '.join(shown)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(tables()))
