"""An answer of each operation, as the OpenAPI document shows it.

`python -m tests.fakes.api_examples` asks the API over fakes for all of them and writes
`ollamad/api/static/examples.json`; a test holds that file against the types.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import trio

import ollamad.api
from ollamad.api.reference import BASE, DOCS
from tests.fakes.api_client import ApiClient
from tests.fakes.api_services import NODE_1, PASSWORD

FILE = Path(ollamad.api.__file__).parent / "static" / "examples.json"
MODEL = "smollm2:135m"

# What to put for the arguments of paths, and into bodies, instead of the document's example.
ARGUMENTS = {
    "<reference>": NODE_1,
    "<path:name>": MODEL,
    "<transfer_id>": "transfer_001",
    "<username>": "viewer",
}
BODIES: dict[str, dict[str, Any]] = {
    f"POST {BASE}/auth/login": {"password": PASSWORD},
    f"POST {BASE}/cluster/leave": {"node_id": NODE_1},
}
# Those that need something to be there first, or whose answer is random.
LEFT_OUT = {
    f"POST {BASE}/auth/refresh": f"POST {BASE}/auth/login",
    f"DELETE {BASE}/keys/<key_id>": "",
    f"GET {BASE}/cluster/snapshot": "",
    f"HEAD {BASE}/blobs/<digest>": "",
    f"POST {BASE}/blobs/<digest>": "",
}


def operations() -> list[str]:
    """Those that have a typed answer of which an example is made."""
    return [key for key, doc in DOCS.items() if key not in LEFT_OUT and any(doc.answers.values())]


async def ask(operation: str) -> Any:
    """The answer of an operation, with what is random in it made readable."""
    client = ApiClient()
    library = client.world.library
    done = msgspec.structs.replace(library.transfer_list[0], status="completed", bytes_done=1000)
    if operation.endswith(("/pull", "/push")):
        library.transfer_steps = [done]
    if operation.endswith("/pull"):
        library.ready = False  # else nothing is to be pulled
    method, path = operation.split(" ")
    for argument, value in ARGUMENTS.items():
        path = path.replace(argument, value)
    body = DOCS[operation].example
    if body is not None:
        body = body | BODIES.get(operation, {})
    headers = {}
    if operation.endswith(("/logout", "/me")):  # as somebody who logged in
        headers = {"Authorization": f"Bearer {client.token('admin')}"}
    answer = await client.call(
        method, path.removeprefix(BASE), body, role=None if headers else "admin", headers=headers
    )
    assert answer.status < 300, (operation, answer.data)
    return _readable(answer.json)


def _readable(answer: Any) -> Any:
    shown = copy.deepcopy(answer)
    for name in ("token", "refresh_token"):
        if str(shown.get(name, "")).startswith("ey"):
            shown[name] = "eyJhbGciOiJIUzI1NiIs…"
    if "id" in shown and re.search("[-_][0-9a-f]{16}$", shown["id"]):
        text = json.dumps(shown).replace(shown["id"][-16:], "0123456789abcdef")
        shown = json.loads(text)
    if "key" in shown:
        shown["id"] = "0123456789ab"
        shown["key"] = f"odk_{shown['id']}_…"
    return shown


async def _all() -> dict[str, Any]:
    found = {operation: await ask(operation) for operation in operations()}
    for operation, source in LEFT_OUT.items():
        if source:
            found[operation] = found[source]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    FILE.write_text(json.dumps(trio.run(_all), indent=1, ensure_ascii=False) + "\n")
    print(f"{FILE}: {len(json.loads(FILE.read_text()))} examples")
