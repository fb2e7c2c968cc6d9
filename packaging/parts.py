"""Makes the list of the environment's packages one of what is inside the program (CycloneDX).

`packaging/binary.py` calls it. cyclonedx-py lists an environment, tools and all; here only what
PyInstaller took from it stays, and what it took from elsewhere is added: Python, the start code of
PyInstaller, the engines' C++ code, and the system's shared libraries, by Debian's packages.
"""

import ast
import csv
import json
import platform
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Component = dict[str, Any]

# By Debian's source package. A library that is missing here stops the build: look it up, add it.
LICENCES = {
    "bzip2": "bzip2-1.0.6",
    "gcc-12": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "gcc-14": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "libffi": "MIT",
    "ncurses": "X11-distribute-modifications-variant",
    "openssl": "Apache-2.0",
    "sqlite3": "blessing",
    "util-linux": "BSD-3-Clause",  # of it, libuuid alone
    "xz-utils": "0BSD",  # of it, liblzma alone
    "zlib": "Zlib",
    "expat": "MIT",
}
# How the names of files begin that a licence wants to be passed on.
LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS")
# The engines' wheels do not bring the licence of the C++ code in them.
GGML_AUTHORS = "The ggml authors"
MIT = """\
MIT License

Copyright (c) {}

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


class UnknownPart(Exception):
    """Something is inside whose origin or licence nobody has written down."""


def complete(listed: Path, work: Path, packages: Path) -> None:
    """Rewrite the list `listed`.

    Args:
      work: PyInstaller's folder with the tables of what it took.
      packages: the environment's site-packages.

    Raises:
      UnknownPart: a library of the system has no licence in LICENCES, or belongs to no package.
    """
    bill = json.loads(listed.read_text())
    taken = set(sources(work))
    inside = set(distributions(packages, taken))
    texts = {normalized(name): list(licence_texts(info)) for name, info in infos(packages)}
    components = [
        with_texts(with_core(part, taken), texts.get(normalized(part["name"]), []))
        for part in bill["components"]
        if normalized(part["name"]) in inside
    ]
    start = with_texts(start_code(bill["components"]), texts["pyinstaller"])
    components += [python(), start, *libraries(taken, packages)]
    bill["components"] = sorted(components, key=lambda part: part["name"].lower())
    references = {part["bom-ref"] for part in components} | {
        bill["metadata"]["component"]["bom-ref"]
    }
    bill["dependencies"] = [
        {**entry, "dependsOn": [ref for ref in entry.get("dependsOn", ()) if ref in references]}
        for entry in bill["dependencies"]
        if entry["ref"] in references
    ]
    listed.write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n")


def sources(work: Path) -> Iterator[Path]:
    """The files that PyInstaller took, from its tables."""
    for name in ("PYZ-00.toc", "COLLECT-00.toc"):
        yield from (Path(found) for found in paths(ast.literal_eval((work / name).read_text())))


def paths(table: object) -> Iterator[str]:
    """Every absolute path in nested tuples and lists."""
    if isinstance(table, str):
        if table.startswith("/"):
            yield table
    elif isinstance(table, (tuple, list)):
        for entry in table:
            yield from paths(entry)


def distributions(packages: Path, taken: set[Path]) -> Iterator[str]:
    """Names of the distributions of which more than metadata was taken."""
    for name, info in infos(packages):
        with open(info / "RECORD", newline="") as record:
            files = (packages / row[0] for row in csv.reader(record) if row)
            if any(file in taken for file in files if file.parent.suffix != ".dist-info"):
                yield normalized(name)


def infos(packages: Path) -> Iterator[tuple[str, Path]]:
    """Each distribution's name and metadata."""
    for info in packages.glob("*.dist-info"):
        yield info.name.partition("-")[0], info


def licence_texts(info: Path) -> Iterator[tuple[str, str]]:
    """Name and content of the licences that a distribution brings, and of what goes with them."""
    for path in sorted(info.rglob("*")):
        if path.is_file() and path.name.upper().startswith(LICENCE_FILES):
            yield path.name, path.read_text()


