"""Weighted grammars of nested choices, which can be sampled and enumerated exactly."""

from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """One of several texts."""

    options: tuple["Node", ...]
    weights: tuple[float, ...]
    """Sum to 1."""


class Sequence(NamedTuple):
    """Texts one after the other, joined by spaces."""

    parts: tuple["Node", ...]


Node = str | Choice | Sequence
"""A text (words joined by single spaces; "" is nothing), a choice, or a sequence."""


def one_of(*options: Node) -> Node:
    """Any of the options, equally likely."""
    return options[0] if len(options) == 1 else Choice(options, (1 / len(options),) * len(options))


def weighted(*options: tuple[float, Node]) -> Node:
    """Options with weights, which need not sum to 1."""
    total = sum(weight for weight, _ in options)
    return Choice(tuple(node for _, node in options), tuple(weight / total for weight, _ in options))


def sequence(*parts: Node) -> Node:
    """The parts one after the other."""
    return Sequence(parts)


def maybe(probability: float, node: Node) -> Node:
    """``node`` or nothing."""
    return weighted((probability, node), (1 - probability, ""))


def fill(template: str, **slots: Node) -> Node:
    """A template with nodes in place of its words ``{name}``."""
    parts: list[Node] = []
    for word in template.split():
        part = slots[word[1:-1]] if word.startswith("{") else word
        if parts and isinstance(part, str) and isinstance(parts[-1], str):
            parts[-1] = f"{parts[-1]} {part}"
        else:
            parts.append(part)
    return parts[0] if len(parts) == 1 else Sequence(tuple(parts))


def draw(node: Node, rng: np.random.Generator) -> str:
    """One text."""
    if isinstance(node, str):
        return node
    if isinstance(node, Sequence):
        return " ".join(text for part in node.parts if (text := draw(part, rng)))
    left = rng.random()
    for option, weight in zip(node.options, node.weights, strict=True):
        left -= weight
        if left < 0:
            return draw(option, rng)
    return draw(node.options[-1], rng)


def expand(node: Node) -> dict[str, float]:
    """Every text with its total probability."""
    if isinstance(node, str):
        return {node: 1.0}
    merged: dict[str, float] = {}
    if isinstance(node, Choice):
        for option, weight in zip(node.options, node.weights, strict=True):
            for text, p in expand(option).items():
                merged[text] = merged.get(text, 0.0) + weight * p
        return merged
    first, *rest = node.parts
    tails = expand(Sequence(tuple(rest))) if rest else {"": 1.0}
    for head, p in expand(first).items():
        for tail, q in tails.items():
            text = f"{head} {tail}" if head and tail else head or tail
            merged[text] = merged.get(text, 0.0) + p * q
    return merged
