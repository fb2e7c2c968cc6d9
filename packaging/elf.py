"""Which machine a library is for; `packaging/ollamad.spec` leaves those of other machines out."""

import sys
from pathlib import Path

MAGIC = b"\x7fELF"
LITTLE_ENDIAN = 1


def machine(path: Path) -> int | None:
    """The machine's number in an ELF file (62: x86-64, 183: arm64); None if it is none."""
    with open(path, "rb") as file:
        head = file.read(20)
    if len(head) < 20 or not head.startswith(MAGIC):
        return None
    return int.from_bytes(head[18:20], "little" if head[5] == LITTLE_ENDIAN else "big")


def is_for_this_machine(path: Path) -> bool:
    """Whether the Python that runs this could load the library."""
    return machine(path) == machine(Path(sys.executable).resolve())
