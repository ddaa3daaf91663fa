"""Blocks of the KV cache, against a model of sets and dicts that also remembers what was written into each block."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanochat_ray.engine.blocks import BlockPool, KVBlocks, block_keys
from nanochat_ray.model.ragged import BLOCK

# --- one pool --------------------------------------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """`holders` and `found` say what must be; `kept` is the order in which published blocks became nobody's."""

    @initialize(blocks=st.integers(1, 6))
    def begin(self, blocks):
        self.pool = BlockPool(blocks)
        self.holders: Counter[int] = Counter()
        self.found: dict[bytes, int] = {}
        self.kept: list[int] = []

    @precondition(lambda self: self.pool.free)
    @rule()
    def take(self):
        was_blank = self.pool.free > len(self.kept)
        block = self.pool.take()
        assert 0 <= block < self.pool.blocks
        assert not self.holders[block], "a block that somebody holds was given away"
        if was_blank:
            assert block not in self.found.values(), "contents were evicted although a blank block was there"
        else:
            assert block == self.kept.pop(0), "not the least recently used block"
            self.found = {key: other for key, other in self.found.items() if other != block}
        self.holders[block] += 1

    @precondition(lambda self: self.found)
    @rule(data=st.data())
    def share(self, data):
        key = data.draw(st.sampled_from(sorted(self.found)))
        block = self.pool.find(key)
        assert self.pool.kept(block) == (block in self.kept)
        self.pool.share(block)
        self.holders[block] += 1
        self.kept = [other for other in self.kept if other != block]

    @precondition(lambda self: +self.holders)
    @rule(data=st.data())
    def release(self, data):
        block = data.draw(st.sampled_from(sorted(+self.holders)))
        self.pool.release(block)
        self.holders[block] -= 1
        if not self.holders[block] and block in self.found.values():
            self.kept.append(block)

    @precondition(lambda self: +self.holders)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data, key):
        block = data.draw(st.sampled_from(sorted(+self.holders)))
        self.pool.publish(block, key)
        if block not in self.found.values():
            self.found.setdefault(key, block)

    @invariant()
    def agrees(self):
        self.pool.check_integrity(self.holders)
        assert self.pool.held == len(+self.holders)
        assert self.pool.free == self.pool.blocks - self.pool.held
        assert {key: self.pool.find(key) for key in (b"a", b"b", b"c", b"d")} == {
            key: self.found.get(key) for key in (b"a", b"b", b"c", b"d")
        }


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40)


# --- all groups, with sequences --------------------------------------------------------------------------------------


class Sequence:
    """A sequence and what it says it has stored and grown to."""

    def __init__(self, ids, blocks, stored):
        self.ids, self.blocks, self.stored = ids, blocks, stored


