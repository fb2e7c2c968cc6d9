"""Join tokens and the two sealed frames: what proves, what does not, and hostile bytes."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.state import Capacity
from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.join import (
    SECRET_SIZE,
    TOKEN_PREFIX,
    InvalidToken,
    JoinRefused,
    JoinReply,
    JoinRequest,
    Refusal,
    Sealed,
    Seed,
    Token,
    channel_binding,
    format_token,
    open_reply,
    open_request,
    open_sealed,
    parse_token,
    request_is_proved,
    seal_reply,
    seal_request,
    token_key,
)

TOKEN = Token("0102030405ff", b"s" * SECRET_SIZE, channel_binding(b"ca"), 1_800_000_000)
OTHER_KEY = token_key(b"t" * SECRET_SIZE)
BINDING = channel_binding(b"certificate of the server")
OTHER_BINDING = channel_binding(b"certificate of somebody in the middle")
KEY = b"p" * 32
REQUEST = JoinRequest(
    node_id=node_id_of(KEY),
    public_key=KEY,
    name="two",
    api_address=":8080",
    p2p_address=":9000",
    raft_address=":7000",
    capacity=Capacity(1, 2, 3),
    version="1",
    protocol=1,
    token_id=TOKEN.id,
    now=5.0,
)
REPLY = JoinReply("c1", b"ca", b"cert", (Seed(NodeId("Qm1"), "a:1", "a:2"),), (NodeId("Qm1"),))
FRAME = seal_request(REQUEST, TOKEN.key, BINDING)
BODY = decode(FRAME, Sealed).body


def test_a_token_survives_its_text() -> None:
    text = format_token(TOKEN)
    assert text.startswith(TOKEN_PREFIX)
    assert text.isalnum(), "a double click selects it whole"
    assert parse_token(text) == TOKEN


@given(
    st.binary(min_size=6, max_size=6),
    st.binary(min_size=SECRET_SIZE, max_size=SECRET_SIZE),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**48 - 1),
)
def test_every_token_survives_its_text(id_: bytes, secret: bytes, ca: bytes, end: int) -> None:
    token = Token(id_.hex(), secret, ca, end)
    assert parse_token(format_token(token)) == token


@given(st.integers(0, 200), st.sampled_from("123abcXYZ0OIl -\n\0é"))
def test_a_token_with_a_slip_is_refused(position: int, character: str) -> None:
    text = format_token(TOKEN)
    position %= len(text)
    damaged = text[:position] + character + text[position + 1 :]
    if damaged != text:
        with pytest.raises(InvalidToken):
            parse_token(damaged)


@pytest.mark.parametrize(
    "text",
    ["", TOKEN_PREFIX, "odj2abc", format_token(TOKEN)[:-1], format_token(TOKEN) + "1", "é" * 50],
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(InvalidToken, match="copy the whole token"):
        parse_token(text)


@given(st.text(max_size=120))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    for candidate in (text, TOKEN_PREFIX + text):
        with contextlib.suppress(InvalidToken):
            parse_token(candidate)


def test_the_secret_never_crosses_the_wire() -> None:
    for frame in (FRAME, seal_reply(REPLY, BODY, TOKEN.key, BINDING)):
        assert TOKEN.secret not in frame
        assert TOKEN.key not in frame
    assert token_key(TOKEN.secret) != TOKEN.secret


def test_the_macs_never_change() -> None:
    """Nodes of other versions compute them too; purpose, binding and body are all in them."""
    macs = [
        decode(frame, Sealed).mac.hex()
        for frame in (
            FRAME,
            seal_reply(REPLY, BODY, TOKEN.key, BINDING),
            seal_reply(Refusal("A", "b"), BODY, TOKEN.key, BINDING),
        )
    ]
    assert macs == [
        "6e8bbec0f6f5c7ffbb746c96abe66abc49841b2f33e0a33a2f9944a0a316f13d",
        "9a6af83e76eefb2e99544bb13c12410ef0534a152f255a025acbb1d0ddc64efe",
        "fe45854f32404cbd9c983a5dc92348198d1df24b7e2a4121d9cf567bc17fae84",
    ]


def test_a_request_is_proved_by_the_key_and_the_channel() -> None:
    token_id, sealed = open_sealed(FRAME)
    assert token_id == TOKEN.id
    assert open_request(sealed) == REQUEST
    assert request_is_proved(sealed, TOKEN.key, BINDING)
    assert not request_is_proved(sealed, OTHER_KEY, BINDING)
    assert not request_is_proved(sealed, TOKEN.key, OTHER_BINDING), "a replay elsewhere"
    assert not request_is_proved(msgspec.structs.replace(sealed, mac=b""), TOKEN.key, BINDING)


def test_only_the_name_of_the_token_is_read_before_the_proof() -> None:
    """What else a stranger says may be anything; it is not looked at."""
    body = encode({"node_id": 7, "capacity": "x", "junk": [[[]]], "token_id": "t"})
    token_id, sealed = open_sealed(encode(Sealed(body, b"m")))
    assert (token_id, sealed.body, sealed.mac) == ("t", body, b"m")
    with pytest.raises(MalformedMessage):
        open_request(sealed)


@pytest.mark.parametrize("field", ["name", "p2p_address", "token_id", "now", "public_key"])
def test_no_field_of_a_request_can_be_changed(field: str) -> None:
    values = {"now": 6.0, "public_key": b"q" * 32}
    changed = msgspec.structs.replace(REQUEST, **{field: values.get(field, "other")})
    forged = msgspec.structs.replace(decode(FRAME, Sealed), body=encode(changed))
    assert not request_is_proved(forged, TOKEN.key, BINDING)


def test_a_reply_is_read() -> None:
    assert open_reply(seal_reply(REPLY, BODY, TOKEN.key, BINDING), BODY, TOKEN, BINDING) == REPLY


def test_a_refusal_of_who_knows_the_secret() -> None:
    frame = seal_reply(Refusal("NAME_TAKEN", "why"), BODY, TOKEN.key, BINDING)
    with pytest.raises(JoinRefused, match=r"^why$") as caught:
        open_reply(frame, BODY, TOKEN, BINDING)
    assert caught.value.code == "NAME_TAKEN"


@pytest.mark.parametrize(
    "frame",
    [
        seal_reply(REPLY, BODY, OTHER_KEY, BINDING),  # another secret
        seal_reply(REPLY, BODY, b"", BINDING),  # none
        seal_reply(REPLY, BODY, TOKEN.key, OTHER_BINDING),  # another connection
        seal_reply(REPLY, BODY + b"x", TOKEN.key, BINDING),  # the answer to another request
        FRAME,  # our own request, reflected
        encode(Sealed(encode(REPLY), b"")),
        encode(Sealed(encode(REPLY), b"m" * 32)),
        # A signed refusal that somebody passes off as a reply, and the other way round.
        encode(
            Sealed(
                encode(REPLY),
                decode(seal_reply(Refusal("A", "b"), BODY, TOKEN.key, BINDING), Sealed).mac,
            )
        ),
    ],
)
def test_an_answer_that_is_not_proved_lets_nobody_in(frame: bytes) -> None:
    with pytest.raises(JoinRefused):
        open_reply(frame, BODY, TOKEN, BINDING)


def test_an_unsigned_refusal_is_shown_as_such() -> None:
    frame = seal_reply(Refusal("BAD_TOKEN", "unknown token"), BODY, b"", BINDING)
    with pytest.raises(JoinRefused, match=r"unknown token.*not signed") as caught:
        open_reply(frame, BODY, TOKEN, BINDING)
    assert caught.value.code == "NOT_PROVED"


def test_a_signed_refusal_never_counts_as_a_reply() -> None:
    """Purposes are part of the MAC: the bytes of one cannot be used as the other."""
    body = encode(REPLY)
    as_refusal = Refusal("A", "b")
    sealed = decode(seal_reply(as_refusal, BODY, TOKEN.key, BINDING), Sealed)
    reply = decode(seal_reply(REPLY, BODY, TOKEN.key, BINDING), Sealed)
    assert sealed.mac != reply.mac
    with pytest.raises(JoinRefused):
        open_reply(encode(Sealed(body, sealed.mac)), BODY, TOKEN, BINDING)


@given(st.binary(max_size=200))
def test_random_bytes_as_a_request(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        _, sealed = open_sealed(data)
        assert not request_is_proved(sealed, TOKEN.key, BINDING)


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_as_an_answer(data: bytes, sealed: bool) -> None:
    with pytest.raises(JoinRefused):
        open_reply(encode(Sealed(data, b"")) if sealed else data, BODY, TOKEN, BINDING)


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=3)


def damage(frame: bytes, changes: list[tuple[int, int]]) -> bytes:
    data = bytearray(frame)
    for position, mask in changes:
        data[position % len(data)] ^= mask
    return bytes(data)


@given(CHANGES)
def test_a_damaged_request_is_malformed_or_not_proved(changes: list[tuple[int, int]]) -> None:
    frame = damage(FRAME, changes)
    try:
        _, sealed = open_sealed(frame)
    except MalformedMessage:
        return
    if sealed != decode(FRAME, Sealed):
        assert not request_is_proved(sealed, TOKEN.key, BINDING)


@given(CHANGES)
def test_a_damaged_reply_lets_nobody_in(changes: list[tuple[int, int]]) -> None:
    whole = seal_reply(REPLY, BODY, TOKEN.key, BINDING)
    frame = damage(whole, changes)
    try:
        reply = open_reply(frame, BODY, TOKEN, BINDING)
    except JoinRefused:
        return
    assert reply == REPLY
    assert decode(frame, Sealed) == decode(whole, Sealed)
