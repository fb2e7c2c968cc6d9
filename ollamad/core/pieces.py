"""How a blob is cut into pieces for the transfer between peers, and how pieces are proved.

A piece map lists the sha256 of every piece. Its root, one hash over the map, stands in the
replicated state, so that a map from an untrusted peer is checked before a piece is asked for,
each piece is checked on arrival, and a lying peer is known at the first bad piece. (BitTorrent
does the same with its info-hash; a Merkle tree would let a map come in parts, which pays off
only for maps far larger than the 16 kB that 500 pieces make.)
"""

import hashlib

import msgspec

MIB = 1 << 20
MIN_PIECE_SIZE = 1 * MIB  # smaller ones spend more on requests than on bytes
MAX_PIECE_SIZE = 64 * MIB  # larger ones hold too much in memory and lose too much on a fault
TARGET_PIECES = 500  # keeps a map at 16 kB and a peer busy with what others still lack
HASH_SIZE = 32  # bytes of one sha256
UNKNOWN = bytes(HASH_SIZE)  # stands for a hash that is not known yet


class PieceMap(msgspec.Struct, frozen=True):
    """The pieces of one blob: all `piece_size` bytes long but the last.

    While the blob comes from an origin, hashes that are not known yet are zeros.
    """

    size: int
    piece_size: int
    hashes: bytes  # HASH_SIZE bytes a piece, in order

    def __len__(self) -> int:
        return len(self.hashes) // HASH_SIZE

    def root(self) -> str:
        """The hex sha256 that stands for this map; sizes are part of it."""
        head = self.size.to_bytes(8, "big") + self.piece_size.to_bytes(8, "big")
        return hashlib.sha256(b"ollamad pieces 1\0" + head + self.hashes).hexdigest()

    def hash_of(self, index: int) -> bytes:
        """The sha256 of that piece (32 bytes)."""
        return self.hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE]

    def known(self) -> list[int]:
        """The pieces whose hashes are known."""
        return [index for index in range(len(self)) if self.hash_of(index) != UNKNOWN]

    def length_of(self, index: int) -> int:
        """Bytes of that piece."""
        return min(self.piece_size, self.size - index * self.piece_size)

    def problem(self) -> str | None:
        """What makes this map unusable, for maps that came from elsewhere; None if nothing."""
        if self.size < 0 or not MIN_PIECE_SIZE <= self.piece_size <= MAX_PIECE_SIZE:
            return f"sizes out of range: {self.size} bytes in pieces of {self.piece_size}"
        if len(self.hashes) != HASH_SIZE * piece_count(self.size, self.piece_size):
            return f"{len(self.hashes)} bytes of hashes do not fit {self.size} bytes"
        return None


def piece_size_for(size: int) -> int:
    """The piece size for a blob: the power of two at or above size / 500, within limits."""
    wanted = max(1, -(-size // TARGET_PIECES))
    return min(MAX_PIECE_SIZE, max(MIN_PIECE_SIZE, 1 << (wanted - 1).bit_length()))


def piece_count(size: int, piece_size: int) -> int:
    """Pieces of a blob; an empty blob has none."""
    return -(-size // piece_size)


class PieceHasher:
    """Builds the piece map of a blob, and its sha256, while the bytes pass by once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._piece_size = piece_size_for(size)
        self._whole = hashlib.sha256()
        self._piece = hashlib.sha256()
        self._filled = 0
        self._seen = 0
        self._hashes = bytearray()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes of the blob."""
        view = memoryview(data)
        self._whole.update(view)
        self._seen += len(view)
        while view:
            part = view[: self._piece_size - self._filled]
            self._piece.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self._piece_size:
                self._end_piece()

    def finish(self) -> tuple[str, PieceMap]:
        """The blob's digest (`sha256:…`) and its piece map.

        Raises:
          ValueError: the bytes were fewer or more than announced.
        """
        if self._seen != self._size:
            raise ValueError(f"expected {self._size} bytes, got {self._seen}")
        if self._filled:
            self._end_piece()
        piece_map = PieceMap(self._size, self._piece_size, bytes(self._hashes))
        return f"sha256:{self._whole.hexdigest()}", piece_map

    def _end_piece(self) -> None:
        self._hashes += self._piece.digest()
        self._piece = hashlib.sha256()
        self._filled = 0
