"""How a node comes in: the two-frame exchange of `wire/join.py` over TLS.

A stranger gets nothing but this: one bounded frame is read of it, one is answered, within a
few seconds, and only so many times a minute. Who dials does not matter: a joiner dials a member
(`--join TOKEN@HOST:PORT`), or waits, and a member dials it (`POST /cluster/join`).
"""

import logging
import time
from collections.abc import Awaitable, Callable

import msgspec
import trio
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ollamad.core.ids import NodeId, is_node_id, node_id_of, short
from ollamad.core.names import check_node_name
from ollamad.core.ratelimit import RateLimit
from ollamad.core.state import JoinToken
from ollamad.peers.identity import IdentityError, certificate_der, peer_certificate
from ollamad.peers.tls import Gate, peer_of
from ollamad.peers.tls_stream import TlsStream
from ollamad.wire.codec import MalformedMessage
from ollamad.wire.join import (
    MAX_CLOCK_SKEW_S,
    MAX_JOIN_FRAME,
    JoinRefused,
    JoinReply,
    JoinRequest,
    Refusal,
    Token,
    channel_binding,
    open_reply,
    open_request,
    open_sealed,
    proof_text,
    request_is_proved,
    seal_reply,
    seal_request,
)
from ollamad.wire.mux import OLDEST_PROTOCOL, PROTOCOL

log = logging.getLogger(__name__)

EXCHANGE_TIMEOUT_S = 15.0  # the sponsor may have to wait for an election
FRAME_TIMEOUT_S = 5.0  # a stranger that drips bytes is cut off
MAX_STRANGERS = 16  # exchanges at once, all addresses together
ATTEMPTS = 20  # exchanges an address a minute: ten hosts behind one NAT may join at once
ATTEMPTS_PERIOD_S = 60.0

Admit = Callable[[JoinRequest, str], Awaitable[JoinReply]]


class Sponsor:
    """The member's side: checks a stranger's proof and lets `admit` decide the rest.

    Args:
      token_of: the live join token with that id, None if there is none.
      admit: commits the new member, given the host it was seen at; raises JoinRefused.
    """

    def __init__(self, token_of: Callable[[str], JoinToken | None], admit: Admit) -> None:
        self._token_of = token_of
        self._admit = admit
        self._limit = RateLimit(ATTEMPTS, ATTEMPTS_PERIOD_S)
        self._active = 0

    async def serve(self, stream: TlsStream, server_certificate: bytes, address: str) -> None:
        """Run the exchange with a stranger at that address (host), then close the stream."""
        if self._active >= MAX_STRANGERS or not self._limit.allow(address, time.monotonic()):
            log.warning("join: too many attempts from %s", address)
            await trio.aclose_forcefully(stream)
            return
        self._active += 1
        try:
            with trio.move_on_after(EXCHANGE_TIMEOUT_S):
                await self._exchange(stream, channel_binding(server_certificate), address)
        except (trio.BrokenResourceError, trio.TooSlowError, MalformedMessage) as error:
            log.warning("join: closing %s: %s", address, str(error) or type(error).__name__)
        finally:
            self._active -= 1
            with trio.move_on_after(1, shield=True):
                await trio.aclose_forcefully(stream)

    async def _exchange(self, stream: TlsStream, binding: bytes, address: str) -> None:
        with trio.fail_after(FRAME_TIMEOUT_S):
            frame = await _read_frame(stream)
        token_id, sealed = open_sealed(frame)
        token = self._token_of(token_id)
        answer: JoinReply | Refusal
        if token is None or not request_is_proved(sealed, token.key, binding):
            log.warning("join: refused %s: no valid join token", address)
            text = "the join token is unknown, expired or wrong; make a new one"
            answer = Refusal("BAD_TOKEN", text)
            await _write_frame(stream, seal_reply(answer, sealed.body, b"", binding))
            return
        request = open_request(sealed)
        try:
            _check(request, binding)
            answer = await self._admit(request, address)
            log.info("join: %s (%s) is in", short(request.node_id), address)
        except JoinRefused as refused:
            who = short(request.node_id) if is_node_id(request.node_id) else "somebody"
            log.warning("join: refused %s (%s): %s", address, who, refused)
            answer = Refusal(refused.code, str(refused))
        await _write_frame(stream, seal_reply(answer, sealed.body, token.key, binding))


def _check(request: JoinRequest, binding: bytes) -> None:
    if len(request.public_key) != 32 or node_id_of(request.public_key) != request.node_id:
        raise JoinRefused("BAD_IDENTITY", "the node id does not belong to the node's key")
    if request.protocol < OLDEST_PROTOCOL or request.oldest_protocol > PROTOCOL:
        raise JoinRefused(
            "INCOMPATIBLE_VERSION",
            f"the joining node runs {request.version} (protocol {request.oldest_protocol} to "
            f"{request.protocol}), this cluster speaks protocol {OLDEST_PROTOCOL} to {PROTOCOL}; "
            "install the cluster's version",
        )
    try:
        key = Ed25519PublicKey.from_public_bytes(request.public_key)
        key.verify(request.proof, proof_text(request.token_id, binding))
    except InvalidSignature:
        raise JoinRefused(
            "BAD_IDENTITY",
            "the joining node does not prove that its key is its own; "
            "install the cluster's version",
        ) from None
    try:
        check_node_name(request.name)
    except ValueError as error:
        raise JoinRefused("INVALID_NAME", f"{error}; set NODE_ID") from None
    skew = request.now - time.time()
    if not abs(skew) <= MAX_CLOCK_SKEW_S:  # so written, NaN is refused too
        raise JoinRefused(
            "CLOCK_SKEW",
            f"the joining machine's clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'};"
            " set it (NTP) and join again, since certificates depend on it",
        )


