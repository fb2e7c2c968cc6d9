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
    components = [
        part | {"components": [core]} if (core := engine_core(part)) else part
        for part in bill["components"]
        if normalized(part["name"]) in inside
    ]
    components += [python(), start_code(bill["components"]), *libraries(taken, packages)]
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
    for info in packages.glob("*.dist-info"):
        with open(info / "RECORD", newline="") as record:
            files = (packages / row[0] for row in csv.reader(record) if row)
            if any(file in taken for file in files if file.parent.suffix != ".dist-info"):
                yield normalized(info.name.partition("-")[0])


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def engine_core(part: Component) -> Component | None:
    """The C++ code that an engine's wheel brings along."""
    if part["name"] == "xllamacpp":
        # The last number of its version is llama.cpp's build.
        build = part["version"].rsplit(".", 1)[1]
        return component("llama.cpp", f"b{build}", "MIT", f"pkg:github/ggml-org/llama.cpp@b{build}")
    if part["name"] == "ctransformers":
        return component("ggml", f"as of ctransformers {part['version']}", "MIT")
    return None


def python() -> Component:
    text = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    return component(
        "CPython",
        platform.python_version(),
        "Python-2.0.1",
        f"pkg:generic/python@{platform.python_version()}",
        text,
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
        text = Path(f"/usr/share/doc/{name}/copyright")
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
    name: str, version: str, licence: str, purl: str = "", text: Path | None = None
) -> Component:
    """A part that cyclonedx-py did not list."""
    choice: dict[str, Any] = {"expression": licence}
    if " " not in licence:
        choice = {"license": {"id": licence}}
        if text is not None and text.exists():
            content = {"content": text.read_text(), "contentType": "text/plain"}
            choice["license"]["text"] = content
    made: Component = {
        "type": "library",
        "bom-ref": f"{name}=={version}",
        "name": name,
        "version": version,
        "licenses": [choice],
    }
    return made | ({"purl": purl} if purl else {})
