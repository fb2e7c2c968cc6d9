"""Node ids against published vectors of base58btc and of the sha2-256 multihash (CIDv0)."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.ids import (
    BASE58_ALPHABET,
    NodeId,
    base58_decode,
    base58_encode,
    is_node_id,
    node_id_of,
    short,
)

# From the multibase and base58 drafts, and the README of the multihash format.
VECTORS = [
    ("", ""),
    ("00", "1"),
    ("0000287fb4cd", "11233QC4"),
    (b"Hello World!".hex(), "2NEpo7TZRRrLZSi2U"),
    (
        b"The quick brown fox jumps over the lazy dog.".hex(),
        "USm3fpXnKG5EUBx2ndxBDMPVciP5hGey2Jh4NDv6gmeo1LkMeiKrLJUUBk6Z",
    ),
    (
        "12209cbc07c3f991725836a3aa2a581ca2029198aa420b9d99bc0e131d9f3e2cbe47",
        "QmYtUc4iTCbbfVSDNKvtQqrfyezPPnFvE33wFmutw9PBBk",
    ),
    (  # the multihash of nothing
        "1220" + hashlib.sha256(b"").hexdigest(),
        "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n",
    ),
]


@pytest.mark.parametrize(("data", "text"), VECTORS)
def test_base58_agrees_with_published_vectors(data: str, text: str) -> None:
    assert base58_encode(bytes.fromhex(data)) == text
    assert base58_decode(text) == bytes.fromhex(data)


@given(st.binary(max_size=80))
def test_base58_keeps_every_byte_and_every_leading_zero(data: bytes) -> None:
    text = base58_encode(data)
    assert set(text) <= set(BASE58_ALPHABET)
    assert base58_decode(text) == data


@pytest.mark.parametrize("text", ["0", "O", "I", "l", "Qm+", "Qm ", "é", "\0", "1\n"])
def test_base58_refuses_what_is_not_of_the_alphabet(text: str) -> None:
    with pytest.raises(ValueError, match="not a base58 character"):
        base58_decode(text)


def test_a_node_id_is_the_cidv0_multihash_of_the_key() -> None:
    key = bytes(range(32))
    node_id = node_id_of(key)
    assert base58_decode(node_id) == b"\x12\x20" + hashlib.sha256(key).digest()
    assert is_node_id(node_id)
    assert node_id_of(b"x" * 32) != node_id


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_size_has_no_id(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        node_id_of(bytes(size))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("QmYtUc4iTCbbfVSDNKvtQqrfyezPPnFvE33wFmutw9PBBk", True),
        ("QmYtUc4iTCbbfVSDNKvtQqrfyezPPnFvE33wFmutw9PBB", False),
        ("QmYtUc4iTCbbfVSDNKvtQqrfyezPPnFvE33wFmutw9PBBkk", False),
        ("XmYtUc4iTCbbfVSDNKvtQqrfyezPPnFvE33wFmutw9PBBk", False),
        ("QmYtUc4iTCbbfVSDNKvtQqrfyezPPnFvE33wFmutw9PBB0", False),
        ("QmYtUc4iTCbbfVSDNKvtQqrfyezPPnFvE33wFmutw9PB\0k", False),
        ("", False),
    ],
)
def test_the_form_of_an_id(text: str, expected: bool) -> None:
    assert is_node_id(text) is expected


def test_short_is_the_beginning() -> None:
    assert short(NodeId("QmYtUc4iTCbbfVSDNKvtQq")) == "QmYtUc4iTCbb"
