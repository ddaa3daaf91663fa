"""Who holds which block of the KV cache: counts, reuse of equal beginnings, eviction. Integers and keys, no tensors.

A full block is *published* under a key that stands for all tokens up to its end. A block that nobody holds keeps its
contents until it is needed for something else, least recently used first, so that a later sequence with the same
beginning finds it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from nanochat_ray.model.ragged import BLOCK

Key = bytes


def block_keys(ids: Sequence[int], known: Sequence[Key] = ()) -> list[Key]:
    """Keys of all full blocks of a sequence; those that are known already are not computed again."""
    keys = list(known)
    for start in range(len(keys) * BLOCK, len(ids) - BLOCK + 1, BLOCK):
        before = keys[-1] if keys else b""
        tokens = np.asarray(ids[start : start + BLOCK], dtype=np.int32).tobytes()
        keys.append(hashlib.blake2b(before + tokens, digest_size=16).digest())
    return keys


class BlockPool:
    """The blocks of one window group, numbered 0 … blocks − 1."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._holders = [0] * blocks
        self._blank = list(range(blocks - 1, -1, -1))  # nobody's, without contents that could be asked for
        self._kept: OrderedDict[int, None] = OrderedDict()  # nobody's, published; the next to be evicted first
        self._key_of: dict[int, Key] = {}
        self._block_of: dict[Key, int] = {}

    @property
    def free(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._blank) + len(self._kept)

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return self.blocks - self.free

    def take(self) -> int:
        """A block for new contents, held once. There must be a free one."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._holders[block] = 1
        return block

    def find(self, key: Key) -> int | None:
        """The block that is published under a key."""
        return self._block_of.get(key)

    def share(self, block: int) -> None:
        """Hold a published block once more."""
        self._kept.pop(block, None)
        self._holders[block] += 1

    def kept(self, block: int) -> bool:
        """Whether nobody holds this published block, so that sharing it takes one from `free`."""
        return block in self._kept

    def release(self, block: int) -> None:
        """Hold a block once less."""
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._blank.append(block)

    def publish(self, block: int, key: Key) -> None:
        """The contents of a held block are complete. If the key is published already, the first block keeps it."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def check_integrity(self, holders: Mapping[int, int]) -> None:
        """Check every count against what the holders say they hold.

        Raises:
            AssertionError: which block is wrong.
        """
        assert len(set(self._blank)) == len(self._blank), "a block is free twice"
        free = {*self._blank, *self._kept}
        assert len(free) == self.free, "a block is both blank and kept"
        for block in range(self.blocks):
            count = holders.get(block, 0)
            assert self._holders[block] == count, f"block {block}: held {self._holders[block]} times, not {count}"
            assert (block in free) == (count == 0), f"block {block} is held {count} times and free: {block in free}"
        found = {(block, key) for key, block in self._block_of.items()}
        assert found == set(self._key_of.items()), "keys and blocks disagree"
        assert all(block in self._key_of for block in self._kept), "a kept block cannot be found"
        assert not any(block in self._key_of for block in self._blank), "a blank block can be found"


class SequenceBlocks:
    """The blocks of one sequence: per group the block of every 16 positions, −1 where no window reaches any more."""

    def __init__(self, groups: int) -> None:
        self.tables: list[list[int]] = [[] for _ in range(groups)]
        self.keys: list[Key] = []  # of its full blocks
        self.published = 0  # so many of them are complete and published
        self.announced = 0  # others may wait for so many of them
        self._dropped = [0] * groups  # so many at the beginning of each table are −1

    def drop_before(self, group: int, column: int, pool: BlockPool) -> None:
        """Give back the blocks in front of a column."""
        table = self.tables[group]
        for index in range(self._dropped[group], column):
            if table[index] >= 0:
                pool.release(table[index])
                table[index] = -1
        self._dropped[group] = max(self._dropped[group], column)


