"""Which sequences take part in the next step, and with how many tokens. No model, no text.

admission   first come, first served, as long as blocks are free for all that a sequence has; a sequence whose
            beginning is being computed by another one waits for that, and lets the ones behind it pass
a step      one token of every sequence that writes, and what is left of `step_tokens` to those that read, oldest
            first: a long prompt is read in chunks beside the replies that are being written
no block    the youngest sequence gives all its blocks back and later reads its tokens again
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from nanochat_ray.engine.blocks import Key, KVBlocks, SequenceBlocks, block_keys
from nanochat_ray.model.ragged import BLOCK


class Schedulable(Protocol):
    """What the scheduler needs of a sequence: its tokens so far."""

    ids: list[int]


@dataclass(eq=False)
class Slot:
    """A sequence's place in the schedule.

    stored   positions whose keys and values are in its blocks
    blocks   None while it waits
    """

    sequence: Schedulable
    stored: int = 0
    blocks: SequenceBlocks | None = None
    keys: list[Key] = field(default_factory=list)

    @property
    def unread(self) -> int:
        """Tokens the model has not read; 1 for a sequence that writes."""
        return len(self.sequence.ids) - self.stored


@dataclass(frozen=True)
class Turn:
    """`count` tokens of a sequence, from position `slot.stored` on, in one step."""

    slot: Slot
    count: int


@dataclass
class Tally:
    """Totals since the start, in tokens and times."""

    prompt_tokens: int = 0  # of admitted sequences, again each time they are admitted
    reused_tokens: int = 0  # of those, found in the cache
    preempted: int = 0


class Scheduler:
    """The queue, the running sequences and their blocks.

    Args:
        max_running: sequences in a step.
        step_tokens: tokens in a step, at least `max_running`; bounds how long the others wait for a chunk of a prompt.
    """

    def __init__(self, blocks: KVBlocks, max_running: int, step_tokens: int) -> None:
        assert step_tokens >= max_running, "a sequence that writes would be left out"
        self.blocks = blocks
        self.max_running = max_running
        self.step_tokens = step_tokens
        self.waiting: deque[Slot] = deque()
        self.running: list[Slot] = []  # in order of admission
        self.tally = Tally()

    def add(self, slot: Slot) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(slot)

    def remove(self, slot: Slot) -> None:
        """Forget a sequence, wherever it is, and free its blocks. Idempotent."""
        if slot.blocks is not None:
            self.blocks.release(slot.blocks)
            slot.blocks = None
            self.running.remove(slot)
        elif slot in self.waiting:
            self.waiting.remove(slot)

    def schedule(self) -> list[Turn]:
        """The next step; blocks for it are taken."""
        turns: dict[Slot, int] = {}
        budget = self.step_tokens
        preempted = self.tally.preempted
        for slot in [slot for slot in self.running if slot.unread == 1]:
            budget -= self._give_turn(slot, 1, turns)
        for slot in [slot for slot in self.running if slot.unread > 1]:
            budget -= self._give_turn(slot, min(slot.unread, budget), turns)
        if self.tally.preempted == preempted:  # else the blocks that were just taken from one would go to the next
            while budget > 0 and (admitted := self._admit()):
                budget -= self._give_turn(admitted, min(admitted.unread, budget), turns)
        return [Turn(slot, count) for slot, count in turns.items()]

    def done(self, turn: Turn) -> None:
        """The model has read a turn's tokens."""
        slot = turn.slot
        assert slot.blocks is not None
        slot.stored += turn.count
        self.blocks.computed(slot.blocks, slot.sequence.ids, slot.stored)

    def check_integrity(self) -> None:
        """Check that running sequences, and no others, hold blocks.

        Raises:
            AssertionError: what is wrong.
        """
        assert all(slot.blocks is None for slot in self.waiting)
        assert all(slot.blocks is not None for slot in self.running)
        self.blocks.check_integrity([slot.blocks for slot in self.running if slot.blocks is not None])

    def _give_turn(self, slot: Slot, count: int, turns: dict[Slot, int]) -> int:
        """Take blocks for `count` more tokens of a sequence, from younger ones if need be; the tokens it may read."""
        if slot.blocks is None or count <= 0:  # preempted by an older one in this very step
            return 0
        while not self.blocks.grow(slot.blocks, slot.stored + count):
            youngest = self.running[-1]
            self._preempt(youngest)
            turns.pop(youngest, None)  # what it had of the budget stays unused in this step
            if youngest is slot:
                return 0
        turns[slot] = count
        return count

    def _preempt(self, slot: Slot) -> None:
        assert slot.blocks is not None
        self.blocks.release(slot.blocks)
        slot.blocks, slot.stored = None, 0
        self.running.remove(slot)
        self.waiting.appendleft(slot)
        self.tally.preempted += 1

    def _admit(self) -> Slot | None:
        """The next waiting sequence that can run now, with the blocks of its beginning."""
        if len(self.running) >= self.max_running:
            return None
        for slot in self.waiting:
            ids = slot.sequence.ids
            slot.keys = block_keys(ids, slot.keys)
            reusable = self.blocks.reusable(slot.keys, len(ids))
            if self.blocks.is_coming(slot.keys, reusable, len(ids)):
                continue
            missing = self.blocks.missing(slot.keys, reusable, len(ids), self.step_tokens)
            # One block more for each that writes: whoever is admitted must not at once preempt those that run.
            if self.running and not self.blocks.have_free(missing, spare=len(self.running)):
                return None
            slot.blocks = self.blocks.start(slot.keys, reusable)
            slot.stored = reusable * BLOCK
            self.waiting.remove(slot)
            self.running.append(slot)
            self.tally.prompt_tokens += len(ids)
            self.tally.reused_tokens += slot.stored
            return slot
        return None
