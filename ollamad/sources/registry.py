"""Ollama's registry and every other OCI registry: `[host/]namespace/name:tag`.

A model is a manifest, kept byte for byte since its sha256 is the model's digest, and the blobs
that it names by theirs; so whatever sends the blobs, mirrors and content networks included,
cannot send wrong ones. Signing in follows the token protocol of the Docker registry: a 401 names
a realm, which gives a token for what is asked. The realm must be the registry's own host, or one
that is allowed, for it gets the password. Passwords come from Docker's own configuration, where
`docker login` puts them.
"""

import base64
import binascii
import json
import os
import re
import secrets
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx
import msgspec
import trio

from ollamad.core.names import DEFAULT_HOST, ModelName
from ollamad.sources.base import (
    AccessRefused,
    NotFound,
    Offer,
    OriginRefused,
    RemoteFile,
    SourceError,
)
from ollamad.sources.client import OriginClient, basic_header
from ollamad.sources.policy import HostList, origin_of

ACCEPT: Final = (
    "application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.oci.image.manifest.v1+json"
)
MAX_MANIFEST_BYTES: Final = 64 * 1024  # real ones have about 1 kB
MAX_CONFIG_BYTES: Final = 1 << 20  # of Docker's configuration
_PARAMETER: Final = re.compile(r'([a-zA-Z0-9_-]+)=(?:"([^"]*)"|([^",\s]+))')


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class Registry:
    """The address of one registry, and one repository on it.

    Args:
      mirror: stands in for Ollama's registry: `host`, `host:port` or a URL.
      plain_http: whether it is spoken to without TLS.
    """

    def __init__(self, name: ModelName, *, mirror: str, plain_http: HostList) -> None:
        host = name.host
        if host == DEFAULT_HOST and mirror:
            host = mirror
        if "://" not in host:
            insecure = plain_http.has(origin_of(f"http://{host}"))
            host = f"{'http' if insecure else 'https'}://{host}"
        self.base = host.rstrip("/")
        self.host = urllib.parse.urlsplit(self.base).netloc
        self.repository = f"{name.namespace}/{name.model}".lower()
        self.tag = name.tag

    def manifest_url(self, reference: str = "") -> str:
        return f"{self.base}/v2/{self.repository}/manifests/{reference or self.tag}"

    def blob_url(self, digest: str) -> str:
        return f"{self.base}/v2/{self.repository}/blobs/{digest}"


