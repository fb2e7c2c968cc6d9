"""Sends a model to an OCI registry: the blobs that it lacks, then the manifest.

As the Docker registry's protocol has it: an upload is begun, sent in chunks, and closed with the
digest, which the registry checks. When the connection of a chunk broke, the registry is asked what
it has. Many then give the upload up, as the reference implementation does once a part of the chunk
has come: that file begins anew. A model's bytes and a password go to the registry's own host only.
"""

import urllib.parse
from collections.abc import Sequence
from typing import Final

import httpx
import trio

from ollamad.core.names import ModelName
from ollamad.core.pieces import MIB
from ollamad.sources.base import NotFound, OriginRefused, OriginUnreachable, Read, Sent, SourceError
from ollamad.sources.client import (
    OriginClient,
    TryAgain,
    check_status,
    explain,
    join,
    number,
    shown,
)
from ollamad.sources.policy import HostList, origin_of
from ollamad.sources.registry import Registry, RegistryLogin

CHUNK_BYTES: Final = 8 * MIB  # held in memory, and sent again after a break
MAX_FAILURES: Final = 5  # in a row, without a byte that was not sent before
BACKOFF_S: Final = 0.5
MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"


class Pusher:
    """One push. Works on a client that is open."""

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
        self._registry = Registry(name, mirror=mirror, plain_http=plain_http)
        self._login = RegistryLogin(client, self._registry, actions="push,pull", realms=realms)

    async def push(
        self, manifest: bytes, blobs: Sequence[tuple[str, int]], read: Read, sent: Sent
    ) -> None:
        """Send all that the registry lacks.

        Args:
          blobs: digests and sizes, in any order.
          read: gives a part of a blob.

        Raises:
          SourceError: the registry does not take it; the message says why.
          whatever `read` raises.
        """
        done = 0
        for digest, size in blobs:
            if not await self._has(digest):
                await self._upload(digest, size, read, lambda n, base=done: sent(base + n))  # type: ignore[misc]
            done += size
            sent(done)
        url = self._registry.manifest_url()
        await self._request("PUT", url, manifest, {"Content-Type": MANIFEST_TYPE})

    async def _has(self, digest: str) -> bool:
        """Whether the registry has a blob; perhaps elsewhere, where a redirect leads."""
        try:
            await self._request("HEAD", self._registry.blob_url(digest))
        except NotFound:
            return False
        return True

    async def _upload(self, digest: str, size: int, read: Read, sent: Sent) -> None:
        place = await self._begin()
        offset = farthest = failures = 0
        while offset < size:
            data = await read(digest, offset, min(CHUNK_BYTES, size - offset))
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Range": f"{offset}-{offset + len(data) - 1}",
            }
            try:
                answer = await self._request("PATCH", place, data, headers, tries=1)
            except OriginUnreachable:
                failures += 1
                if failures >= MAX_FAILURES:
                    raise
                await trio.sleep(BACKOFF_S * 2 ** (failures - 1))
                place, offset = await self._go_on(place)
            else:
                place = self._place(place, answer)
                offset += len(data)
            if offset > farthest:
                farthest, failures = offset, 0
            sent(offset)
        separator = "&" if "?" in place else "?"
        await self._request("PUT", f"{place}{separator}digest={urllib.parse.quote(digest)}", b"")

    async def _begin(self) -> str:
        """Where a new upload goes to."""
        base = f"{self._registry.base}/v2/{self._registry.repository}/blobs/uploads/"
        return self._place(base, await self._request("POST", base))

    async def _go_on(self, place: str) -> tuple[str, int]:
        """Where the upload goes on of which a chunk broke off, and at which byte."""
        try:
            answer = await self._request("GET", place)
        except OriginUnreachable:
            raise
        except SourceError:  # it is given up there, or nobody can ask
            return await self._begin(), 0
        return self._place(place, answer), _taken(answer)

    def _place(self, url: str, answer: httpx.Response) -> str:
        """Where the upload goes on.

        Raises:
          OriginRefused: on another host.
        """
        place = join(url, str(answer.headers.get("Location", "")) or url)
        there, here = origin_of(place), origin_of(self._registry.base)
        if (there.host, there.port) != (here.host, here.port):
            raise OriginRefused(
                f"{here} wants the model to be sent to {there}, which is not done: it and the "
                "password are for the registry's own host. Push to that one by its name, if you "
                "trust it"
            )
        # A registry behind a proxy that ends TLS may not know that it is spoken to with TLS.
        parts = urllib.parse.urlsplit(place)
        return urllib.parse.urlunsplit(parts._replace(scheme=here.scheme))

    async def _request(
        self,
        method: str,
        url: str,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        *,
        tries: int = MAX_FAILURES,
    ) -> httpx.Response:
        """An answer without a body that matters.

        Raises:
          NotFound, SourceError, OriginUnreachable: as its status or its absence says.
        """
        for attempt in range(1, tries + 1):
            try:
                async with self._client.open(
                    url, headers, method=method, content=content, credentials=self._login
                ) as response:
                    if response.status_code == 400 or response.status_code == 405:
                        reason = (await response.aread())[:300].decode(errors="replace").strip()
                        raise SourceError(
                            f"{shown(url)} does not take it; check the name, and what the registry "
                            f"allows: {reason}"
                        )
                    if method != "HEAD" or not response.has_redirect_location:
                        check_status(response)
                    return response
            except (httpx.HTTPError, httpx.InvalidURL, TryAgain) as error:
                if attempt == tries:
                    raise OriginUnreachable(explain(url, error)) from error
                await trio.sleep(BACKOFF_S * 2 ** (attempt - 1))
        raise AssertionError("not reached")


def _taken(answer: httpx.Response) -> int:
    """How many bytes of an upload the registry has, by `Range: 0-last`."""
    last = number(answer.headers.get("Range", "").rpartition("-")[2])
    return last + 1 if last else 0
