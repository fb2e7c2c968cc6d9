"""The values that templates work with, and Go's rules for them.

Strings, bools, ints, floats, None (nil), lists, dicts (maps), and records for Go's structs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ollamad.core.gotemplate.errors import TemplateError


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A struct: a field that it does not have is an error, not nothing.

    `shown` is what it is in JSON, and how it prints; None prints its fields as Go does.
    """

    fields: Mapping[str, Any]
    shown: Any = None


def is_true(value: Any) -> bool:
    """Whether `if` takes it for true: not zero and not empty; a struct always is."""
    if isinstance(value, Record):
        return True
    return bool(value)


def field(value: Any, name: str) -> Any:
    """A field of a struct, or an entry of a map (nil if there is none).

    Raises:
      TemplateError: it has no such field.
    """
    if value is None:
        return None
    if isinstance(value, Record):
        try:
            return value.fields[name]
        except KeyError:
            raise TemplateError(f"there is no field {name} here") from None
    if isinstance(value, dict):
        return value.get(name)
    raise TemplateError(f"there is no field {name} in a {kind(value)}")


def kind(value: Any) -> str:
    """The name of its type, for messages."""
    match value:
        case None:
            return "nil"
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float"
        case str():
            return "string"
        case list():
            return "list"
        case dict():
            return "map"
        case Record():
            return "struct"
    return type(value).__name__
