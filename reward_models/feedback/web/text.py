"""Texts of models and people, made safe and plain to show."""

from markdown_it import MarkdownIt
from markupsafe import Markup

_HIDDEN = {*range(0x20), 0x7F, *range(0x80, 0xA0)} - {ord("\n"), ord("\t")}
_HIDDEN |= {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_HIDDEN |= {0x00AD, 0x200B, *range(0x2060, 0x2065), 0xFEFF, *range(0xE0000, 0xE0080)}
"""Control characters, those that turn the direction of the text around them, and those that nobody sees."""
_MARKS = {code: f"⟦U+{code:04X}⟧" for code in _HIDDEN} | {ord("\r"): ""}


def visible(text: str) -> str:
    """A text with characters that could hide or reorder it written out, like ``⟦U+202E⟧``."""
    return text.translate(_MARKS)


def markdown(text: str) -> Markup:
    """Markdown as HTML: HTML in it is shown as text, links may only be http, https or mailto, images are left out."""
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    renderer.validateLink = lambda url: url.lower().startswith(("http://", "https://", "mailto:"))
    return Markup(renderer.render(visible(text)))  # what renders it escapes every text
