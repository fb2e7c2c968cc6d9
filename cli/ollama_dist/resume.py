"""An answer that goes on at another node when the one that we talk to dies.

The request has a name of its own (`request_id`), and its lines count tokens. When the connection
breaks, another node of the cluster is asked for the rest, by that name and the tokens and text
that came. Where these are not known, as behind thoughts, it is asked for the whole answer, and what
was shown is compared and left out. See docs/scheduling.md for what the nodes do.
"""

import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from ollama_dist.address import parse_address
from ollama_dist.errors import ApiError, CliError, NoConnection

if TYPE_CHECKING:
    from ollama_dist.client import Api, Json
    from ollama_dist.session import Session

GIVE_UP_S = 30.0  # the nodes keep an answer for 60
PAUSE_S = 0.5  # between rounds of asking all others
RETRIED = {502, 503, 504}  # a node that cannot help now


@contextmanager
def resumable(session: "Session", url: str, body: "Json") -> Iterator[Iterator["Json"]]:
    """Like `Api.stream`, and as long as any node of the cluster can go on."""
    with closing(_Answer(session, url, body).items()) as items:
        yield items


class _Answer:
    def __init__(self, session: "Session", url: str, body: "Json") -> None:
        self._session = session
        self._url = url
        self._body = body
        self._tokens: int | None = 0  # up to the end of the text; None: not all were counted
        self._text: list[str] = []  # that came, and is shown

    def items(self) -> Generator["Json", None, None]:
        """The objects of the answer, up to and with the one that says `done`; all text comes once.

        Raises:
          CliError: another node was asked, and gives another answer.
        """
        api = self._session.api
        others = _other_addresses(api)
        if others:
            self._body = {**self._body, "request_id": secrets.token_hex(16)}
        try:
            yield from self._from(api, self._body)
            return
        except NoConnection as problem:
            if not others:
                raise
            lost = problem
        give_up_at = time.monotonic() + GIVE_UP_S
        while time.monotonic() < give_up_at:
            for address in others:
                self._session.note(f"{lost.message}; going on at {address}")
                try:
                    with api.at(parse_address(address)) as other:
                        yield from self._rest(other)
                    return
                except NoConnection as problem:
                    lost = problem
                except ApiError as problem:
                    if problem.status == 401:
                        # The token file of a node is for that node alone.
                        hint = "Other nodes do not know you: sign in with `ollama-dist auth login`."
                        raise NoConnection(str(lost), hint=hint, exit_code=1) from None
                    if problem.status not in RETRIED:
                        raise
            time.sleep(PAUSE_S)  # noqa: TID251 - the command line is synchronous
        raise lost

    def _rest(self, api: "Api") -> Iterator["Json"]:
        text = "".join(self._text)
        if self._tokens:
            position = {"resume_from": self._tokens, "received": text}
            try:
                yield from self._from(api, self._body | position)
                return
            except ApiError as problem:
                if problem.code != "RESUME_MISMATCH" or "".join(self._text) != text:
                    raise
        yield from self._from(api, self._body, text)

    def _from(self, api: "Api", body: "Json", owed: str = "") -> Iterator["Json"]:
        """The objects of one node's answer, which begins with `owed`; that is left out."""
        with api.stream(self._url, body) as items:
            for item in items:
                if text := _text_of(item):
                    again = text[: len(owed)]
                    if not owed.startswith(again):
                        raise _another_answer()
                    owed = owed[len(again) :]
                    if not (new := text[len(again) :]):
                        continue
                    _set_text(item, new)
                    self._text.append(new)
                    token = item.get("token")
                    self._tokens = token if isinstance(token, int) else None
                if owed and item.get("done"):
                    raise _another_answer()
                yield item


def _another_answer() -> CliError:
    return CliError(
        "the node was lost, and another one gives another answer; what is shown stands, the rest "
        "is missing",
        hint="Ask again.",
    )


def _other_addresses(api: "Api") -> list[str]:
    """Where else the cluster can be asked; empty if that cannot be found out."""
    try:
        nodes = api.get("/nodes").get("nodes") or []
    except CliError:
        return []
    addresses = [
        str(node["address"])
        for node in nodes
        if node.get("status") != "offline" and node.get("address")
    ]
    scheme = api.address.url.partition("://")[0]
    return [
        f"{scheme}://{address}"
        for address in addresses
        if f"{scheme}://{address}" != api.address.url
    ]


def _text_of(item: "Json") -> str:
    message: Any = item.get("message")
    if isinstance(message, dict):
        return str(message.get("content") or "")
    return str(item.get("response") or "")


def _set_text(item: "Json", text: str) -> None:
    if isinstance(item.get("message"), dict):
        item["message"]["content"] = text
    else:
        item["response"] = text
