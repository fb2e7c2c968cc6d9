"""What waits for a WebSocket whose reader is slower than what there is to tell.

Bounded in messages and in bytes. What is out of date goes first: of messages with the same key
only the newest waits (the metrics of five seconds ago are of no use), and when there are too many
in all, old ones with a key go before those without. How many were dropped is told as soon as
something can be told. Knows neither sockets nor what a message says.
"""

from collections.abc import Callable

# A burst (a cluster that comes back, a model that is deleted everywhere) fits; more of a backlog
# than this is no news any more. 5,000 readers that do not read take 640 MB at the very most.
MAX_MESSAGES = 256
MAX_BYTES = 128 << 10


class Outbox:
    """Frames that wait, oldest first. `notice` makes the frame that tells of dropped ones."""

    __slots__ = ("_bytes", "_dropped", "_frames", "_keyed", "_notice", "_number")

    def __init__(self, notice: Callable[[int], bytes]) -> None:
        self._notice = notice
        self._number = 0
        self._frames: dict[int, bytes] = {}
        self._keyed: dict[str, int] = {}  # key -> number of its frame, the oldest first
        self._bytes = 0
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._frames) + (self._dropped > 0)

    def put(self, frame: bytes, key: str = "") -> None:
        """Add a frame; one of the same key that still waits is dropped for it."""
        if key and key in self._keyed:
            self._drop(self._keyed.pop(key))
        self._number += 1
        self._frames[self._number] = frame
        self._bytes += len(frame)
        if key:
            self._keyed[key] = self._number
        while len(self._frames) > MAX_MESSAGES or self._bytes > MAX_BYTES:
            self._drop_least()

    def pop(self) -> bytes:
        """Take the next frame; first the notice, if any were dropped.

        Raises:
          IndexError: there is none.
        """
        if self._dropped:
            notice = self._notice(self._dropped)
            self._dropped = 0
            return notice
        if not self._frames:
            raise IndexError("nothing waits")
        number = next(iter(self._frames))
        frame = self._frames.pop(number)
        self._bytes -= len(frame)
        for key, of_key in self._keyed.items():
            if of_key == number:
                del self._keyed[key]
                break
        return frame

    def drop_all(self) -> None:
        """Drop all that waits; only the notice is left."""
        self._dropped += len(self._frames)
        self._frames.clear()
        self._keyed.clear()
        self._bytes = 0

    def _drop_least(self) -> None:
        if self._keyed:
            self._drop(self._keyed.pop(next(iter(self._keyed))))
        else:
            self._drop(next(iter(self._frames)))

    def _drop(self, number: int) -> None:
        self._bytes -= len(self._frames.pop(number))
        self._dropped += 1
