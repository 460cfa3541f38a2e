"""YAML that names a key twice, of which a loader silently takes the last."""

from collections.abc import Iterator
from typing import Any

from distill.errors import UserError


def refuse_twice(text: str, name: str = "") -> None:
    """Refuses YAML in which a section has the same key twice, at any depth, be it as `a: {b: 1}` and as `a.b: 1`.

    Args:
        text: the YAML; what is none is left to whoever loads it.
        name: of its file, for the message.

    Raises:
        UserError: names the key and both lines.
    """
    import yaml

    if ":" not in text:
        return
    try:
        document = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return
    for key, first, second in _twice(document, "", set()):
        where = f" of {name}" if name else ""
        raise UserError(f"{key}: stands twice, on lines {first} and {second}{where}; keep one of them")


def _twice(node: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    """Dotted key of what stands twice, and its two lines."""
    import yaml

    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _twice(item, f"{prefix.removesuffix('.')}[{index}].", seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                yield f"{prefix}{key.value}", lines[name], line
            lines[name] = line
            yield from _twice(value, f"{prefix}{key.value}.", seen)
        yield from _dotted(lines, prefix)


def _dotted(lines: dict[tuple[str, str], int], prefix: str) -> Iterator[tuple[str, int, int]]:
    """Sections of which a dotted key stands beside them: the one that comes later would drop the other or win."""
    for (tag, key), line in lines.items():
        parts = key.split(".")
        for depth in range(1, len(parts)):
            if (section := (tag, ".".join(parts[:depth]))) in lines:
                first, second = sorted((lines[section], line))
                yield f"{prefix}{section[1]}", first, second
