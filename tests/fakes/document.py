"""The user's document, docs/spec/api.md: its JSON examples, and what live JSON lacks of them."""

import json
import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "spec" / "api.md"

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def read_examples() -> dict[str, dict[str, Any]]:
    """Route -> {"Request Body": …, "Response": …} as the document prints them."""
    examples: dict[str, dict[str, Any]] = {}
    text = DOCUMENT.read_text()
    for section in re.split(r"^#### (?=(?:GET|POST|PUT|DELETE) )", text, flags=re.MULTILINE)[1:]:
        route = section.split("\n", 1)[0].strip()
        found = re.findall(
            r"\*\*(Request Body|Response):\*\*\n```json\n(.*?)```", section, flags=re.DOTALL
        )
        examples[route] = {label: parse(block) for label, block in found}
    return examples


def parse(block: str) -> Any:
    """JSON with the document's comments and its `...`."""
    block = re.sub(r"//[^\n\"]*$", "", block, flags=re.MULTILINE)
    return json.loads(block.replace(", ...]", "]"))


def differences(example: Any, actual: Any, path: str = "$") -> list[str]:
    """Where the actual JSON lacks a key of the example or has another type."""
    if isinstance(example, dict):
        if not isinstance(actual, dict):
            return [f"{path}: {type(actual).__name__} is no object"]
        found = []
        for key, value in example.items():
            if key in actual:
                found += differences(value, actual[key], f"{path}.{key}")
            else:
                found.append(f"{path}.{key} is missing")
        return found
    if isinstance(example, list):
        if not isinstance(actual, list):
            return [f"{path}: {type(actual).__name__} is no list"]
        if example and not actual:
            return [f"{path} is empty, so it proves nothing"]
        return [
            d
            for i, item in enumerate(actual)
            for d in differences(example[0], item, f"{path}[{i}]")
        ]
    # An example's float may be written as a whole number by JSON writers, but not the reverse.
    wanted = (int, float) if type(example) is float else type(example)
    if not isinstance(actual, wanted) or (isinstance(actual, bool) != isinstance(example, bool)):
        return [f"{path}: {actual!r} is no {type(example).__name__}"]
    is_time = isinstance(example, str) and TIME.fullmatch(example)
    if is_time and actual != "unknown" and not TIME.fullmatch(actual):
        return [f"{path}: {actual!r} is no time in UTC"]
    return []


def read_socket_examples() -> tuple[dict[str, Any], dict[str, Any]]:
    """The messages of the WebSocket by their headings: the client's, and the server's."""
    section = DOCUMENT.read_text().split("## WebSocket API", 1)[1].split("\n## ", 1)[0]
    of_client, of_server = section.split("#### Server to Client", 1)
    found = []
    for part in (of_client.split("#### Client to Server", 1)[1], of_server):
        blocks = re.findall(r"\*\*(.*?):\*\*\n```json\n(.*?)```", part, flags=re.DOTALL)
        found.append({heading: parse(block) for heading, block in blocks})
    return found[0], found[1]
