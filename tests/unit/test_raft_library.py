"""The fence knows one version of PySyncObj by its private names."""

import importlib.metadata
import re
from pathlib import Path

import pysyncobj.syncobj
import pytest

from ollamad.raft import private
from ollamad.raft.errors import WrongLibrary

PACKAGE = Path(private.__file__).parent


def test_the_installed_version_is_the_pinned_one() -> None:
    assert importlib.metadata.version("pysyncobj") == private.PINNED_VERSION
    private.check_library()


def test_another_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        WrongLibrary, match=r"0\.3\.18 is installed.*pip install pysyncobj==0\.3\.17"
    ):
        private.check_library("0.3.18")


def test_every_private_name_exists_in_the_library() -> None:
    ours = Path(private.__file__).read_text(encoding="utf-8")
    stock = Path(pysyncobj.syncobj.__file__).read_text(encoding="utf-8")
    overridden = set(re.findall(r"def _SyncObj(__\w+)", ours))
    used = set(re.findall(r"self\._SyncObj(__\w+)", ours))
    assert len(overridden) == 12
    assert len(used) > 20
    assert {name for name in overridden if f"def {name}(self" not in stock} == set()
    fields_or_methods = {
        name for name in used if not re.search(rf"self\.{name} = |def {name}\(self", stock)
    }
    assert fields_or_methods == set()
    # Overriding a method that nobody calls would fence nothing.
    assert {name for name in overridden if f"self.{name}(" not in stock} == set()


@pytest.mark.parametrize(
    "name", ["pickle", "createJournal", "createPoller", "PIPE_NOTIFIER_ENABLED", "Serializer"]
)
def test_replaced_globals_are_what_the_library_still_uses(name: str) -> None:
    stock = Path(pysyncobj.syncobj.__file__).read_text(encoding="utf-8")
    assert len(re.findall(rf"\b{name}\b", stock)) >= 2  # imported, and used
    assert "monotonicTime()" in stock


def test_only_one_file_touches_private_names_and_only_this_package_the_library() -> None:
    touching = {
        path.name
        for path in PACKAGE.glob("*.py")
        if "_SyncObj__" in path.read_text(encoding="utf-8")
    }
    assert touching == {"private.py"}
    for path in PACKAGE.parent.rglob("*.py"):
        if PACKAGE not in path.parents:
            assert not re.search(
                r"^\s*(import|from) pysyncobj", path.read_text(encoding="utf-8"), re.MULTILINE
            ), path


def test_the_library_cannot_unpickle() -> None:
    with pytest.raises(RuntimeError, match=r"pickle\.loads"):
        pysyncobj.syncobj.pickle.loads(b"cos\nsystem\n(S'true'\ntR.")
