"""How a node that is not yet a member is let in: the join token and the two-frame exchange.

Whoever dialled, the exchange is the same two frames inside TLS, joiner first:

    joiner                                       sponsor (any member)
      |  JoinRequest: id, key, addresses, MAC  ->  |  checks MAC, token, time, key = id
      |  <- JoinReply: CA, certificate, peers, MAC |  (or a refusal with its reason)

The token holds the sha256 of the cluster's CA certificate, a token id, a secret and an expiry.
The secret itself never crosses the wire: each side proves it with an HMAC over the message and
the TLS server's certificate (the channel binding), so that somebody in the middle, who has
another certificate, can neither use a captured request nor answer it.
"""

import hashlib
import hmac
from dataclasses import dataclass

import msgspec

from ollamad.core.ids import NodeId, base58_decode, base58_encode
from ollamad.core.state import Capacity
from ollamad.wire.codec import MalformedMessage, decode, encode

TOKEN_PREFIX = "odj1"  # "ollama distributed join", format 1
SECRET_SIZE = 16  # bytes; 128 bits cannot be guessed
TOKEN_ID_SIZE = 6  # bytes
MAX_JOIN_FRAME = 32 * 1024  # bytes; the only thing that is read of a stranger
MAX_CLOCK_SKEW_S = 300.0  # certificates start an hour early; minutes already confuse people
MAX_SEEDS = 32  # members named in a reply; enough to find the rest


class InvalidToken(ValueError):
    """The text is not a join token."""


class JoinRefused(Exception):
    """The other side said no; the message is its reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Token:
    """What a join token says. `expires_at` is in Unix seconds."""

    id: str
    secret: bytes
    ca_hash: bytes
    expires_at: int

    @property
    def key(self) -> bytes:
        """What the cluster keeps of the secret, and what both MACs are made with."""
        return token_key(self.secret)


def token_key(secret: bytes) -> bytes:
    return hashlib.sha256(b"ollamad join key\0" + secret).digest()


def format_token(token: Token) -> str:
    body = (
        bytes.fromhex(token.id) + token.expires_at.to_bytes(6, "big") + token.secret + token.ca_hash
    )
    check = hashlib.sha256(body).digest()[:4]
    return TOKEN_PREFIX + base58_encode(check + body)


def parse_token(text: str) -> Token:
    """Read a join token.

    Raises:
      InvalidToken: it was not copied whole, or is no token of this program.
    """
    hint = "copy the whole token that `ollama-dist cluster token` printed"
    if not text.startswith(TOKEN_PREFIX):
        raise InvalidToken(f"a join token starts with {TOKEN_PREFIX!r}: {hint}")
    try:
        raw = base58_decode(text[len(TOKEN_PREFIX) :])
    except ValueError as error:
        raise InvalidToken(f"the join token is damaged ({error}): {hint}") from None
    size = 4 + TOKEN_ID_SIZE + 6 + SECRET_SIZE + 32
    raw = raw.rjust(size, b"\0")
    check, body = raw[:4], raw[4:]
    if len(raw) != size or hashlib.sha256(body).digest()[:4] != check:
        raise InvalidToken(f"the join token is damaged: {hint}")
    id_, rest = body[:TOKEN_ID_SIZE], body[TOKEN_ID_SIZE:]
    return Token(
        id=id_.hex(),
        expires_at=int.from_bytes(rest[:6], "big"),
        secret=rest[6 : 6 + SECRET_SIZE],
        ca_hash=rest[6 + SECRET_SIZE :],
    )


class Seed(msgspec.Struct, frozen=True):
    """A member that the new node can talk to at once."""

    id: NodeId
    p2p_address: str
    raft_address: str


class JoinRequest(msgspec.Struct, frozen=True):
    node_id: NodeId
    public_key: bytes  # raw ed25519
    name: str
    api_address: str  # host may be empty: then the sponsor takes the address it sees
    p2p_address: str
    raft_address: str
    capacity: Capacity
    version: str
    protocol: int  # the newest that it speaks
    token_id: str
    now: float  # the joiner's clock, Unix seconds
    oldest_protocol: int = 1  # the oldest that it speaks
    proof: bytes = b""  # signature of `proof_text` by the private key


class JoinReply(msgspec.Struct, frozen=True):
    cluster_id: str
    ca_certificate_pem: bytes
    certificate_pem: bytes  # the joiner's
    seeds: tuple[Seed, ...]
    voters: tuple[NodeId, ...]


class Refusal(msgspec.Struct, frozen=True):
    """Sent with a MAC when the token is known, without one when it is not."""

    code: str
    message: str


class Sealed(msgspec.Struct, frozen=True):
    """One frame of the exchange: the message's bytes and their MAC."""

    body: bytes
    mac: bytes


