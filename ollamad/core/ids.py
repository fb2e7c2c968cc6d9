"""Node ids: the multihash of a node's public key in base58, so that an id proves itself.

The format is the CIDv0 of IPFS (`Qm…`): base58btc of 0x12 0x20 and a sha2-256 digest.
"""

import hashlib
from typing import NewType

NodeId = NewType("NodeId", str)

BASE58_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUES = {character: value for value, character in enumerate(BASE58_ALPHABET)}
_MULTIHASH_SHA2_256 = b"\x12\x20"

SHORT_ID_LENGTH = 12  # characters shown to people; unique in any cluster that one has seen
MIN_PREFIX_LENGTH = 6  # shorter prefixes of an id would match by accident


def base58_encode(data: bytes) -> str:
    """Encode bytes as base58btc; leading zero bytes become leading `1`s."""
    number = int.from_bytes(data, "big")
    digits = []
    while number:
        number, remainder = divmod(number, 58)
        digits.append(BASE58_ALPHABET[remainder])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def base58_decode(text: str) -> bytes:
    """Decode base58btc.

    Raises:
      ValueError: a character is not of the alphabet.
    """
    number = 0
    for character in text:
        value = _BASE58_VALUES.get(character)
        if value is None:
            raise ValueError(f"{character!r} is not a base58 character")
        number = number * 58 + value
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")


def node_id_of(public_key: bytes) -> NodeId:
    """The id of the node that owns this raw ed25519 public key (32 bytes)."""
    if len(public_key) != 32:
        raise ValueError(f"an ed25519 public key has 32 bytes, not {len(public_key)}")
    return NodeId(base58_encode(_MULTIHASH_SHA2_256 + hashlib.sha256(public_key).digest()))


def is_node_id(text: str) -> bool:
    """Whether the text has the form of a node id (46 base58 characters that start with Qm)."""
    if len(text) != 46 or not text.startswith("Qm"):
        return False
    return all(character in _BASE58_VALUES for character in text)


def short(node_id: NodeId) -> str:
    """The beginning of an id, for people and logs."""
    return node_id[:SHORT_ID_LENGTH]