async def request_admission(
    stream: TlsStream,
    request: JoinRequest,
    token: Token,
    server_certificate: bytes,
    sign: Callable[[bytes], bytes],
) -> JoinReply:
    """The joiner's side: ask over a stream of either direction, and check who answers.

    Args:
      server_certificate: of the TLS server, whichever side that is (DER).
      sign: signs with the node's key.

    Raises:
      JoinRefused: the sponsor refused, does not know the token's secret, or is of a cluster
        with another CA.
    """
    binding = channel_binding(server_certificate)
    proof = sign(proof_text(request.token_id, binding))
    frame = seal_request(msgspec.structs.replace(request, proof=proof), token.key, binding)
    body = open_sealed(frame)[1].body
    try:
        with trio.fail_after(EXCHANGE_TIMEOUT_S):
            await _write_frame(stream, frame)
            answer = await _read_frame(stream)
    except trio.TooSlowError:
        raise JoinRefused("TIMEOUT", "the cluster did not answer in time") from None
    except (trio.BrokenResourceError, MalformedMessage) as error:
        raise JoinRefused("BROKEN", f"the connection ended early ({error})") from None
    reply = open_reply(answer, body, token, binding)
    _check_certificates(reply, request.node_id, token)
    return reply


def _check_certificates(reply: JoinReply, own_id: NodeId, token: Token) -> None:
    """Whether the CA is the one that the token names, and has signed for this node's key."""
    try:
        ca_der = certificate_der(reply.ca_certificate_pem)
        if channel_binding(ca_der) != token.ca_hash:
            raise JoinRefused(
                "WRONG_CLUSTER", "the answer comes from another cluster than the token"
            )
        own_der = certificate_der(reply.certificate_pem)
        if peer_certificate(own_der).node_id != own_id:
            raise JoinRefused("MALFORMED", "the cluster signed a certificate for another node")
        ca = x509.load_der_x509_certificate(ca_der)
        x509.load_der_x509_certificate(own_der).verify_directly_issued_by(ca)
    except InvalidSignature:
        raise JoinRefused("MALFORMED", "the certificate is not signed by the cluster") from None
    except (IdentityError, ValueError, TypeError) as error:  # not PEM, another issuer or algorithm
        raise JoinRefused("MALFORMED", f"the answer's certificates: {error}") from None


async def join_through(
    gate: Gate, address: str, request: JoinRequest, token: Token, sign: Callable[[bytes], bytes]
) -> JoinReply:
    """Dial a member's P2P port and ask to be let in.

    Raises:
      PeerUnreachable: nobody answers there. JoinRefused: see `request_admission`.
    """
    stream = await gate.dial_stranger(address)
    try:
        server_certificate = stream.peer_certificate()
        assert server_certificate is not None, "a TLS server always shows a certificate"
        return await request_admission(stream, request, token, server_certificate, sign)
    finally:
        with trio.move_on_after(1, shield=True):
            await trio.aclose_forcefully(stream)


async def sponsor_waiting_node(gate: Gate, sponsor: Sponsor, node_id: NodeId, address: str) -> None:
    """Dial a node that waits with a token, check that its key hashes to the id, let it in.

    Raises:
      PeerUnreachable: nobody answers there. JoinRefused: somebody else answers.
    """
    stream = await gate.dial_stranger(address)
    try:
        found = peer_of(stream)
    except IdentityError:  # some other TLS server
        found = None
    if found != node_id:
        await trio.aclose_forcefully(stream)
        raise JoinRefused(
            "WRONG_NODE", f"{address} is node {short(found) if found else '?'}…, not {node_id}"
        )
    server_certificate = stream.peer_certificate()
    assert server_certificate is not None, "a TLS server always shows a certificate"
    await sponsor.serve(stream, server_certificate, address.rpartition(":")[0])


async def _read_frame(stream: TlsStream) -> bytes:
    data = bytearray()
    size = 4
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise trio.BrokenResourceError("the other side closed the connection")
        data += part
        if size == 4 and len(data) == 4:
            size += int.from_bytes(data, "big")
            if size - 4 > MAX_JOIN_FRAME:
                raise MalformedMessage(f"a join frame of {size - 4} bytes is too long")
    return bytes(data[4:])


async def _write_frame(stream: TlsStream, frame: bytes) -> None:
    await stream.send_all(len(frame).to_bytes(4, "big") + frame)
