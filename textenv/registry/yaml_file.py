"""YAML with the line of each value, so that an error can say where."""

import re
from pathlib import Path
from typing import Any

import yaml

Keys = tuple[str | int, ...]
"""The path to a value: ``("environments", "me/Mine-v0", "kl_coef")``."""


class _Loader(yaml.SafeLoader):
    """The safe loader, but 3e-4 is a number (as in YAML 1.2); PyYAML itself reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class YamlFile:
    """The plain values of a YAML file, and the line of each."""

    value: Any
    """Dicts with string keys, lists and scalars; None for an empty file."""

    def __init__(self, path: Path) -> None:
        """Read ``path``.

        Raises:
            ValueError: no such file, not YAML, a repeated key, or a key that is not text; names the line.
        """
        self.path = path
        self.lines: dict[Keys, int] = {}
        if not path.is_file():
            raise ValueError(f"an experiment must be a YAML file, got {str(path)!r}. Check the path.")
        try:
            self._loader = _Loader(path.read_text("utf-8"))
            node = self._loader.get_single_node()
            self.value = None if node is None else self._plain(node, ())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            rule = f"an experiment must be UTF-8 text, got byte 0x{error.object[error.start]:02x}"
            raise ValueError(f"{path}, line {line}: {rule}. Save it as UTF-8.") from None

    def error(self, keys: Keys, message: str, line: int | None = None) -> ValueError:
        """An error that begins with file, line and the path to the value."""
        known = next(keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in self.lines or n == 0)
        way = " → ".join(map(str, keys))
        return ValueError(f"{self.path}, line {line or self.lines.get(known, 1)}: {way + ': ' if way else ''}{message}")

    def _plain(self, node: yaml.Node, keys: Keys) -> Any:
        self.lines.setdefault(keys, node.start_mark.line + 1)
        if len(keys) > 20:
            raise self.error(keys[:3], "must have 20 levels or fewer, got more. Is there an anchor inside itself?")
        if isinstance(node, yaml.ScalarNode):
            return self._loader.construct_object(node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self.error(keys, f"a value must be plain, got {node.tag!r}. Remove the tag.")
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*keys, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        self._check_keys(node, keys)
        self._loader.flatten_mapping(node)  # merge keys: <<: *defaults
        out = {}
        for key_node, value_node in node.value:
            self.lines[*keys, key_node.value] = key_node.start_mark.line + 1
            out[key_node.value] = self._plain(value_node, (*keys, key_node.value))
        return out

    def _check_keys(self, node: yaml.MappingNode, keys: Keys) -> None:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise self.error(keys, f"a key must be text, got {key!r}. Quote it.", line)
            if key in seen:
                raise self.error(keys, f"a key must appear once, got {key!r} twice. Remove one.", line)
            seen.add(key)
