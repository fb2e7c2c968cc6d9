"""GGUF repositories of Hugging Face: `hf.co/user/repo[:quant]`, and mirrors of it.

The Hub's own API lists the files of a repository with their sha256 (they are in LFS), which is
all that is needed; so mirrors that have the API and the files work too (HF_ENDPOINT). `quant`
picks a file by the quantisation in its name, or by the whole name; without it, the best of a few
usual ones is taken. A projector (`mmproj`) of the repository comes along.
"""

import re
import urllib.parse
from collections.abc import Sequence
from typing import Final

import msgspec

from ollamad.core.names import DEFAULT_TAG, ModelName
from ollamad.sources.base import (
    AccessRefused,
    NotFound,
    Offer,
    OriginRefused,
    RemoteFile,
    SourceError,
)
from ollamad.sources.client import OriginClient, join, shown
from ollamad.sources.policy import origin_of

HOSTS: Final = frozenset({"hf.co", "huggingface.co"})
ENDPOINT: Final = "https://huggingface.co"
MAX_PAGES: Final = 10  # of 1,000 files each; repositories of models have some dozen
# What is taken when nobody says: the usual balance first, then what comes nearest to it.
PREFERRED: Final = (
    "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q5_K_M", "Q5_K_S", "Q3_K_M",
    "Q6_K", "Q8_0", "F16", "BF16",
)  # fmt: skip
_PROJECTORS: Final = ("F16", "BF16", "Q8_0", "F32")
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_NEXT: Final = re.compile(r'<([^>]+)>;\s*rel="next"')


class _Lfs(msgspec.Struct):
    oid: str = ""
    size: int = 0


class _Entry(msgspec.Struct):
    type: str
    path: str
    size: int = 0
    lfs: _Lfs | None = None


class BearerToken:
    """A token that is sent with every request; a `client.Credentials`."""

    def __init__(self, token: str) -> None:
        self._token = token

    def header(self) -> str:
        return f"Bearer {self._token}" if self._token else ""

    async def challenged(self, www_authenticate: str) -> bool:
        return False


class HuggingFace:
    """The Hub or a mirror of it. Works on a client that is open."""

    def __init__(self, client: OriginClient, *, endpoint: str = "", token: str = "") -> None:
        self._client = client
        self._endpoint = (endpoint or ENDPOINT).rstrip("/")
        self.credentials = BearerToken(token)

    async def resolve(self, name: ModelName) -> Offer:
        """Choose the files; see `Source.resolve`."""
        repository = f"{name.namespace}/{name.model}"
        entries = await self._files(repository)
        models = [e for e in entries if _is_gguf(e) and not _is_projector(e)]
        chosen = choose(models, "" if name.tag == DEFAULT_TAG else name.tag, repository)
        projectors = [e for e in entries if _is_gguf(e) and _is_projector(e)]
        projector = _first_of(projectors, _PROJECTORS) if projectors else None
        return Offer(
            reference=f"hf.co/{repository}:{name.tag}",
            model_name=str(name),
            weights=self._file(repository, chosen),
            projector=None if projector is None else self._file(repository, projector),
            description=chosen.path,
        )

    async def _files(self, repository: str) -> list[_Entry]:
        url = f"{self._endpoint}/api/models/{repository}/tree/main?recursive=true"
        entries: list[_Entry] = []
        for _ in range(MAX_PAGES):
            try:
                answer = await self._client.document(url, credentials=self.credentials)
                entries += msgspec.json.decode(answer.content, type=list[_Entry])
            except NotFound:
                raise AccessRefused(
                    f"{self._endpoint} has no repository {repository}, or it is private: then "
                    "set HF_TOKEN to a token that may read it"
                ) from None
            except msgspec.DecodeError as error:
                raise SourceError(
                    f"{self._endpoint} does not answer like Hugging Face ({error}); check "
                    "HF_ENDPOINT"
                ) from error
            more = _NEXT.search(answer.headers.get("Link", ""))
            if more is None:
                break
            url = join(url, more[1])
            if origin_of(url) != origin_of(self._endpoint):  # the token is for nobody else
                raise OriginRefused(
                    f"{self._endpoint} continues its list at {shown(url)}; check HF_ENDPOINT"
                )
        return entries

    def _file(self, repository: str, entry: _Entry) -> RemoteFile:
        path = urllib.parse.quote(entry.path)
        digest = ""
        if entry.lfs is not None and re.fullmatch("[0-9a-f]{64}", entry.lfs.oid):
            digest = f"sha256:{entry.lfs.oid}"
        size = entry.lfs.size if entry.lfs is not None and entry.lfs.size else entry.size
        return RemoteFile(f"{self._endpoint}/{repository}/resolve/main/{path}", size, digest)


def choose(models: Sequence[_Entry], quant: str, repository: str) -> _Entry:
    """The file for a tag; without one the most usual.

    Raises:
      SourceError: there is none, or it is in parts.
    """
    if not models:
        raise SourceError(
            f"{repository} has no GGUF file; look for a repository whose name ends in GGUF"
        )
    if quant:
        found = [e for e in models if _matches(e, quant)]
        if not found:
            there = ", ".join(sorted({_quant_of(e.path) for e in models}))
            raise SourceError(f"{repository} has no file for {quant}; choose one of: {there}")
    else:
        whole = [e for e in models if not _SHARD.search(e.path)]
        found = [_first_of(whole or models, PREFERRED)]
    whole = [e for e in found if not _SHARD.search(e.path)]
    if not whole:
        raise SourceError(
            f"{found[0].path} of {repository} is in several parts, which cannot be joined here; "
            "choose another quantisation, or join them with llama-gguf-split --merge and import "
            "the file"
        )
    return min(whole, key=lambda entry: len(entry.path))


def _first_of(entries: Sequence[_Entry], order: Sequence[str]) -> _Entry:
    for quant in order:
        found = [entry for entry in entries if _matches(entry, quant)]
        if found:
            return min(found, key=lambda entry: len(entry.path))
    return min(entries, key=lambda entry: entry.path)


def _matches(entry: _Entry, quant: str) -> bool:
    file = entry.path.rpartition("/")[2].lower()
    wanted = quant.lower()
    if file in (wanted, f"{wanted}.gguf"):
        return True
    stem = _SHARD.sub("", file).removesuffix(".gguf")
    return re.search(rf"(?:^|[-._]){re.escape(wanted)}$", stem) is not None


def _quant_of(path: str) -> str:
    stem = _SHARD.sub("", path.rpartition("/")[2]).removesuffix(".gguf")
    found = re.search(r"(?:^|[-.])((?:IQ|Q|BF|F|MXFP|TQ)\d[A-Z0-9_]*)$", stem, re.IGNORECASE)
    return found[1].upper() if found else stem


def _is_gguf(entry: _Entry) -> bool:
    return entry.type == "file" and entry.path.lower().endswith(".gguf")


def _is_projector(entry: _Entry) -> bool:
    return "mmproj" in entry.path.rpartition("/")[2].lower()
