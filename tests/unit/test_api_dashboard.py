"""The dashboard: who gets it, what a browser is told of it, and that it keeps to what it may do."""

import re

import msgspec
import pytest

from ollamad.api.app import BASE
from ollamad.api.pages import FILES, POLICY
from tests.fakes.api_client import ApiClient
from tests.fakes.api_services import NODE_1

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
SIGN_OF_LIFE = b"Ollama is running"
PAGE = FILES["dashboard.html"].body.decode()
SCRIPTS = {name: FILES[name].body.decode() for name in ("dashboard.js", "node.js", "chat.js")}
STYLE = FILES["dashboard.css"].body.decode()
ADDRESSES = [f"root:/dashboard/{name}" for name in (*SCRIPTS, "dashboard.css")]


@pytest.mark.parametrize(
    ("accept", "gets_page"),
    [
        (BROWSER, True),
        ("text/html,application/xhtml+xml", True),
        ("Text/HTML,application/xhtml+xml", True),
        ("text/html;q=0.5,application/xhtml+xml", True),
        ("application/json, application/xhtml+xml, text/html;q=0.1", True),
        ("application/xhtml+xml;q=0.9, text/html;q=0.9, */*;q=0.1", True),
        ("text/html", True),
        ("text/html, */*;q=0.1", False),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", False),  # Java, whatever it asks
        (None, False),
        ("", False),
        ("*/*", False),
        ("text/*", False),
        ("text/plain", False),
        ("application/json, text/plain, */*", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=0.3, application/xhtml+xml, text/plain;q=0.7", False),
        ("text/html, application/xhtml+xml, text/plain", False),
        ("application/xhtml+xml", False),
        ("text/html-not, application/xhtml+xml", False),
        ("text/html;q=x, application/xhtml+xml", False),
        (";,;q=,/", False),
    ],
)
async def test_only_who_asks_for_a_page_gets_it(accept: str | None, gets_page: bool) -> None:
    headers = {} if accept is None else {"Accept": accept}
    client = ApiClient(role=None)
    for method in ("GET", "HEAD"):
        answer = await client.call(method, "/", headers=headers)
        assert answer.status == 200
        assert answer.data == (PAGE.encode() if gets_page else SIGN_OF_LIFE)
        kind = "text/html" if gets_page else "text/plain"
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert ("vary" in answer.headers) == ("etag" in answer.headers) == gets_page
        assert answer.headers["cache-control"] == ("no-cache" if gets_page else "no-store")


async def test_the_text_is_the_same_for_who_has_the_page() -> None:
    client = ApiClient(role=None)
    tag = (await client.call("GET", "/", headers={"Accept": BROWSER})).headers["etag"]
    text = await client.call("GET", "/", headers={"If-None-Match": tag})
    assert (text.status, text.data) == (200, SIGN_OF_LIFE)


@pytest.mark.parametrize("address", ["/", *ADDRESSES])
async def test_files_are_for_everybody_and_may_do_little(address: str) -> None:
    client = ApiClient(role=None)
    client.world.cluster.is_caught_up = False  # it can tell that it begins
    answer = await client.call("GET", address, headers={"Accept": BROWSER})
    assert answer.status == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["content-length"] == str(len(answer.data))
    kinds = {"js": "text/javascript", "css": "text/css"}
    kind = kinds.get(address.rpartition(".")[2], "text/html")
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"


@pytest.mark.parametrize("address", ["/", *ADDRESSES])
@pytest.mark.parametrize(
    ("known", "status"),
    [("{}", 304), ("W/{}", 304), ('"other", {}', 304), ("*", 304), ('"other"', 200), ("?", 200)],
)
async def test_a_browser_that_has_a_file_is_told_so(address: str, known: str, status: int) -> None:
    client = ApiClient(role=None)
    first = await client.call("GET", address, headers={"Accept": BROWSER})
    tag = first.headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', tag)
    headers = {"Accept": BROWSER, "If-None-Match": known.format(tag)}
    again = await client.call("GET", address, headers=headers)
    assert again.status == status
    # What a 304 says of the file is what a 200 would.
    varying = ("x-request-id",)
    told = {key: value for key, value in again.headers.items() if key not in varying}
    assert told == {key: value for key, value in first.headers.items() if key not in varying}


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard",
        "/dashboard/",
        "/dashboard/dashboard.html",
        "/dashboard/docs.js",
        "/dashboard/examples.json",
        "/dashboard/../pages.py",
        "/dashboard/%2e%2e/pages.py",
        "/dashboard/..%2f..%2fpages.py",
        "/dashboard//dashboard.js",
        "/dashboard/dashboard.js/",
        "/dashboard/dashboard.js%00",
        "/dashboard/..\\pages.py",
    ],
)
async def test_no_path_leads_to_another_file(path: str) -> None:
    answer = await ApiClient(role=None).call("GET", f"root:{path}", headers={"Accept": BROWSER})
    assert (answer.status, answer.code) == (404, "NOT_FOUND")


