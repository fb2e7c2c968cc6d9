"""Who a node is: its key pair, its certificate, the cluster's CA, and the TLS contexts.

The node's id is the hash of its public key (core/ids.py), so a certificate adds one thing only:
that the cluster's CA let this key in. A key belongs to one membership: whoever left, or lost its
log, joins with a new one, since old logs may still count the old id as a voter.

Every TLS connection between nodes is TLS 1.3 with certificates on both sides; names in
certificates are not checked, keys are.

A certificate says besides in which incarnation of the cluster it was issued (the subject's DN
qualifier; none before the first recovery), so that the handshake keeps incarnations apart.
"""

import datetime
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.state import CertificateAuthority

CA_LIFETIME = datetime.timedelta(days=3650)
CA_NOTICE = datetime.timedelta(days=365)  # it is not renewed: a new cluster has to be planned
CERTIFICATE_LIFETIME = datetime.timedelta(days=398)
RENEW_BEFORE = datetime.timedelta(days=130)  # a third of the lifetime; looked at every start, and
RENEWAL_CHECK_S = 86400.0  # so often while the daemon runs
RENEWAL_RETRY_S = 600.0  # after the disk has refused the new one
BACKDATE = datetime.timedelta(hours=1)  # tolerates clocks that differ a little

KEY_FILE = "node.key"
CERTIFICATE_FILE = "node.crt"
CA_FILE = "ca.crt"
SELF_SIGNED_FILE = "self-signed.crt"  # shown while no cluster has let the node in


class IdentityError(Exception):
    """The files of the identity are damaged or cannot be used now; the message says why."""


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What a TLS peer showed: the id that follows from its key, and the validity."""

    node_id: NodeId
    der: bytes
    incarnation: int = 0


class Identity:
    """The key pair in `directory`, and the certificate once the node is in a cluster."""

    def __init__(self, directory: Path, key: Ed25519PrivateKey) -> None:
        self._directory = directory
        self._key = key
        self.public_key = raw_public_key(key.public_key())
        self.node_id = node_id_of(self.public_key)

    @classmethod
    def load_or_create(cls, directory: Path) -> "Identity":
        """Read the key, or make one on the first start (file mode 0600, directory 0700)."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / KEY_FILE
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except FileNotFoundError:
            key = Ed25519PrivateKey.generate()
            write_private(path, private_pem(key))
        except PermissionError:
            raise IdentityError(f"{path} must belong to whoever runs ollamad (chown)") from None
        except ValueError as error:
            raise IdentityError(f"{path} is not a private key: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"{path} is not an ed25519 key")
        return cls(directory, key)

    @classmethod
    def to_join(cls, directory: Path) -> "Identity":
        """A key that was never a member's. Another try has the same, so that it is let in once."""
        identity = cls.load_or_create(directory)
        for name in (CERTIFICATE_FILE, CA_FILE):  # of a try that ended before `become_member` did
            (directory / name).unlink(missing_ok=True)
        return identity

    def sign(self, data: bytes) -> bytes:
        """An ed25519 signature by this node's key."""
        return self._key.sign(data)

    @property
    def is_member(self) -> bool:
        """Whether a cluster has given this node a certificate."""
        return (self._directory / CERTIFICATE_FILE).exists()

    @property
    def incarnation(self) -> int:
        """The incarnation of the cluster that this node's certificate belongs to."""
        return peer_certificate(self.certificate).incarnation

    @property
    def ca_der(self) -> bytes:
        """The certificate of the cluster's CA."""
        return certificate_der((self._directory / CA_FILE).read_bytes())

    @property
    def valid_until(self) -> datetime.datetime:
        """When the certificate of the cluster ends."""
        return self._current().not_valid_after_utc

    def _current(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self._directory / CERTIFICATE_FILE).read_bytes())

    def install(self, certificate_pem: bytes, ca_pem: bytes) -> None:
        """Keep the certificate that a cluster gave to this node."""
        write_private(self._directory / CA_FILE, ca_pem)
        write_private(self._directory / CERTIFICATE_FILE, certificate_pem)

    def become_member(self, directory: Path, certificate_pem: bytes, ca_pem: bytes) -> None:
        """Keep the certificate that a cluster gave, and move to `directory`, whole or not at all.

        On return this is durable. `directory` must not be there yet.
        """
        self.install(certificate_pem, ca_pem)
        self._directory.rename(directory)
        self._directory = directory
        sync_directory(directory.parent)

    def renew_if_due(
        self, ca: CertificateAuthority, incarnation: int, now: datetime.datetime
    ) -> bool:
        """Sign a new certificate when the present one nears its end, or the cluster was recovered.

        Returns:
          Whether there is a new one.
        """
        current = self._current()
        # A node that has just joined may know from its certificate what its log does not say yet.
        newest = max(incarnation, _incarnation_of(current))
        lasts = current.not_valid_after_utc - now > RENEW_BEFORE
        if lasts and _incarnation_of(current) == newest:
            return False
        pem = issue_certificate(ca, self.public_key, now, newest)
        self.install(pem, ca.certificate_pem)
        return True

    def check_validity(self, now: datetime.datetime) -> None:
        """Whether the clock and the certificate fit together.

        Raises:
          IdentityError: the certificate is not valid now, so no other node would talk to us.
        """
        start, end = self._current().not_valid_before_utc, self.valid_until
        if not start <= now <= end:
            raise IdentityError(
                f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, but the node's certificate "
                f"is valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}; set the clock "
                "(NTP), or, if it is right and the node was off for so long, run `ollamad renew`"
            )

    def server_context(self) -> ssl.SSLContext:
        """For listening: members show certificates of our CA; strangers none (join only)."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # no resumption: sessions would outlive a member's removal
        if self.is_member:
            context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def client_context(self) -> ssl.SSLContext:
        """For dialling members: their certificate must come from our CA."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # ids are keys, not host names
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def stranger_context(self) -> ssl.SSLContext:
        """For dialling somebody whose certificate cannot be checked yet (the join exchange).

        Shows no certificate: the other side could not check ours either.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    @property
    def certificate(self) -> bytes:
        """The certificate (DER) that this node shows as a TLS server."""
        return certificate_der(self._certificate_path().read_bytes())

    def _certificate_path(self) -> Path:
        if self.is_member:
            return self._directory / CERTIFICATE_FILE
        path = self._directory / SELF_SIGNED_FILE
        if not path.exists():
            write_private(path, self_signed(self._key, datetime.datetime.now(datetime.UTC)))
        return path

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self._certificate_path(), self._directory / KEY_FILE)
        if self.is_member:
            context.load_verify_locations(self._directory / CA_FILE)
        return context


def make_ca(now: datetime.datetime) -> CertificateAuthority:
    """A new CA for a new cluster."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ollamad cluster CA")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, None)
    )
    return CertificateAuthority(
        certificate.public_bytes(serialization.Encoding.PEM), private_pem(key)
    )


