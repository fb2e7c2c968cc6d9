"""Reads a project's page of a package index, HTML (PEP 503) or JSON (PEP 691), and picks a wheel.

Pure. Follows pip in what is newest and what is passed over, with one exception: a wheel's
Requires-Python does not matter, because the code in it is never run.
"""

import dataclasses
import html.parser
import urllib.parse
from collections.abc import Iterable
from typing import Final

import msgspec
from packaging.utils import (
    InvalidWheelFilename,
    NormalizedName,
    canonicalize_name,
    parse_wheel_filename,
)
from packaging.version import Version

from ollamad.sources.base import SourceError

ACCEPT: Final = (
    "application/vnd.pypi.simple.v1+json, "
    "application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"
)


@dataclasses.dataclass(frozen=True, slots=True)
class IndexFile:
    """One file as an index lists it."""

    name: str
    url: str
    sha256: str  # hex; empty when the index promises none
    size: int | None = None  # bytes
    yanked: bool = False


class _JsonFile(msgspec.Struct):
    filename: str
    url: str
    hashes: dict[str, str] = {}
    size: int | None = None
    yanked: bool | str = False


class _JsonPage(msgspec.Struct):
    files: list[_JsonFile]


def parse_page(content: bytes, content_type: str, url: str) -> list[IndexFile]:
    """The files on a page that was found at `url`.

    A page from the network cannot point at files of this machine.

    Raises:
      SourceError: the page is not what it says it is.
    """
    is_json = content_type.partition(";")[0].strip().endswith("json")
    schemes = ("http", "https", "file") if _scheme(url) == "file" else ("http", "https")
    try:
        files = _parse_json(content, url) if is_json else _parse_html(content, url)
        return [file for file in files if _scheme(file.url) in schemes]
    except ValueError as error:  # also msgspec's, and urllib's for links that are none
        raise SourceError(
            f"the package index sent a page that is broken: {error}; check pip's index-url"
        ) from error


def _parse_json(content: bytes, url: str) -> list[IndexFile]:
    page = msgspec.json.decode(content, type=_JsonPage)
    return [
        IndexFile(
            file.filename,
            urllib.parse.urljoin(url, file.url),
            file.hashes.get("sha256", "").lower(),
            file.size,
            file.yanked is not False,
        )
        for file in page.files
    ]


def _parse_html(content: bytes, url: str) -> list[IndexFile]:
    parser = _PageParser(url)
    parser.feed(content.decode(errors="replace"))
    return parser.files


def _scheme(url: str) -> str:
    return urllib.parse.urlsplit(url).scheme


class _PageParser(html.parser.HTMLParser):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.files: list[IndexFile] = []
        self._base = url

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        target = attributes.get("href")
        if not target:
            return
        if tag == "base":
            self._base = urllib.parse.urljoin(self._base, target)
        elif tag == "a":
            url, _, fragment = urllib.parse.urljoin(self._base, target).partition("#")
            hashes = urllib.parse.parse_qs(fragment)
            self.files.append(
                IndexFile(
                    name=urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1]),
                    url=url,
                    sha256=hashes.get("sha256", [""])[0].lower(),
                    yanked="data-yanked" in attributes,
                )
            )


def choose_wheel(
    files: Iterable[IndexFile], project: str, version: Version | None
) -> tuple[IndexFile, Version]:
    """The newest universal wheel, or that of the version that is asked for.

    Pre-releases count only if there is nothing else or one is asked for; yanked files only if
    their version is asked for.

    Raises:
      SourceError: there is none, or the index promises no sha256 for it.
    """
    wanted = canonicalize_name(project)
    found: dict[Version, list[IndexFile]] = {}
    others = 0
    for file in files:
        wheel_version = _universal_version(file.name, wanted)
        if wheel_version is None:
            others += 1
        elif not file.yanked or wheel_version == version:
            found.setdefault(wheel_version, []).append(file)
    if version is not None and version not in found:
        known = ", ".join(str(v) for v in sorted(found, reverse=True)[:5]) or "none"
        raise SourceError(
            f"the package {project} has no universal wheel of version {version}; it has: {known}. "
            "Choose one of these, or another package"
        )
    if not found:
        raise SourceError(
            f"the package {project} has no universal wheel (py3-none-any) that could hold a model"
            + (f", only {others} other files" if others else "")
            + "; use another package"
        )
    stable = [v for v in found if not v.is_prerelease]
    chosen = version if version is not None else max(stable or found)
    for file in found[chosen]:
        if len(file.sha256) == 64 and all(digit in "0123456789abcdef" for digit in file.sha256):
            return file, chosen
    raise SourceError(
        f"the package index promises no sha256 for {found[chosen][0].name}, so what it sends "
        "could not be verified; use an index that does"
    )


def _universal_version(file_name: str, project: NormalizedName) -> Version | None:
    if not file_name.endswith(".whl"):
        return None
    try:
        name, version, _, tags = parse_wheel_filename(file_name)
    except InvalidWheelFilename:
        return None
    universal = any(
        tag.interpreter.startswith("py3") and tag.abi == "none" and tag.platform == "any"
        for tag in tags
    )
    return version if universal and name == project else None