async def test_files_are_only_read() -> None:
    for address in ("/", *ADDRESSES):
        answer = await ApiClient(role=None).call("POST", address, {})
        assert (answer.status, answer.code) == (405, "METHOD_NOT_ALLOWED")


async def test_all_that_the_page_refers_to_is_there() -> None:
    client = ApiClient(role="viewer")
    named = re.findall(r'(?:src|href)="([^"]+)"', PAGE)
    imported = re.findall(r'from "\./([^"]+)"', "".join(SCRIPTS.values()))
    addresses = [each for each in named if not each.startswith("data:")]
    addresses += [f"dashboard/{name}" for name in imported]
    assert len(set(addresses)) == 5
    for address in addresses:
        assert (await client.call("GET", f"root:/{address}")).status == 200, address


def test_nothing_in_the_page_is_what_its_policy_forbids() -> None:
    assert "<style" not in PAGE
    assert not re.search(r"<[^>]*\s(?:style|on\w+)\s*=", PAGE)
    for attributes, text in re.findall(r"<script([^>]*)>(.*?)</script>", PAGE, re.DOTALL):
        assert "src=" in attributes
        assert text == ""
    assert "url(" not in STYLE
    assert "@import" not in STYLE


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_sets_texts_as_text_and_asks_no_other_host(name: str) -> None:
    script = SCRIPTS[name]
    sinks = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(")
    for sink in (*sinks, "srcdoc", "localStorage", "document.cookie", ".setAttribute('style"):
        assert sink not in script
    assert not re.search(r"set(?:Timeout|Interval)\(\s*[\"'`]", script)
    assert "//" not in re.sub(r"(?m)(?:^|\s)// .*$", "", script), "an address of another host"
    assert len(script.splitlines()) <= 450


async def test_each_route_that_the_scripts_ask_is_one() -> None:
    document = (await ApiClient().call("GET", "/openapi.json", role="viewer")).json
    asked = re.findall(r'"(api/v1[^"]*)"', "".join(SCRIPTS.values()))
    assert f"{BASE}/chat" in {f"/{path}" for path in asked}
    for path in asked:
        assert f"/{path}" in document["paths"], path


def test_each_element_that_the_scripts_look_for_is_there() -> None:
    looked_for = re.findall(r'(?:byId|fill)\("([^"]+)"', "".join(SCRIPTS.values()))
    assert len(looked_for) > 20
    assert set(looked_for) <= set(re.findall(r' id="([^"]+)"', PAGE))


async def test_the_list_of_models_says_where_they_are_pinned() -> None:
    client = ApiClient(role="viewer")
    models = client.world.cluster.state.models
    for key, known in models.items():
        models[key] = msgspec.structs.replace(known, pinned=(NODE_1,))
    [listed] = (await client.call("GET", "/models")).json["models"]
    assert listed["pinned"] == [NODE_1]
