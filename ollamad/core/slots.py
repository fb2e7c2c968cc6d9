"""Which slot of a runner a prompt goes to, so that conversations keep what is cached of them. Pure.

llama.cpp itself takes the free slot whose content begins most alike, however little that is: then
conversations with the same system prompt take one slot from each other, and others stay empty.
Here a prompt goes on with a slot only if it keeps most of its content; else it gets an empty one,
or one with less than a block; and only if there is none, one in which little that is likely to be
asked for again is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ollamad.core.prefix import Prompt

# A prompt that keeps so much of what a slot holds, or of the prompt before its last answer, is the
# same conversation. A system prompt in common is rarely that much of one.
SAME = 0.8


@dataclass(slots=True)
class _Slot:
    held: tuple[Prompt, ...] = ()  # what its cache holds, as different requests would name it
    used_at: int = 0  # counts up with each use of any slot
    busy: bool = False
    left: bool = False  # before the answer's end: the runner may be at work there yet

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return max((each.size for each in self.held), default=0)

    @property
    def is_empty(self) -> bool:
        """Whether it holds no whole block."""
        return not any(each.blocks for each in self.held)

    def kept(self, prompt: Prompt) -> float:
        """How much of it the prompt begins with, 0 to 1."""
        parts = (each.covered(shared_blocks(prompt, each)) for each in self.held)
        return max(parts, default=0.0)

    def shared(self, prompt: Prompt) -> int:
        """How many blocks of the prompt it holds."""
        return max((shared_blocks(prompt, each) for each in self.held), default=0)


class Slots:
    """The slots of a runner, which are numbered from 0, and what each holds."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._uses = 0

    def take(self, prompt: Prompt) -> int:
        """The number of the free slot that is best for this prompt, busy from now on.

        Raises:
          ValueError: all are busy.
        """
        free = [number for number, slot in enumerate(self._slots) if not slot.busy]
        best = _best(prompt, [self._slots[number] for number in free])
        self._slots[free[best]].busy = True
        return free[best]

    def take_spare(self, own: int, prompt: Prompt) -> int:
        """The slot where least is lost if something else runs there before this prompt does.

        It is the prompt's own, or a free one, which is busy from now on.
        """

        def lost(number: int) -> float:
            slot = self._slots[number]
            if number == own:
                return prompt.size * prompt.covered(slot.shared(prompt))
            return 0 if slot.is_empty else slot.size

        free = [place for place, slot in enumerate(self._slots) if not (slot.busy or slot.left)]
        spare = min((own, *free), key=lost)
        self._slots[spare].busy = True
        return spare

    def give_back(self, number: int, *held: Prompt, left: bool = False) -> None:
        """A slot is free again, and holds this: the prompt, and the same with the answer to it.

        `left`: that was not waited for, so that the runner may not know yet.
        """
        self._uses += 1
        self._slots[number] = _Slot(held, self._uses, left=left)

    def was_left(self, number: int) -> bool:
        """Whether the last answer there was left before its end."""
        return self._slots[number].left


def _best(prompt: Prompt, free: Sequence[_Slot]) -> int:
    """Which of these slots is best for a prompt."""
    shared = [slot.shared(prompt) for slot in free]
    kept = [slot.kept(prompt) for slot in free]
    same = [place for place, part in enumerate(kept) if part >= SAME]
    if same:
        return max(same, key=lambda place: shared[place])
    empty = [place for place, slot in enumerate(free) if slot.is_empty]
    if empty:
        return empty[0]
    # The longer a conversation rests, the less likely it goes on.
    by_age = sorted(range(len(free)), key=lambda place: free[place].used_at)

    def cost(place: int) -> float:
        lost = free[place].size * (1 - kept[place])
        likely = by_age.index(place) / max(1, len(free) - 1)
        return prompt.size * (1 - prompt.covered(shared[place])) + likely * lost

    return min(by_age, key=cost)


def shared_blocks(one: Prompt, other: Prompt) -> int:
    """How many blocks two prompts begin with alike."""
    count = 0
    for mine, others in zip(one.blocks, other.blocks, strict=False):
        if mine != others:
            break
        count += 1
    return count