def with_texts(part: Component, texts: list[tuple[str, str]]) -> Component:
    """A part with them as evidence: an expression of several licences has no place for a text.

    (cyclonedx-py leaves out most of them, with or without --gather-license-texts.)
    """
    if not texts:
        return part
    evidence = part.get("evidence", {}).get("licenses", []) + [
        {"license": {"name": name, "text": {"content": text, "contentType": "text/plain"}}}
        for name, text in texts
    ]
    return part | {"evidence": {"licenses": evidence}}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_core(part: Component, taken: set[Path]) -> Component:
    """An engine with the code in its libraries, where there is one for this machine."""
    core = engine_core(part)
    native = any(path.suffix == ".so" and part["name"] in path.parts for path in taken)
    return part | {"components": [core]} if core and native else part


def engine_core(part: Component) -> Component | None:
    """The C++ code that an engine's wheel brings along."""
    if part["name"] == "xllamacpp":
        # The last number of its version is llama.cpp's build.
        build = part["version"].rsplit(".", 1)[1]
        purl = f"pkg:github/ggml-org/llama.cpp@b{build}"
        return component("llama.cpp", f"b{build}", "MIT", purl, MIT.format(GGML_AUTHORS))
    if part["name"] == "ctransformers":
        version = f"as of ctransformers {part['version']}"
        return component("ggml", version, "MIT", text=MIT.format(GGML_AUTHORS))
    return None


def python() -> Component:
    text = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    return component(
        "CPython",
        platform.python_version(),
        "Python-2.0.1",
        f"pkg:generic/python@{platform.python_version()}",
        text.read_text() if text.exists() else None,
    )


def start_code(parts: Iterable[Component]) -> Component:
    """What PyInstaller leaves in each program; its exception allows any licence for the rest."""
    (freezer,) = (part for part in parts if part["name"] == "pyinstaller")
    return component(
        "PyInstaller bootloader",
        freezer["version"],
        "GPL-2.0-or-later WITH Bootloader-exception",
        freezer["purl"],
    )


def libraries(taken: set[Path], packages: Path) -> Iterator[Component]:
    """The system's packages of which a shared library was taken."""
    own = (packages.resolve(), Path(sysconfig.get_path("stdlib")).resolve())
    seen = set()
    for path in sorted(taken):
        real = path.resolve()
        is_python = real.name.startswith("libpython")
        if ".so" not in path.name or is_python or any(real.is_relative_to(one) for one in own):
            continue
        name, source, version, architecture = debian_package(real)
        if name in seen:
            continue
        seen.add(name)
        if source not in LICENCES:
            raise UnknownPart(f"{path} is of {source} {version}: add its licence to LICENCES")
        purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        copyright = Path(f"/usr/share/doc/{name}/copyright")
        text = copyright.read_text() if copyright.exists() else None
        yield component(name, version, LICENCES[source], purl, text)


def debian_package(path: Path) -> tuple[str, str, str, str]:
    """Name, source, version and architecture of the package that a file belongs to."""
    owners = output("dpkg-query", "--search", f"*/{path.name}").splitlines()
    for owner in owners:
        name, _, file = owner.partition(": ")
        if Path(file).resolve() == path:
            wanted = "${Package}\t${source:Package}\t${Version}\t${Architecture}"
            found = output("dpkg-query", "--show", f"--showformat={wanted}", name).split("\t")
            return found[0], found[1], found[2], found[3]
    raise UnknownPart(f"{path} belongs to no package")


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnknownPart(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def component(
    name: str, version: str, licence: str, purl: str = "", text: str | None = None
) -> Component:
    """A part that cyclonedx-py did not list."""
    one = " " not in licence
    made: Component = {
        "type": "library",
        "bom-ref": f"{name}=={version}",
        "name": name,
        "version": version,
        "licenses": [{"license": {"id": licence}} if one else {"expression": licence}],
    }
    if purl:
        made["purl"] = purl
    return made if text is None else with_texts(made, [("copyright", text)])