class RegistryLogin:
    """Tokens of one registry for one repository; a `client.Credentials`.

    Args:
      actions: `pull`, or `push,pull`.
      realms: hosts that may be a registry's realm beside itself.
    """

    def __init__(
        self,
        client: OriginClient,
        registry: Registry,
        *,
        actions: str = "pull",
        realms: HostList = HostList(),  # noqa: B008 - immutable
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._client = client
        self._registry = registry
        self._actions = actions
        self._realms = realms
        self._environment = os.environ if environment is None else environment
        self._header = ""
        self._lock = trio.Lock()

    def header(self) -> str:
        return self._header

    async def challenged(self, www_authenticate: str) -> bool:
        """Get a token of the realm, or answer with the password itself.

        Raises:
          OriginRefused: the realm is somebody else's. AccessRefused: it gives no token.
          SourceError: nor would it to anybody.
        """
        before = self._header
        async with self._lock:
            if self._header != before:
                return True  # another connection has just been through this
            scheme, _, rest = www_authenticate.partition(" ")
            account = await self._account()
            if scheme.lower() == "basic":
                if account is None or self._header:
                    return False
                self._header = basic_header(*account)
                return True
            if scheme.lower() != "bearer":
                return False
            token = await self._token(challenge_parameters(rest), account)
            if f"Bearer {token}" == before:
                return False
            self._header = f"Bearer {token}"
            return True

    async def _token(self, given: Mapping[str, str], account: tuple[str, str] | None) -> str:
        realm = given.get("realm", "")
        origin, mine = origin_of(realm), origin_of(self._registry.base)
        if origin.host != mine.host and not self._realms.has(origin):
            raise OriginRefused(
                f"{mine} sends to {origin} for a token, which is not its own host. If it is to be "
                f"trusted with passwords for {mine}, allow it: sources.token_hosts: {origin}"
            )
        scope = given.get("scope") or f"repository:{self._registry.repository}:{self._actions}"
        query = {"service": given.get("service", ""), "scope": scope}
        # As Ollama's own client sends them.
        query |= {"ts": str(int(time.time())), "nonce": secrets.token_urlsafe(16)}
        url = f"{realm}{'&' if '?' in realm else '?'}{urllib.parse.urlencode(query)}"
        headers = {} if account is None else {"Authorization": basic_header(*account)}
        try:
            answer = await self._client.document(url, headers)
            got = msgspec.json.decode(answer.content, type=_Token)
        except msgspec.DecodeError:
            raise SourceError(
                f"{origin} answers with no token that can be read; check that {mine} is a registry"
            ) from None
        except NotFound as error:
            raise SourceError(
                f"{mine} sends for a token to where none is given; check that it is a registry "
                f"({error})"
            ) from error
        token = got.token or got.access_token
        if not token:
            raise AccessRefused(
                f"{origin} gives no token for {self._registry.repository}; sign in first: docker "
                f"login {self._registry.host}"
            )
        return token

    async def _account(self) -> tuple[str, str] | None:
        reading = read_docker_account
        return await trio.to_thread.run_sync(reading, self._registry.host, self._environment)


class RegistrySource:
    """Models of OCI registries. Works on a client that is open."""

    def __init__(
        self,
        client: OriginClient,
        name: ModelName,
        *,
        mirror: str = "",
        plain_http: HostList = HostList(),  # noqa: B008 - immutable
        realms: HostList = HostList(),  # noqa: B008 - immutable
    ) -> None:
        self._client = client
        self._name = name
        self.registry = Registry(name, mirror=mirror, plain_http=plain_http)
        self._login = RegistryLogin(client, self.registry, realms=realms)

    @property
    def short_name(self) -> str:
        return str(self._name)

    async def resolve(self) -> Offer:
        """The manifest; see `OpenSource.resolve`."""
        url = self.registry.manifest_url()
        try:
            answer = await self._client.document(
                url, {"Accept": ACCEPT}, credentials=self._login, limit=MAX_MANIFEST_BYTES
            )
        except NotFound:
            raise NotFound(
                f"{self.registry.host} has no model {self._name}; check the name and the tag"
            ) from None
        return Offer(
            reference=f"{self.registry.host}/{self.registry.repository}:{self.registry.tag}",
            model_name=str(self._name),
            manifest=answer.content,
        )

    def blob(self, digest: str, size: int) -> RemoteFile:
        return RemoteFile(self.registry.blob_url(digest), size, digest)

    @asynccontextmanager
    async def open(
        self, url: str, headers: Mapping[str, str], *, vouched: bool
    ) -> AsyncIterator[httpx.Response]:
        """For `ranges.download`."""
        async with self._client.open(
            url, headers, credentials=self._login, vouched=vouched
        ) as response:
            yield response


def challenge_parameters(text: str) -> dict[str, str]:
    """What stands behind the scheme in WWW-Authenticate."""
    found = _PARAMETER.findall(text)
    return {name.lower(): quoted or plain for name, quoted, plain in found}


def read_docker_account(host: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password for a registry by Docker's configuration. Blocks on the disk.

    Looked for are `$REGISTRY_AUTH_FILE`, `$DOCKER_CONFIG/config.json`, `~/.docker/config.json`.
    Credential helpers are programs and not run.

    Raises:
      SourceError: the file is there and cannot be understood.
    """
    folder = environment.get("DOCKER_CONFIG") or str(Path(environment.get("HOME", "/")) / ".docker")
    path = Path(environment.get("REGISTRY_AUTH_FILE") or Path(folder) / "config.json")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES)
    except OSError:
        return None
    try:
        accounts = json.loads(data).get("auths") or {}
        for key, entry in accounts.items():
            plain = key.removeprefix("https://").removeprefix("http://").rstrip("/")
            if plain.partition("/")[0].lower() == host.lower() and entry.get("auth"):
                text = base64.b64decode(entry["auth"], validate=True).decode()
                user, _, password = text.partition(":")
                return user, password
    except (ValueError, AttributeError, TypeError, binascii.Error) as error:
        raise SourceError(
            f"{path} cannot be understood: {error}; repair it, or write it anew with docker login"
        ) from error
    return None
