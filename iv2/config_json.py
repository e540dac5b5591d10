"""Configurations, which are dataclasses, as JSON values and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts of JSON values."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return content


def from_dict(kind: type[T], content: dict[str, Any], where: str = "") -> T:
    """The inverse of ``to_dict``; absent fields take their defaults.

    Raises:
        ValueError: A field does not exist, or its value is of another kind.
    """
    hints = typing.get_type_hints(kind)
    for name in content:
        if name not in hints:
            raise ValueError(
                f"{kind.__name__}: field must be one of {', '.join(hints)}, got {where}{name}"
            )
    return kind(
        **{name: _value(hints[name], value, f"{where}{name}") for name, value in content.items()}
    )


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_dict(hint, value, f"{where}.")
    if origin is tuple and isinstance(value, list | tuple):
        items = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(items) == len(value):
            pairs = zip(items, value, strict=True)
            return tuple(_value(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(pairs))
    if origin is Literal and value in arguments:
        return value
    if origin in (typing.Union, types.UnionType) and type(None) in arguments:
        (inner,) = (kind for kind in arguments if kind is not type(None))
        return None if value is None else _value(inner, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"config: {where} must be {_words(hint)}, got {value!r}")


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names; dicts in lists are numbered."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            found |= flat({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
