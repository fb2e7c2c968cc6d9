"""What can go wrong with the store, so that callers can tell a full disk from a bad blob."""


class StoreError(Exception):
    """Base of all errors of the store; the message is fit for people."""


class StoreUnusable(StoreError):
    """The directory cannot be written, made or read; the message names it."""


class StoreFull(StoreError):
    """There is not enough room on the disk; nothing that was there before has been touched."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"not enough room in the model store: {needed_bytes:,} bytes are needed, "
            f"{free_bytes:,} are free (after what is kept back and promised to running "
            "transfers); free some disk, delete a model, or choose another node"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class BeingReceived(StoreError):
    """Another task of this process is receiving that blob."""


class DigestMismatch(StoreError):
    """The bytes are not those that were announced; they have been thrown away."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f'digest mismatch, expected "{expected}", got "{got}"')
        self.expected = expected
        self.got = got


class SizeMismatch(StoreError):
    """More or fewer bytes came than were announced; they have been thrown away."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected {expected:,} bytes, got {got:,}")


class InvalidDigest(StoreError):
    """The text is not `sha256:` and 64 lower-case hex digits."""


class BlobMissing(StoreError):
    """There is no such blob here."""


class PieceMapMissing(StoreError):
    """The blob is here, but has to be read before its pieces are known, which may take minutes."""


class PieceMissing(StoreError):
    """That piece of a partial blob has not arrived yet, or does not exist."""


class PieceCorrupt(StoreError):
    """The bytes are not those of the piece; whoever sent them lied or has a broken disk."""


class PiecesRotten(StoreError):
    """Pieces that were right when they were written are not any more; they count no more."""


class InvalidPieceMap(StoreError):
    """The piece map cannot be that of the blob."""


class ManifestInvalid(StoreError):
    """The manifest is not one that can be used; the message says why."""


class ManifestMissing(StoreError):
    """There is no manifest of that name here."""
