"""Creating, copying and pushing over REST: Modelfiles, files, and what is wrong with them."""

from typing import Any

import pytest
import trio
import trio.testing

from ollamad.api.services import ServiceError
from ollamad.core.description import Changes
from ollamad.core.state import Model
from ollamad.library import ADAPTERS_TIMEOUT_S
from tests.fakes.api_client import Answer, ApiClient
from tests.fakes.api_services import model

DIGEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
MODEL = "smollm2:135m"


async def create(client: ApiClient, **body: Any) -> Answer:
    return await client.call("POST", "/api/v1/models", {"name": "mine", **body})


async def test_a_modelfile_of_a_model() -> None:
    client = ApiClient()
    text = f'FROM {MODEL}\nSYSTEM "Be brief."\nPARAMETER stop a\nREQUIRES 0.12.0'
    answer = await create(client, modelfile=text)
    assert answer.status == 201
    changes = Changes(system="Be brief.", parameters={"stop": ["a"]}, config={"requires": "0.12.0"})
    assert client.world.library.calls == [("derive", "mine:latest", MODEL, changes)]


async def test_a_modelfile_of_files_says_which_it_needs() -> None:
    client = ApiClient()
    text = "FROM ./a.gguf\nFROM mmproj.gguf\nADAPTER ./lora.gguf"
    answer = await create(client, modelfile=text)
    assert (answer.status, answer.json["code"]) == (400, "FILES_NEEDED")
    assert answer.json["details"]["files"] == ["./a.gguf", "mmproj.gguf", "./lora.gguf"]
    files = {"./a.gguf": DIGEST, "mmproj.gguf": OTHER, "./lora.gguf": DIGEST}
    answer = await create(client, modelfile=text, files=files, replace=True)
    assert answer.status == 201
    blobs = {"./a.gguf": DIGEST, "mmproj.gguf": OTHER}
    changes = Changes(adapters=(DIGEST,))
    assert client.world.library.calls == [("create", "mine:latest", blobs, changes, True)]


async def test_a_modelfile_of_a_blob() -> None:
    client = ApiClient()
    assert (await create(client, modelfile=f"FROM @{DIGEST}", replace=True)).status == 201
    [call] = client.world.library.calls
    assert call[:3] == ("create", "mine:latest", {f"@{DIGEST}": DIGEST})


async def test_adapters_may_take_their_time_to_the_node_with_the_base(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = ApiClient(deadline_s=60.0)

    async def derive(name: str, base: str, changes: Changes) -> Model:
        await trio.sleep(ADAPTERS_TIMEOUT_S - 1)
        return model(name)

    client.world.library.derive = derive  # type: ignore[method-assign, assignment]
    text = f"FROM {MODEL}\nADAPTER @{DIGEST}"
    assert (await create(client, modelfile=text)).status == 201


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({"modelfile": "FORM x"}, "INVALID_MODELFILE", "line 1"),
        ({"modelfile": f"FROM {MODEL}\nADAPTER other-model"}, "INVALID_MODELFILE", "ADAPTER"),
        ({"modelfile": f"FROM {MODEL}\nFROM @{DIGEST}"}, "INVALID_MODELFILE", "several FROM"),
        ({"modelfile": f"FROM {MODEL}", "quantize": "q4_0"}, "NOT_SUPPORTED", "llama-quantize"),
        ({"files": {"a": "x"}}, "INVALID_REQUEST", "files.a must be sha256:"),
        ({}, "INVALID_REQUEST", "files must name"),
    ],
)
async def test_what_is_wrong_is_told(body: dict[str, Any], code: str, text: str) -> None:
    client = ApiClient()
    answer = await create(client, **body)
    assert (answer.status, answer.json["code"]) == (400, code)
    assert text in answer.json["error"]
    assert client.world.library.calls == []


async def test_a_name_that_is_taken_needs_replace() -> None:
    client = ApiClient()
    answer = await create(client, name=MODEL, modelfile=f"FROM {MODEL}\nSYSTEM x")
    assert (answer.status, answer.json["code"]) == (409, "MODEL_EXISTS")
    answer = await create(client, name=MODEL, modelfile=f"FROM {MODEL}\nSYSTEM x", replace=True)
    assert answer.status == 201
    answer = await create(client, modelfile="FROM unheard-of")
    assert (answer.status, answer.json["code"]) == (404, "MODEL_NOT_FOUND")


async def test_copy() -> None:
    client = ApiClient()
    url = f"/api/v1/models/{MODEL}/copy"
    assert (await client.call("POST", url, {"destination": "me/other"})).status == 201
    assert client.world.library.calls[0][:3] == ("derive", "me/other:latest", MODEL)
    answer = await client.call("POST", url, {"destination": "a b"})
    assert answer.status == 400


async def test_push() -> None:
    client = ApiClient()
    url = f"/api/v1/models/{MODEL}/push"
    answer = await client.call("POST", url, {"destination": "reg.lan:5000/me/x"})
    assert answer.json["transfer_id"] == "transfer_001"
    assert answer.json["destination"] == "reg.lan:5000/me/x:latest"
    await client.call("POST", url)
    assert client.world.library.calls == [
        ("push", MODEL, "reg.lan:5000/me/x:latest"), ("push", MODEL, MODEL),
    ]  # fmt: skip


async def test_show_tells_everything_or_why_not() -> None:
    client = ApiClient()
    shown = (await client.call("GET", f"/api/v1/models/{MODEL}")).json["model"]
    assert shown["modelfile"].startswith("# A Modelfile")
    assert shown["model_info"]["general.parameter_count"]
    assert {"template", "parameters", "license"} <= shown.keys()
    client.world.library.error = ServiceError(503, "NO_REPLICA", "nobody is there")
    shown = (await client.call("GET", f"/api/v1/models/{MODEL}")).json["model"]
    assert shown["description_error"] == "nobody is there"
    assert shown["engine"] is None
