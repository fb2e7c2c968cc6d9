"""What a model says of itself, and how a model that is made from another one differs from it."""

from typing import Any

import msgspec

from ollamad.core.inference import Message


class Description(msgspec.Struct, frozen=True):
    """The small blobs of a model and its file's header; empty where it says nothing."""

    template: str  # in force: that of a layer, else the file's own
    system: str
    parameters: dict[str, Any]  # as its layer has them, unknown ones included
    messages: tuple[Message, ...]
    licenses: tuple[str, ...]
    # Of the GGUF header; arrays too long to be kept, such as the vocabulary, are empty.
    metadata: dict[str, Any]
    parameter_count: int
    engine: str = ""  # that runs it where it was read; empty: none there does
    engine_reason: str = ""  # in words
    config: dict[str, str] = {}  # renderer, parser, requires


class Changes(msgspec.Struct, frozen=True):
    """Parts of a new model. An empty one stays as it is in the model that it is made from."""

    template: str = ""  # replaces
    system: str = ""  # replaces
    parameters: dict[str, Any] = {}  # are added, or replace those of the same name
    messages: tuple[Message, ...] = ()  # replace
    licenses: tuple[str, ...] = ()  # are added
    adapters: tuple[str, ...] = ()  # digests of LoRA adapters; replace
    config: dict[str, str] = {}  # renderer, parser, requires: kept for those who know them


NO_CHANGES = Changes()
