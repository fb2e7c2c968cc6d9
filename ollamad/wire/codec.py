"""The one way that this project turns values into bytes and back: msgpack with schemas.

Decoding checks the schema, so that nothing malformed gets further than here. Nothing that
came from outside is ever unpickled.
"""

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

MAX_REASON = 200  # characters; msgspec repeats bad values whole, and they end in a log

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


class MalformedMessage(ValueError):
    """Bytes from a peer or a file that are not what the schema says."""


def encode(value: object) -> bytes:
    """The msgpack form of a struct or builtin value."""
    return _encoder.encode(value)


def decode(data: bytes | bytearray | memoryview, type_: type[T]) -> T:
    """Read msgpack of that type.

    Raises:
      MalformedMessage: not msgpack, or not of that schema.
    """
    decoder = _decoders.get(type_)
    if decoder is None:
        decoder = _decoders[type_] = msgspec.msgpack.Decoder(type_)
    try:
        value: T = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # msgspec lets the error of text that is not UTF-8 through as it is.
        reason = str(error)[:MAX_REASON]
        raise MalformedMessage(f"not a valid {_name(type_)}: {reason}") from None
    return value


def _name(type_: object) -> str:
    return getattr(type_, "__name__", str(type_))