class _Claim(msgspec.Struct, frozen=True):
    """What must be read of a request before it is proved: by which token it wants to be."""

    token_id: str


def channel_binding(server_certificate_der: bytes) -> bytes:
    """What ties the exchange to this TLS connection: the hash of the TLS server's certificate."""
    return hashlib.sha256(server_certificate_der).digest()


def proof_text(token_id: str, binding: bytes) -> bytes:
    """What a joiner signs. Else who has a token could ask in the name of a member."""
    return b"ollamad join proof 1\0" + binding + token_id.encode()


def seal_request(request: JoinRequest, key: bytes, binding: bytes) -> bytes:
    body = encode(request)
    return encode(Sealed(body, _mac(key, b"request", binding, body)))


def open_sealed(frame: bytes) -> tuple[str, Sealed]:
    """Read a request's envelope: the id of the token that it claims, and what is to be proved.

    Raises:
      MalformedMessage: it is no request.
    """
    sealed = decode(frame, Sealed)
    return decode(sealed.body, _Claim).token_id, sealed


def request_is_proved(sealed: Sealed, key: bytes, binding: bytes) -> bool:
    return hmac.compare_digest(sealed.mac, _mac(key, b"request", binding, sealed.body))


def open_request(sealed: Sealed) -> JoinRequest:
    """Read a request that is proved.

    Raises:
      MalformedMessage: who knows the token's secret speaks another protocol.
    """
    return decode(sealed.body, JoinRequest)


def seal_reply(
    reply: JoinReply | Refusal, request_body: bytes, key: bytes, binding: bytes
) -> bytes:
    tag = b"reply" if isinstance(reply, JoinReply) else b"refusal"
    body = encode(reply)
    mac = _mac(key, tag, binding, hashlib.sha256(request_body).digest() + body)
    return encode(Sealed(body, mac))


def open_reply(frame: bytes, request_body: bytes, token: Token, binding: bytes) -> JoinReply:
    """Read the sponsor's answer, check that it knows the secret and the CA of the token.

    Raises:
      JoinRefused: the sponsor refused, or is not who the token says.
    """
    try:
        sealed = decode(frame, Sealed)
        about = hashlib.sha256(request_body).digest() + sealed.body
        for tag in (b"reply", b"refusal"):
            if hmac.compare_digest(sealed.mac, _mac(token.key, tag, binding, about)):
                break
        else:
            # Perhaps a refusal of a node that does not know the token: readable, not proved.
            refusal = decode(sealed.body, Refusal)
            raise JoinRefused("NOT_PROVED", f"{refusal.message} (the answer is not signed)")
        if tag == b"refusal":
            refusal = decode(sealed.body, Refusal)
            raise JoinRefused(refusal.code, refusal.message)
        reply = decode(sealed.body, JoinReply)
    except MalformedMessage:
        raise JoinRefused("MALFORMED", "the other side does not speak the join protocol") from None
    return reply


def _mac(key: bytes, purpose: bytes, binding: bytes, body: bytes) -> bytes:
    return hmac.digest(key, b"ollamad join 1 " + purpose + b"\0" + binding + body, "sha256")
