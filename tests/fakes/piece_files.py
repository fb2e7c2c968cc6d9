"""Reads pieces of the real store for tests, where nobody minds that it blocks."""

import os

from ollamad.store.pieces import PieceSource


def read_piece(source: PieceSource, index: int) -> bytes:
    """The bytes of a piece, as whoever serves it reads them."""
    with source.open_piece(index) as region:
        return os.pread(region.descriptor, region.length, region.offset)
