"""Which web pages and desktop apps may call the API from a browser (CORS)."""

import re
from collections.abc import Sequence

# As in Ollama: pages served by this host, and the schemes of apps that have no host.
DEFAULT_ORIGINS = (
    "http://localhost", "https://localhost", "http://localhost:*", "https://localhost:*",
    "http://127.0.0.1", "https://127.0.0.1", "http://127.0.0.1:*", "https://127.0.0.1:*",
    "http://0.0.0.0", "https://0.0.0.0", "http://0.0.0.0:*", "https://0.0.0.0:*",
    "app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*",
)  # fmt: skip

METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
# What a page may read beside the body.
_LIMITS = "RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After"
EXPOSED = f"X-Request-Id, X-Ollamad-Node, {_LIMITS}"
MAX_AGE_S = 12 * 3600  # how long a browser remembers that it may ask


class Origins:
    """Origins that are let in: the default ones and `allowed`, in which `*` stands for anything."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        patterns = [re.escape(text).replace(r"\*", ".*") for text in (*DEFAULT_ORIGINS, *allowed)]
        self._pattern = re.compile("|".join(patterns))

    def allows(self, origin: str) -> bool:
        return self._pattern.fullmatch(origin) is not None

    def headers(self, origin: str) -> tuple[tuple[bytes, bytes], ...]:
        """What an answer to a page of that origin needs; nothing for one that is not let in."""
        if not self.allows(origin):
            return ()
        return (
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED.encode()),
            (b"vary", b"Origin"),
        )


def preflight_headers(asked: str | None) -> dict[str, str]:
    """What a browser is told that asks whether it may send a request with those headers."""
    headers = {
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Max-Age": str(MAX_AGE_S),
    }
    return headers | ({"Access-Control-Allow-Headers": asked} if asked else {})


def parse_origins(text: str) -> tuple[str, ...]:
    """The origins of a setting, separated by commas.

    Raises:
      ValueError: one of them has no scheme.
    """
    origins = tuple(part.strip().rstrip("/") for part in text.split(",") if part.strip())
    for origin in origins:
        if origin != "*" and "://" not in origin:
            raise ValueError(f"{origin!r} is no origin: write SCHEME://HOST, or * for any")
    return origins