def ca_end_in_sight(ca: CertificateAuthority, now: datetime.datetime) -> datetime.datetime | None:
    """When the CA ends, if that is soon enough to be told of."""
    end = x509.load_pem_x509_certificate(ca.certificate_pem).not_valid_after_utc
    return end if end - now < CA_NOTICE else None


def issue_certificate(
    ca: CertificateAuthority, public_key: bytes, now: datetime.datetime, incarnation: int = 0
) -> bytes:
    """A member's certificate (PEM) for that raw ed25519 public key."""
    ca_key = serialization.load_pem_private_key(ca.private_key_pem, None)
    assert isinstance(ca_key, Ed25519PrivateKey)
    ca_certificate = x509.load_pem_x509_certificate(ca.certificate_pem)
    return _leaf(
        Ed25519PublicKey.from_public_bytes(public_key),
        ca_key,
        ca_certificate.subject,
        now,
        incarnation,
    )


def self_signed(key: Ed25519PrivateKey, now: datetime.datetime) -> bytes:
    """A certificate (PEM) of a node that no cluster knows yet; it proves its key only."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ollamad, not a member yet")])
    return _leaf(key.public_key(), key, name, now)


def _leaf(
    public_key: Ed25519PublicKey,
    signer: Ed25519PrivateKey,
    issuer: x509.Name,
    now: datetime.datetime,
    incarnation: int = 0,
) -> bytes:
    node_id = node_id_of(raw_public_key(public_key))
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, node_id)]
    if incarnation:
        subject.append(x509.NameAttribute(NameOID.DN_QUALIFIER, str(incarnation)))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + CERTIFICATE_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .sign(signer, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def peer_certificate(der: bytes) -> PeerCertificate:
    """The id behind a certificate that a TLS peer showed.

    Raises:
      IdentityError: it is not a certificate over an ed25519 key, or says nonsense.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        incarnation = _incarnation_of(certificate)
    except ValueError as error:
        raise IdentityError(f"not a certificate: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError("the peer's certificate has no ed25519 key")
    return PeerCertificate(node_id_of(raw_public_key(key)), der, incarnation)


def _incarnation_of(certificate: x509.Certificate) -> int:
    """The incarnation that a certificate belongs to. Raises ValueError."""
    values = certificate.subject.get_attributes_for_oid(NameOID.DN_QUALIFIER)
    return int(str(values[0].value)) if values else 0


def raw_public_key(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of the key."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))


def sync_directory(path: Path) -> None:
    """Make durable which files are in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