class KVBlocks:
    """The blocks of all groups, and the sequences that hold them.

    Args:
        windows: of each group, in positions.
        blocks: of each group.
    """

    def __init__(self, windows: Sequence[int], blocks: Sequence[int]) -> None:
        self.windows = tuple(windows)
        self.pools = [BlockPool(count) for count in blocks]
        self._coming: dict[Key, int] = {}  # keys that running sequences are about to publish, and how many do

    @property
    def total(self) -> int:
        return sum(pool.blocks for pool in self.pools)

    @property
    def held(self) -> int:
        return sum(pool.held for pool in self.pools)

    def reusable(self, keys: Sequence[Key], positions: int) -> int:
        """How many blocks at the beginning of a sequence need not be computed, at least one position excepted."""
        most = min(len(keys), (positions - 1) // BLOCK)
        narrow = []
        for group, window in enumerate(self.windows):
            if window < positions:
                narrow.append(group)
            else:
                most = next((i for i in range(most) if self.pools[group].find(keys[i]) is None), most)
        for count in range(most, 0, -1):
            if all(self._reaches_back(group, keys, count) for group in narrow):
                return count
        return 0

    def is_coming(self, keys: Sequence[Key], reusable: int, positions: int) -> bool:
        """Whether a running sequence is computing the block behind the reusable ones, so that waiting for it pays.

        It does not if that is a sequence's last block, which has the one position that must be computed.
        """
        return reusable < min(len(keys), (positions - 1) // BLOCK) and keys[reusable] in self._coming

    def missing(self, keys: Sequence[Key], reusable: int, positions: int, step: int) -> list[int]:
        """Per group: free blocks that a sequence takes until all its positions are computed, `step` at a time."""
        columns = _columns(positions)
        wanted = []
        for group, window in enumerate(self.windows):
            pool, first = self.pools[group], self._first_column(window, reusable * BLOCK)
            again = (pool.find(keys[i]) for i in range(first, reusable))
            revived = sum(block is not None and pool.kept(block) for block in again)
            wanted.append(revived + min(columns - reusable, _columns(window + step) + 1))
        return wanted

    def have_free(self, wanted: Sequence[int], spare: int) -> bool:
        """Whether every group has so many free blocks, and `spare` more."""
        return all(count + spare <= pool.free for count, pool in zip(wanted, self.pools, strict=True))

    def start(self, keys: list[Key], reusable: int) -> SequenceBlocks:
        """A sequence that holds the reusable blocks at its beginning, and tells others that it computes the rest."""
        blocks = SequenceBlocks(len(self.pools))
        for group, window in enumerate(self.windows):
            first = self._first_column(window, reusable * BLOCK)
            table = [-1] * first
            for key in keys[first:reusable]:
                block = self.pools[group].find(key)
                assert block is not None
                self.pools[group].share(block)
                table.append(block)
            blocks.tables[group] = table
            blocks._dropped[group] = first
        blocks.keys, blocks.published, blocks.announced = list(keys), reusable, len(keys)
        for key in keys[reusable:]:
            self._coming[key] = self._coming.get(key, 0) + 1
        return blocks

    def grow(self, blocks: SequenceBlocks, positions: int) -> bool:
        """Take blocks for positions 0 … positions − 1, in all groups or, if there are too few, in none."""
        columns = _columns(positions)
        if any(columns - len(table) > pool.free for table, pool in zip(blocks.tables, self.pools, strict=True)):
            return False
        for table, pool in zip(blocks.tables, self.pools, strict=True):
            while len(table) < columns:
                table.append(pool.take())
        return True

    def computed(self, blocks: SequenceBlocks, ids: Sequence[int], positions: int) -> None:
        """Positions 0 … positions − 1 are stored: publish full blocks, give back those that no window reaches."""
        full = positions // BLOCK
        if full > blocks.published:
            if full > len(blocks.keys):
                blocks.keys = block_keys(ids[: full * BLOCK], blocks.keys)
            self._no_longer_coming(blocks.keys[blocks.published : min(full, blocks.announced)])
            for column in range(blocks.published, full):
                for table, pool in zip(blocks.tables, self.pools, strict=True):
                    pool.publish(table[column], blocks.keys[column])
            blocks.published = full
        for group, window in enumerate(self.windows):
            blocks.drop_before(group, self._first_column(window, positions), self.pools[group])

    def release(self, blocks: SequenceBlocks) -> None:
        """Give all blocks back. The end of the sequence is evicted before its beginning."""
        for table, pool in zip(blocks.tables, self.pools, strict=True):
            for block in reversed(table):
                if block >= 0:
                    pool.release(block)
            table.clear()
        self._no_longer_coming(blocks.keys[blocks.published : blocks.announced])

    def check_integrity(self, sequences: Iterable[SequenceBlocks]) -> None:
        """Check that exactly these sequences hold what is held.

        Raises:
            AssertionError: what is wrong.
        """
        holders: list[dict[int, int]] = [{} for _ in self.pools]
        coming: dict[Key, int] = {}
        for blocks in sequences:
            for held, table in zip(holders, blocks.tables, strict=True):
                for block in table:
                    if block >= 0:
                        held[block] = held.get(block, 0) + 1
            for key in blocks.keys[blocks.published : blocks.announced]:
                coming[key] = coming.get(key, 0) + 1
        for pool, held in zip(self.pools, holders, strict=True):
            pool.check_integrity(held)
        assert coming == self._coming, "keys are announced that nobody computes"

    def _first_column(self, window: int, positions: int) -> int:
        """The first column that the position behind `positions` stored ones, or a later one, can see."""
        return max(0, positions - window) // BLOCK

    def _reaches_back(self, group: int, keys: Sequence[Key], count: int) -> bool:
        first = self._first_column(self.windows[group], count * BLOCK)
        return all(self.pools[group].find(key) is not None for key in keys[first:count])

    def _no_longer_coming(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]


def _columns(positions: int) -> int:
    return -(-positions // BLOCK)
