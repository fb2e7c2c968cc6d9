"""The functions of templates: Go's own, and Ollama's `json`.

`and` and `or` are not here: they do not look at what they need not, so execution has them.
"""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from ollamad.core.gotemplate.errors import TemplateError
from ollamad.core.gotemplate.values import Record, is_true, kind

Callee = Callable[..., Any]

MAX_WIDTH = 1000  # of a padded field of printf
_VERB = re.compile(r"%(?P<flags>[-+# 0]*)(?P<width>\d*)(?P<precision>\.\d*)?(?P<verb>.)", re.DOTALL)
_HTML_IN_JSON = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def printed(value: Any) -> str:
    """A value as an action prints it."""
    match value:
        case str():
            return value
        case None:
            return "<no value>"
        case bool():
            return "true" if value else "false"
        case float():
            return _float(value)
        case list():
            return "[" + " ".join(_inside(item) for item in value) + "]"
        case dict():
            pairs = (f"{_inside(key)}:{_inside(value[key])}" for key in sorted(value))
            return f"map[{' '.join(pairs)}]"
        case Record(fields, None):
            return "{" + " ".join(_inside(item) for item in fields.values()) + "}"
        case Record(_, str() as shown):
            return shown
        case Record():
            return go_json(value)
    return str(value)


def go_json(value: Any) -> str:
    """JSON as Go's encoder writes it, without spaces and with <, > and & escaped."""
    try:
        text = json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TemplateError(f"json: {error}") from None
    return text.translate(_HTML_IN_JSON)


def _plain(value: Any) -> Any:
    match value:
        case Record(fields, shown):
            return _plain(dict(fields) if shown is None else shown)
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
    return value


def _inside(value: Any) -> str:
    return "<nil>" if value is None else printed(value)


def _float(value: float) -> str:
    """As Go's %v: the shortest digits, an exponent from 21 digits on."""
    text = repr(value)
    if "e" in text:
        digits, _, exponent = text.partition("e")
        if 0 < int(exponent) < 21:
            return format(Decimal(text), "f")
        return f"{digits.removesuffix('.0')}e{int(exponent):+03d}"
    return text.removesuffix(".0")


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))  # Go counts bytes
    if isinstance(value, list | dict):
        return len(value)
    raise TemplateError(f"len of a {kind(value)}")


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list | str):
            items = value.encode() if isinstance(value, str) else value
            if isinstance(key, bool) or not isinstance(key, int):
                raise TemplateError(f"a {kind(key)} is no index")
            if not 0 <= key < len(items):
                raise TemplateError(f"index {key} is out of range: there are {len(items)}")
            value = items[key]
        else:
            raise TemplateError(f"a {kind(value)} has no index")
    return value


def _slice(value: Any, *bounds: Any) -> Any:
    if len(bounds) > 2:
        raise TemplateError("slice takes two bounds here")
    if not isinstance(value, list | str):
        raise TemplateError(f"a {kind(value)} cannot be sliced")
    items: Any = value.encode() if isinstance(value, str) else value
    for bound in bounds:
        if isinstance(bound, bool) or not isinstance(bound, int) or not 0 <= bound <= len(items):
            raise TemplateError(f"slice: {bound} is out of range: there are {len(items)}")
    low, high = (*bounds, 0)[0], bounds[1] if len(bounds) > 1 else len(items)
    if low > high:
        raise TemplateError(f"slice: {low} is behind {high}")
    part = items[low:high]
    return part.decode(errors="replace") if isinstance(part, bytes) else part


def _equal(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    if isinstance(first, list | dict) or isinstance(second, list | dict):
        raise TemplateError("eq: lists and maps cannot be compared")
    first, second = _basic(first), _basic(second)
    if type(first) is not type(second):
        raise TemplateError(f"eq: a {kind(first)} and a {kind(second)} cannot be compared")
    return bool(first == second)


def _basic(value: Any) -> Any:
    """A struct that stands for a text is compared as such."""
    return value.shown if isinstance(value, Record) and isinstance(value.shown, str) else value


def _eq(first: Any, *others: Any) -> bool:
    if not others:
        raise TemplateError("eq: there is nothing to compare with")
    return any(_equal(first, other) for other in others)


def _less(first: Any, second: Any) -> bool:
    first, second = _basic(first), _basic(second)
    if type(first) is not type(second) or not isinstance(first, str | int | float):
        raise TemplateError(f"a {kind(first)} and a {kind(second)} have no order")
    return bool(first < second)


def _print(*values: Any) -> str:
    """Spaces stand between values of which neither is a string."""
    text = ""
    for place, value in enumerate(values):
        if place and not isinstance(value, str) and not isinstance(values[place - 1], str):
            text += " "
        text += _inside(value)
    return text


def _println(*values: Any) -> str:
    return " ".join(map(_inside, values)) + "\n"


def _printf(pattern: Any, *values: Any) -> str:
    if not isinstance(pattern, str):
        raise TemplateError("printf: its first argument must be a string")
    rest = list(values)

    def fill(match: re.Match[str]) -> str:
        verb = match["verb"]
        if verb == "%":
            return "%"
        if not rest:
            return f"%!{verb}(MISSING)"
        value = rest.pop(0)
        width = int(match["width"] or 0)
        if width > MAX_WIDTH:
            raise TemplateError(f"printf: a width of {width}")
        text = _formatted(value, verb, match["flags"], match["precision"])
        if "-" in match["flags"]:
            return text.ljust(width)
        fills_with_zeros = "0" in match["flags"] and verb != "s"
        return text.zfill(width) if fills_with_zeros else text.rjust(width)

    text = _VERB.sub(fill, pattern)
    if rest:
        text += "%!(EXTRA " + ", ".join(f"{kind(v)}={_inside(v)}" for v in rest) + ")"
    return text


def _formatted(value: Any, verb: str, flags: str, precision: str | None) -> str:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    match verb:
        case "v":
            return _inside(value)
        case "s" if isinstance(value, str | Record | list | dict):
            text = _inside(value)
            return text if precision is None else text[: int(precision[1:] or 0)]
        case "q" if isinstance(value, str | Record):
            return json.dumps(_inside(value), ensure_ascii=False)
        case "d" if is_int:
            return f"{value:+d}" if "+" in flags else str(value)
        case "t" if isinstance(value, bool):
            return printed(value)
        case "x" if is_int:
            return f"{value:x}"
        case "f" if isinstance(value, float):
            digits = 6 if precision is None else int(precision[1:] or 0)
            return f"{value:.{min(digits, MAX_WIDTH)}f}"
    return f"%!{verb}({kind(value)}={_inside(value)})"


BUILTINS: dict[str, Callee] = {
    "eq": _eq,
    "ne": lambda first, second: not _equal(first, second),
    "lt": _less,
    "le": lambda first, second: not _less(second, first),
    "gt": lambda first, second: _less(second, first),
    "ge": lambda first, second: not _less(first, second),
    "not": lambda value: not is_true(value),
    "len": _length,
    "index": _index,
    "slice": _slice,
    "print": _print,
    "println": _println,
    "printf": _printf,
    "json": go_json,
}
