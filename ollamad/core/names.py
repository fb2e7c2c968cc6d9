"""Model names by Ollama's rules: `[host/][namespace/]model[:tag]`."""

import difflib
import re
from collections.abc import Iterable

import msgspec

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

MAX_PART_LENGTH = 80  # characters, as Ollama has it
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(:[0-9]{1,5})?")


_NODE_NAME = re.compile(r"(?!Qm)[A-Za-z0-9][A-Za-z0-9._\-]{0,62}")
_USERNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+\-]{0,63}")
RESERVED_USERNAMES = ("local",)  # what callers without a user of their own are shown as


# How a text begins that says where a model comes from and is no model's name.
REFERENCE_SCHEMES = ("pypi:", "https://", "http://", "file:", "/")


class InvalidName(ValueError):
    """The text is not a model name; the message says which part is wrong."""


class ModelName(msgspec.Struct, frozen=True, order=True):
    """A complete model name; compared without case by `key`."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        """The shortest form that still shows a tag: `llama2:7b`, `me/x:latest`."""
        text = f"{self.model}:{self.tag}"
        if self.host != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{text}"
        if self.namespace != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{text}"
        return text

    @property
    def full(self) -> str:
        """All parts, the defaults too: `registry.ollama.ai/library/llama2:7b`."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def key(self) -> str:
        """What two spellings of the same name have in common."""
        return str(self).lower()


def parse_name(text: str) -> ModelName:
    """Read a model name and fill in the defaults.

    Raises:
      InvalidName: the text is empty, too long, or has a character that no name may have.
        Path tricks (`..`, a leading dot) are refused here because names become paths.
    """
    rest = text.strip()
    if not rest:
        raise InvalidName("the model name is empty")
    *front, last = rest.split("/")
    model, colon, tag = last.partition(":")
    if colon and not tag:
        raise InvalidName(f"the model name {text!r} ends in a colon without a tag")
    match front:
        case []:
            host, namespace = DEFAULT_HOST, DEFAULT_NAMESPACE
        case [namespace]:
            host = DEFAULT_HOST
        case [host, namespace]:
            pass
        case _:
            raise InvalidName(f"the model name {text!r} has more than host/namespace/name")
    name = ModelName(host, namespace, model, tag or DEFAULT_TAG)
    if not _HOST.fullmatch(name.host) or len(name.host) > 4 * MAX_PART_LENGTH:
        raise InvalidName(f"{name.host!r} in the model name {text!r} is not a host")
    parts = (("namespace", name.namespace), ("name", name.model), ("tag", name.tag))
    for label, part in parts:
        if not part or len(part) > MAX_PART_LENGTH or not _PART.fullmatch(part) or ".." in part:
            raise InvalidName(
                f"the {label} {part[:MAX_PART_LENGTH]!r} is not valid: use up to "
                f"{MAX_PART_LENGTH} letters, digits, '_', '-' and '.', not starting with a dot"
            )
    return name


def is_reference(text: str) -> bool:
    """Whether a text says where a model comes from without being a model's name."""
    return text.startswith(REFERENCE_SCHEMES)


def check_node_name(name: str) -> None:
    """Whether a node may be called that: as a host, and not like the beginning of an id.

    Raises:
      ValueError: it may not.
    """
    if not _NODE_NAME.fullmatch(name):
        raise ValueError(
            "a node's name has 1 to 63 letters, digits, '.', '_' and '-', begins with a letter "
            "or digit, and not with Qm as ids do"
        )


def check_username(name: str) -> None:
    """Whether a user may be called that.

    Raises:
      ValueError: it may not.
    """
    if not _USERNAME.fullmatch(name):
        raise ValueError(
            "a username has 1 to 64 letters, digits, '.', '_', '@', '+' and '-', and begins with "
            "a letter or digit"
        )
    if name in RESERVED_USERNAMES:
        raise ValueError(f"the username {name!r} is reserved")


def node_name_of(host: str) -> str:
    """The nearest allowed name for a host's name."""
    name = re.sub(r"[^A-Za-z0-9._\-]", "-", host)[:63].lstrip("._-")
    return name if _NODE_NAME.fullmatch(name) else f"node-{name}"[:63]


def nearest(text: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names that a person who typed `text` most likely meant, best first."""
    names = list(known)
    wanted = text.lower()
    by_key = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wanted, by_key, n=limit, cutoff=0.5)
    same_base = [key for key in by_key if key.split(":")[0] == wanted.split(":")[0]]
    ordered = dict.fromkeys([*same_base, *close])
    return [by_key[key] for key in ordered][:limit]
