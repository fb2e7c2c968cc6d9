"""Real servers that models come from: Debian's docker-registry, nginx, and a little token server.

All on loopback, and ended with the block. Where a program is not installed the test that wants it
is skipped with that as its reason; CI installs them.
"""

import base64
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import httpx
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

START_S = 15.0
ISSUER, SERVICE = "test-issuer", "test-registry"


def program(name: str, package: str) -> str:
    """The path of a program; without it the test is skipped."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install {package})")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server from when it listens until the block ends."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command[0]} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class TokenServer:
    """Gives tokens to whoever has the password, and to nobody else."""

    key_path: Path
    cert_path: Path
    accounts: dict[str, str] = field(default_factory=lambda: {"me": "s3cret"})
    anonymous_pull: bool = True
    ttl_s: float = 300
    asked: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self.port}/token"

    def token(self, query: dict[str, str], authorization: str) -> str | None:
        self.asked.append(query)
        user = ""
        if authorization.startswith("Basic "):
            user, _, password = base64.b64decode(authorization[6:]).decode().partition(":")
            if self.accounts.get(user) != password:
                return None
        _, _, rest = query.get("scope", "").partition(":")
        name, _, actions = rest.rpartition(":")
        granted = actions.split(",") if user else ["pull"] if self.anonymous_pull else []
        now = int(time.time())
        claims = {
            "iss": ISSUER, "sub": user, "aud": SERVICE, "iat": now, "nbf": now - 5,
            "exp": now + self.ttl_s, "jti": str(len(self.asked)),
            "access": [{"type": "repository", "name": name, "actions": granted}],
        }  # fmt: skip
        key = self.key_path.read_bytes()
        certificate = x509.load_pem_x509_certificate(self.cert_path.read_bytes())
        chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
        return jwt.encode(claims, key, "ES256", headers={"x5c": chain})


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server of the test's own; its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def self_signed(key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    """A certificate that is its own CA, for that host."""
    names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(names)
        .issuer_name(names)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )


def write_pair(key: ec.EllipticCurvePrivateKey, name: str, key_path: Path, cert_path: Path) -> None:
    """A key and its certificate as PEM files."""
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    cert_path.write_bytes(self_signed(key, name).public_bytes(serialization.Encoding.PEM))


@contextlib.contextmanager
def token_server(directory: Path) -> Iterator[TokenServer]:
    key = ec.generate_private_key(ec.SECP256R1())
    server = TokenServer(directory / "token.key", directory / "token.crt")
    write_pair(key, "tokens", server.key_path, server.cert_path)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            token = server.token(query, self.headers.get("Authorization", ""))
            body = json.dumps({"token": token} if token else {"details": "no"}).encode()
            self.send_response(200 if token else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as server.port:
        yield server


@dataclass
class RegistryServer:
    """A docker-registry that runs."""

    port: int
    root: Path

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def fill(self, repository: str, tag: str, manifest: bytes, blobs: list[bytes]) -> None:
        """Put a model in, as any client of the registry would (without signing in)."""
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            for data in blobs:
                digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
                begun = client.post(f"/v2/{repository}/blobs/uploads/")
                place = begun.headers["Location"]
                done = client.put(f"{place}&digest={digest}", content=data)
                assert done.status_code == 201, done.text
            kind = "application/vnd.docker.distribution.manifest.v2+json"
            done = client.put(
                f"/v2/{repository}/manifests/{tag}",
                content=manifest,
                headers={"Content-Type": kind},
            )
            assert done.status_code == 201, done.text


@contextlib.contextmanager
def registry_server(directory: Path, tokens: TokenServer | None = None) -> Iterator[RegistryServer]:
    path = program("docker-registry", "docker-registry")
    port = free_port()
    root = directory / "registry"
    auth = ""
    if tokens is not None:
        auth = (
            f"auth:\n  token:\n    realm: {tokens.realm}\n    service: {SERVICE}\n"
            f"    issuer: {ISSUER}\n    rootcertbundle: {tokens.cert_path}\n"
        )
    config = directory / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {root}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n{auth}"
    )
    with running([path, "serve", str(config)], port, directory / "registry.log"):
        yield RegistryServer(port, root)


@dataclass
class Nginx:
    """An nginx that serves `root`, and `prefix` locations of its own making."""

    port: int
    root: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bytes_sent(self, path: str) -> int:
        """Bytes of bodies that it sent for a path; it logs a request when that has ended."""
        return sum(int(line.split()[2]) for line in self.requests(path))

    def requests(self, path: str) -> list[str]:
        """Lines of `method path bytes status range`; the path as it was asked for."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.split()[1] == path]


@contextlib.contextmanager
def nginx(
    directory: Path, locations: str = "", *, port: int = 0, listen_more: str = ""
) -> Iterator[Nginx]:
    """nginx with these locations beside the files of its root."""
    path = program("nginx", "nginx-light")
    port = port or free_port()
    root = directory / "www"
    root.mkdir(parents=True, exist_ok=True)
    log = directory / "access.log"
    config = directory / "nginx.conf"
    config.write_text(
        f"""
daemon off; master_process off; pid {directory}/nginx.pid; error_log {directory}/error.log;
worker_rlimit_nofile 256;
events {{ worker_connections 128; }}
http {{
  log_format short '$request_method $request_uri $body_bytes_sent $status "$http_range"';
  access_log {log} short;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{
    listen 127.0.0.1:{port} {listen_more};
    root {root};
    {locations}
  }}
}}
"""
    )
    with running(
        [path, "-c", str(config), "-e", str(directory / "error.log")], port, directory / "nginx.out"
    ):
        log.write_text("")
        yield Nginx(port, root, log)


class _Listener:
    """Serves each connection in a thread of its own while its `with` block lasts."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        raise NotImplementedError


class ConnectProxy(_Listener):
    """A proxy for HTTPS: `with ConnectProxy({"host": port}) as proxy:`; connects names to ports."""

    def __init__(self, places: dict[str, int]) -> None:
        super().__init__()
        self._places = places
        self.asked: list[str] = []
        self.url = f"http://{self.host}"

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(4096)
                if not data:
                    return
                head += data
            target = head.split()[1].decode()
            self.asked.append(target)
            port = self._places[target.partition(":")[0]]
            with socket.create_connection(("127.0.0.1", port)) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                _copy(client, server)
                back.join(10)


class BreakingProxy(_Listener):
    """Stands before a server: `with BreakingProxy(port, after=n, times=2) as proxy:`; so often a
    connection breaks when PATCHes have carried so many bytes to the server since the last time."""

    def __init__(self, server_port: int, *, after: int, times: int) -> None:
        super().__init__()
        self._server_port = server_port
        self._after = after
        self._carried = 0
        self.left = times

    def _serve(self, client: socket.socket) -> None:
        address = ("127.0.0.1", self._server_port)
        with client, socket.create_connection(address) as server, contextlib.suppress(OSError):
            patching = broken = False

            def answer() -> None:
                with contextlib.suppress(OSError):
                    while data := server.recv(65536):
                        if not broken:
                            client.sendall(data)

            back = threading.Thread(target=answer, daemon=True)
            back.start()
            while data := client.recv(65536):
                patching = patching or data.startswith(b"PATCH ")
                if patching and self.left and self._carried + len(data) > self._after:
                    server.sendall(data[: self._after - self._carried])
                    self.left, self._carried, broken = self.left - 1, 0, True
                    break
                self._carried += len(data) * patching
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
            back.join(10)  # the server is through with what it got before the client hears of it


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