class KVMachine(RuleBasedStateMachine):
    """Sequences with common beginnings read, write and leave; `contents` is what is really in the blocks.

    In a real cache a key depends on all tokens up to its position, so the model stores these.
    """

    @initialize(
        windows=st.sampled_from([(), (16,), (5, 32)]),
        narrow=st.tuples(st.integers(3, 6), st.integers(4, 9)),
        wide=st.integers(7, 16),
    )
    def begin(self, windows, narrow, wide):
        sizes = [*narrow[: len(windows)], wide]
        self.kv = KVBlocks([*windows, 100], sizes)
        self.contents = [[[()] * BLOCK for _ in range(size)] for size in sizes]
        self.sequences: list[Sequence] = []

    @precondition(lambda self: len(self.sequences) < 4)
    @rule(start=st.sampled_from("aab"), middle=st.sampled_from("ab"), lengths=st.tuples(*[st.integers(1, 40)] * 2))
    def start(self, start, middle, lengths):
        ids = [ord(letter) for letter, count in zip(start + middle, lengths, strict=True) for _ in range(count)]
        keys = block_keys(ids)
        reusable = self.kv.reusable(keys, len(ids))
        assert reusable == self.most_that_is_there(ids)
        assume(self.kv.have_free(self.kv.missing(keys, reusable, len(ids), step=BLOCK), spare=0))
        self.sequences.append(Sequence(ids, self.kv.start(keys, reusable), reusable * BLOCK))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 40))
    def compute(self, data, count):
        sequence = data.draw(st.sampled_from(self.sequences))
        if sequence.stored == len(sequence.ids):
            sequence.ids = [*sequence.ids, *[ord("z")] * min(count, 100 - len(sequence.ids))]
        until = min(sequence.stored + count, len(sequence.ids))
        tables = [list(table) for table in sequence.blocks.tables]
        held = [self.held_blocks(group) for group in range(len(tables))]
        if not self.kv.grow(sequence.blocks, until):
            assert sequence.blocks.tables == tables, "a refused growth has taken blocks"
            assert any(-(-until // BLOCK) - len(t) > pool.free for t, pool in zip(tables, self.kv.pools, strict=True))
            return
        for group, table in enumerate(sequence.blocks.tables):
            assert table[: len(tables[group])] == tables[group]
            assert not held[group] & set(table[len(tables[group]) :]), "a block that is held was given away"
            for position in range(sequence.stored, until):
                self.contents[group][table[position // BLOCK]][position % BLOCK] = tuple(sequence.ids[: position + 1])
        sequence.stored = until
        self.kv.computed(sequence.blocks, sequence.ids, until)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data):
        sequence = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.kv.release(sequence.blocks)
        assert not any(sequence.blocks.tables)

    @invariant()
    def every_block_that_is_seen_has_the_right_contents(self):
        self.kv.check_integrity([sequence.blocks for sequence in self.sequences])
        for sequence in self.sequences:
            for group, window in enumerate(self.kv.windows):
                table = sequence.blocks.tables[group]
                first = max(0, sequence.stored - window)
                for position in range(first, sequence.stored):
                    block = table[position // BLOCK]
                    assert block >= 0, "a position inside the window has lost its block"
                    assert self.contents[group][block][position % BLOCK] == tuple(sequence.ids[: position + 1])
                assert all(block == -1 for block in table[: first // BLOCK]), "a block no window reaches is still held"

    @invariant()
    def what_is_held_is_what_the_tables_say(self):
        held = [len(self.held_blocks(group)) for group in range(len(self.kv.pools))]
        assert [pool.held for pool in self.kv.pools] == held
        assert self.kv.held == sum(held) <= self.kv.total

    def teardown(self):
        for sequence in getattr(self, "sequences", []):
            self.kv.release(sequence.blocks)
        if hasattr(self, "kv"):
            self.kv.check_integrity([])
            assert self.kv.held == 0

    def held_blocks(self, group):
        return {block for sequence in self.sequences for block in sequence.blocks.tables[group] if block >= 0}

    def most_that_is_there(self, ids):
        """How many blocks at the beginning can be taken over, from what each group's published blocks hold."""

        def is_there(group, column):
            prefix = ids[: (column + 1) * BLOCK]
            block = self.kv.pools[group].find(block_keys(prefix)[column])
            if block is None:
                return False
            whole = [tuple(prefix[: column * BLOCK + offset + 1]) for offset in range(BLOCK)]
            assert self.contents[group][block] == whole, "a key points to contents that were overwritten"
            return True

        for count in range((len(ids) - 1) // BLOCK, 0, -1):
            firsts = [max(0, count * BLOCK - window) // BLOCK for window in self.kv.windows]
            if all(is_there(group, column) for group, first in enumerate(firsts) for column in range(first, count)):
                return count
        return 0


TestKVBlocks = KVMachine.TestCase
TestKVBlocks.settings = settings(max_examples=40, stateful_step_count=40)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [PoolMachine, KVMachine])
def test_long_histories(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=400, stateful_step_count=100, deadline=None))


# --- what else is promised -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 5), st.integers(0, 79))
def test_a_key_stands_for_all_tokens_up_to_the_end_of_its_block(ids, known, changed):
    keys = block_keys(ids)
    assert len(set(keys)) == len(keys) == len(ids) // BLOCK
    assert block_keys(ids, keys[:known]) == keys
    if changed < len(ids):
        others = block_keys([*ids[:changed], 9, *ids[changed + 1 :]])
        same = [a == b for a, b in zip(keys, others, strict=True)]
        assert same == [column < changed // BLOCK for column in range(len(keys))]


@given(
    windows=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    positions=st.integers(1, 200),
    step=st.integers(1, 70),
    shared=st.integers(1, 200),
    data=st.data(),
)
def test_a_sequence_read_in_chunks_takes_no_more_than_its_missing_blocks(windows, positions, step, shared, data):
    kv, ids = KVBlocks([*windows, 200], [40] * (len(windows) + 1)), list(range(positions))
    before = read(kv, ids[: min(shared, positions)])
    if data.draw(st.booleans(), label="the one before has left"):
        kv.release(before)
    keys = block_keys(ids)
    reusable = kv.reusable(keys, positions)
    missing, free = kv.missing(keys, reusable, positions, step), [pool.free for pool in kv.pools]
    blocks, stored = kv.start(keys, reusable), reusable * BLOCK
    while stored < positions:
        stored += data.draw(st.integers(1, min(step, positions - stored)))
        assert kv.grow(blocks, stored)
        taken = [had - pool.free for had, pool in zip(free, kv.pools, strict=True)]
        assert all(count <= most for count, most in zip(taken, missing, strict=True))
        kv.computed(blocks, ids, stored)


def read(kv: KVBlocks, ids: list[int], step: int = BLOCK):
    """A sequence whose tokens are all stored."""
    keys = block_keys(ids)
    reusable = kv.reusable(keys, len(ids))
    blocks = kv.start(keys, reusable)
    for end in [*range(reusable * BLOCK + step, len(ids), step), len(ids)]:
        assert kv.grow(blocks, end)
        kv.computed(blocks, ids, end)
    return blocks


def test_the_end_of_a_sequence_is_evicted_before_its_beginning():
    kv = KVBlocks([200], [6])
    kv.release(read(kv, [1] * 64))
    reusable = []
    for blocks in range(1, 6):
        kv.release(read(kv, [2] * BLOCK * blocks))
        reusable.append(kv.reusable(block_keys([1] * 64), 65))
    assert reusable == [4, 4, 3, 2, 1]


def test_the_last_position_is_always_computed_so_that_there_are_logits():
    kv = KVBlocks([200], [6])
    kv.release(read(kv, [1] * 48))
    assert [kv.reusable(block_keys([1] * count), count) for count in (16, 17, 32, 33, 48, 49)] == [0, 1, 1, 2, 2, 3]


def test_a_short_window_needs_only_its_own_blocks_to_go_on_from_a_prefix():
    kv = KVBlocks([16, 200], [4, 12])
    kv.release(read(kv, [1] * 160))
    assert kv.pools[0].find(block_keys([1] * 160)[0]) is None, "the narrow group has long given this one away"
    assert kv.reusable(block_keys([1] * 160), 161) == 10
    blocks = kv.start(block_keys([1] * 160), 10)
    assert blocks.tables[0][:9] == [-1] * 9
    assert blocks.tables[0][9] >= 0
    assert min(blocks.tables[1]) >= 0


def test_a_beginning_whose_window_is_lost_in_one_group_is_no_use_in_the_others():
    kv, ids = KVBlocks([16, 200], [3, 12]), [1] * 80
    kv.release(read(kv, ids))
    assert kv.reusable(block_keys(ids), 81) == 5
    kv.release(read(kv, [2] * 40))  # evicts all three blocks of the narrow group, none of the wide one
    assert [pool.find(block_keys(ids)[4]) is None for pool in kv.pools] == [True, False]
    assert kv.reusable(block_keys(ids), 81) == 0


def test_others_learn_what_is_coming_until_it_is_there_or_its_reader_leaves():
    kv, keys = KVBlocks([200], [12]), block_keys([1] * 64)
    reader = kv.start(keys, 0)
    assert kv.is_coming(keys, 0, 64)
    assert [kv.is_coming(keys, 3, positions) for positions in (64, 65)] == [False, True]
    assert kv.grow(reader, 40)
    kv.computed(reader, [1] * 64, 40)
    assert (kv.reusable(keys, 64), kv.is_coming(keys, 2, 64)) == (2, True)
    kv.release(reader)
    assert (kv.reusable(keys, 64), kv.is_coming(keys, 2, 64)) == (2, False)


def test_two_that_compute_the_same_do_not_overwrite_each_other():
    kv = KVBlocks([200], [8])
    ids = [1] * 32
    first, second = kv.start(block_keys(ids), 0), kv.start(block_keys(ids), 0)
    for blocks in (first, second):
        assert kv.grow(blocks, 32)
        kv.computed(blocks, ids, 32)
    assert not set(first.tables[0]) & set(second.tables[0])
    assert [kv.pools[0].find(key) for key in block_keys(ids)] == first.tables[0]
    kv.release(first)
    kv.check_integrity([second])
    kv.release(second)
    assert kv.pools[0].free == 8


# --- planted damage --------------------------------------------------------------------------------------------------


def _pool_with_all_kinds() -> tuple[BlockPool, dict[int, int]]:
    """Blocks that are blank, held, held twice and published, kept."""
    pool = BlockPool(6)
    held, shared, kept = pool.take(), pool.take(), pool.take()
    pool.publish(shared, b"shared")
    pool.publish(kept, b"kept")
    pool.share(shared)
    pool.release(kept)
    return pool, {held: 1, shared: 2}


def _damages():
    return {
        "free twice": lambda pool: pool._blank.append(pool._blank[0]),
        "lost": lambda pool: pool._blank.pop(),
        "free although held": lambda pool: pool._blank.append(pool.find(b"shared")),
        "kept although held": lambda pool: pool._kept.update({pool.find(b"shared"): None}),
        "blank and kept": lambda pool: pool._blank.append(pool.find(b"kept")),
        "counted too often": lambda pool: pool._holders.__setitem__(pool.find(b"shared"), 3),
        "counted although nobody's": lambda pool: pool._holders.__setitem__(pool._blank[0], 1),
        "kept but not found": lambda pool: pool._key_of.pop(pool._block_of.pop(b"kept")),
        "key without block": lambda pool: pool._block_of.pop(b"kept"),
        "block without key": lambda pool: pool._key_of.pop(pool.find(b"shared")),
        "key of another block": lambda pool: pool._block_of.update({b"kept": pool.find(b"shared")}),
        "two blocks of one key": lambda pool: pool._key_of.update({0: b"kept"}),
        "two keys of one block": lambda pool: pool._block_of.update({b"other": pool.find(b"kept")}),
        "blank but found": lambda pool: (
            pool._block_of.update({b"blank": pool._blank[0]}),
            pool._key_of.update({pool._blank[0]: b"blank"}),
        ),
    }


@pytest.mark.parametrize("damage", _damages())
def test_the_integrity_check_of_a_pool_finds_planted_damage(damage):
    pool, holders = _pool_with_all_kinds()
    pool.check_integrity(holders)
    _damages()[damage](pool)
    with pytest.raises(AssertionError):
        pool.check_integrity(holders)


def test_the_integrity_check_finds_a_forgotten_sequence_and_a_stale_announcement():
    kv = KVBlocks([16, 200], [8, 8])
    one, other = read(kv, [1] * 40), kv.start(block_keys([2] * 32), 0)
    kv.check_integrity([one, other])
    for sequences in ([one], [other], [one, one, other]):
        with pytest.raises(AssertionError):
            kv.check_integrity(sequences)
    one.tables[1][0], one.tables[1][1] = one.tables[1][0], one.tables[1][0]
    with pytest.raises(AssertionError, match="block"):
        kv.check_integrity([one, other])


def test_blocks_follow_each_other_from_the_smallest_number():
    pool = BlockPool(5)
    assert all(b == a + 1 for a, b in pairwise(pool.take() for _ in range(5)))
