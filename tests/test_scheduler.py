"""The scheduler as arithmetic: sequences are lists of numbers, and a model is whatever says "done"."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.engine.blocks import KVBlocks
from nanochat_ray.engine.scheduler import Scheduler, Slot
from nanochat_ray.model.ragged import BLOCK

CONTEXT = 160


@dataclass(eq=False)
class Sequence:
    """A prompt, and so many tokens that are written behind it; `forced` come together after the first one."""

    prompt: list[int]
    to_write: int = 1
    forced: int = 0
    ids: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.ids = list(self.prompt)
        self.slot = Slot(self)

    @property
    def written(self):
        return len(self.ids) - len(self.prompt)

    @property
    def longest(self):
        return len(self.prompt) + self.to_write + self.forced


class Simulation:
    """Steps with everything checked that holds for every step."""

    def __init__(self, windows=(CONTEXT,), contexts=4.0, max_running=8, step_tokens=32):
        columns = [min(CONTEXT // BLOCK, -(-(window + step_tokens) // BLOCK) + 1) for window in windows]
        blocks = [int(count * contexts) for count in columns]
        self.scheduler = Scheduler(KVBlocks(windows, blocks), max_running, step_tokens)
        self.sequences: list[Sequence] = []
        self.done: list[Sequence] = []

    def add(self, prompt, to_write=1, forced=0):
        self.sequences.append(Sequence(list(prompt), to_write, forced))
        self.scheduler.add(self.sequences[-1].slot)
        return self.sequences[-1]

    def cancel(self, sequence):
        self.scheduler.remove(sequence.slot)
        if sequence in self.sequences:
            self.sequences.remove(sequence)

    def step(self) -> dict[Sequence, int]:
        """One step: how many tokens each sequence read."""
        scheduler = self.scheduler
        running = list(scheduler.running)
        writers = [slot for slot in running if slot.unread == 1]
        turns = scheduler.schedule()
        scheduler.check_integrity()
        counts = {turn.slot.sequence: turn.count for turn in turns}
        assert len(counts) == len(turns), "a sequence has two turns"
        assert sum(counts.values()) <= scheduler.step_tokens
        assert len(scheduler.running) <= scheduler.max_running
        assert {id(s.slot) for s in self.sequences} == {id(s) for s in [*scheduler.running, *scheduler.waiting]}
        assert all(slot.sequence in counts for slot in writers if slot.blocks is not None), "a writer was left out"
        if running:  # the oldest always gets on, so all get on at last
            assert running[0].sequence in counts
            assert scheduler.running[0] is running[0]
        for turn in turns:
            assert 1 <= turn.count <= turn.slot.unread
            self._check_tables(turn)
            scheduler.done(turn)
            if not turn.slot.unread:
                self._write(turn.slot.sequence)
        scheduler.check_integrity()
        return counts

    def run(self) -> int:
        """Steps until all are done; fails where that takes longer than one after the other."""
        scheduler = self.scheduler
        share = max(1, scheduler.step_tokens - scheduler.max_running + 1)  # of a reader beside writers
        bound = sum(-(-s.longest // share) + s.to_write + 1 for s in self.sequences)
        steps = 0
        while self.sequences:
            assert steps < bound, "somebody starves"
            assert self.step(), "nobody gets on although somebody is there"
            steps += 1
        assert scheduler.blocks.held == 0
        assert not scheduler.schedule()
        return steps

    def _check_tables(self, turn):
        for window, table in zip(self.scheduler.blocks.windows, turn.slot.blocks.tables, strict=True):
            first = max(0, turn.slot.stored - window) // BLOCK
            needed = table[first : -(-(turn.slot.stored + turn.count) // BLOCK)]
            assert len(needed) == -(-(turn.slot.stored + turn.count) // BLOCK) - first
            assert min(needed) >= 0, "a block is missing that the step reads or writes"
            assert len(set(needed)) == len(needed)
            assert all(block == -1 for block in table[:first]), "a block that no window reaches is still held"

    def _write(self, sequence):
        more = 1 + (sequence.forced if sequence.written == 0 else 0)
        sequence.ids += [1000 + len(sequence.ids)] * more
        if len(sequence.ids) >= sequence.longest:
            self.cancel(sequence)
            self.done.append(sequence)


def numbers(start, count):
    return range(start, start + count)


# --- whatever comes --------------------------------------------------------------------------------------------------

prompts = st.builds(
    lambda start, shared, own: [*numbers(start, shared), *numbers(500 + 7 * start + own, own)],
    st.sampled_from([0, 0, 0, 100]),  # most begin alike
    st.integers(0, 70),
    st.integers(1, 50),
)
sequences = st.tuples(prompts, st.integers(1, 24), st.sampled_from([0, 0, 12]))
simulations = st.builds(
    Simulation,
    windows=st.sampled_from([(CONTEXT,), (16, CONTEXT), (5, 40, CONTEXT)]),
    contexts=st.floats(1.0, 3.0),
    max_running=st.integers(1, 6),
    step_tokens=st.integers(6, 64),
)


def check_any_arrivals(simulation, arrivals, cancellations):
    cancelled = 0
    for step, arrived in enumerate(arrivals):
        for prompt, to_write, forced in arrived:
            simulation.add(prompt, to_write, forced)
        if step in cancellations and simulation.sequences:
            simulation.cancel(simulation.sequences[cancellations[step] % len(simulation.sequences)])
            simulation.scheduler.check_integrity()
            cancelled += 1
        simulation.step()
    simulation.run()
    assert len(simulation.done) + cancelled == sum(map(len, arrivals))


arrivals = st.lists(st.lists(sequences, max_size=3), min_size=1, max_size=8)
cancellations = st.dictionaries(st.integers(0, 8), st.integers(0, 20), max_size=4)


@given(simulations, arrivals, cancellations)
@settings(max_examples=60)
def test_all_are_served_within_budget_and_memory_whatever_comes_and_goes(simulation, arrivals, cancellations):
    check_any_arrivals(simulation, arrivals, cancellations)


@pytest.mark.slow
@given(simulations, st.lists(st.lists(sequences, max_size=4), min_size=1, max_size=40), cancellations)
@settings(max_examples=600)
def test_all_are_served_in_long_histories(simulation, arrivals, cancellations):
    check_any_arrivals(simulation, arrivals, cancellations)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=2, max_size=8), st.integers(1, 4))
def test_sequences_with_nothing_in_common_begin_in_the_order_of_their_arrival(lengths, max_running):
    simulation = Simulation(max_running=max_running, contexts=float(max_running))
    arrived = [simulation.add(numbers(1000 * i, length), write) for i, (length, write) in enumerate(lengths)]
    begun: list[Sequence] = []
    while simulation.sequences:
        begun += [sequence for sequence in simulation.step() if sequence not in begun]
    assert begun == arrived


# --- one thing at a time ---------------------------------------------------------------------------------------------


def test_a_long_prompt_is_read_in_chunks_beside_those_who_write():
    simulation = Simulation(step_tokens=20)
    writers = [simulation.add([i], to_write=30) for i in range(3)]
    simulation.step()
    reader = simulation.add(numbers(100, 100))
    counts = [simulation.step() for _ in range(6)]
    assert [step[reader] for step in counts] == [17, 17, 17, 17, 17, 15]
    assert all(step[writer] == 1 for step in counts for writer in writers)


def test_what_a_chunk_leaves_of_the_budget_goes_to_the_next():
    simulation = Simulation(step_tokens=20)
    first, second, third = (
        simulation.add(numbers(0, 12)),
        simulation.add(numbers(100, 5)),
        simulation.add(numbers(200, 9)),
    )
    assert simulation.step() == {first: 12, second: 5, third: 3}


def test_forced_tokens_are_read_in_one_step_with_the_token_before_them():
    simulation = Simulation(step_tokens=32)
    other = simulation.add([1], to_write=9)
    caller = simulation.add([2], to_write=3, forced=7)
    assert [simulation.step() for _ in range(3)] == [
        {other: 1, caller: 1},
        {other: 1, caller: 8},
        {other: 1, caller: 1},
    ]


@pytest.mark.parametrize("prompt", [96, 97, 100, 111])
def test_eight_samples_of_a_prompt_compute_what_they_share_once(prompt):
    simulation = Simulation(step_tokens=48, contexts=8.0)
    for _ in range(8):
        simulation.add(numbers(0, prompt), to_write=3)
    read = 0
    while simulation.sequences:
        read += sum(simulation.step().values())
    shared = (prompt - 1) // BLOCK * BLOCK  # the last position is always computed
    assert read == prompt + 7 * (prompt - shared) + 8 * 2
    assert simulation.scheduler.tally.prompt_tokens == 8 * prompt
    assert simulation.scheduler.tally.reused_tokens == 7 * shared


def test_whoever_waits_for_a_beginning_lets_others_pass():
    simulation = Simulation(step_tokens=40)
    reader, waits = (simulation.add(numbers(0, 100)) for _ in range(2))
    other = simulation.add(numbers(500, 30))
    assert [simulation.step() for _ in range(4)] == [
        {reader: 40},
        {reader: 40},
        {reader: 20, other: 20},
        {other: 10, waits: 4},
    ]


def test_whoever_waits_for_a_beginning_goes_on_with_what_there_is_when_its_reader_is_cancelled():
    simulation = Simulation(step_tokens=40)
    reader, waits = (simulation.add(numbers(0, 100)) for _ in range(2))
    simulation.step()
    simulation.cancel(reader)
    assert [simulation.step() for _ in range(2)] == [{waits: 40}, {waits: 28}]


def test_the_youngest_gives_its_blocks_and_comes_back_before_those_who_wait():
    simulation = Simulation(contexts=1.0, max_running=3, step_tokens=64)  # ten blocks
    old, middle, young = (simulation.add(numbers(1000 * i, 30), to_write=70) for i in range(3))
    late = simulation.add(numbers(5000, 10))
    preempted: list[Sequence] = []
    while simulation.sequences:
        if late in simulation.step():
            assert all(s.slot.blocks or s in simulation.done for s in (old, middle, young))
        gone = [s for s in simulation.sequences if s.slot.blocks is None and s.written]
        preempted += [sequence for sequence in gone if sequence not in preempted]
    assert preempted == [young, middle]
    assert [sequence for sequence in simulation.done if sequence is not late] == [old, middle, young]


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks():
    simulation = Simulation(contexts=1.0, max_running=2, step_tokens=64)
    simulation.add(numbers(0, 60), to_write=30)
    simulation.add(numbers(500, 60), to_write=30)
    simulation.run()
    tally = simulation.scheduler.tally
    assert tally.preempted >= 1
    assert tally.reused_tokens > 0


def test_an_admission_does_not_at_once_preempt_those_who_run():
    simulation = Simulation(contexts=1.0, max_running=4, step_tokens=64)
    simulation.add(numbers(0, 50), to_write=30)  # four blocks, soon five, of ten
    simulation.step()
    other = simulation.add(numbers(500, 96), to_write=2)  # six blocks
    for _ in range(10):
        assert other not in simulation.step()
    simulation.run()
    assert simulation.scheduler.tally.preempted == 0


def test_whoever_is_preempted_after_it_has_got_its_turn_has_none():
    simulation = Simulation(contexts=1.0, max_running=2, step_tokens=128)
    old = simulation.add(numbers(0, 60), to_write=20, forced=40)  # after the first token it needs seven blocks
    young = simulation.add(numbers(500, 60), to_write=20)  # and this one has four of ten
    assert simulation.step() == {old: 60, young: 60}
    assert simulation.step() == {old: 41}
    simulation.run()


def test_many_forced_tokens_do_not_hold_up_those_who_write():
    simulation = Simulation(step_tokens=8)
    old, young = simulation.add([1], to_write=2, forced=20), simulation.add([2], to_write=9)
    assert [simulation.step() for _ in range(4)] == [{old: 1, young: 1}, *[{old: 7, young: 1}] * 3]


PHASES = {
    "waiting": lambda sequence: sequence.slot.blocks is None,
    "waiting for a beginning": lambda sequence: sequence.slot.blocks is None,
    "reading": lambda sequence: 0 < sequence.slot.stored < len(sequence.prompt),
    "writing": lambda sequence: sequence.written == 3,
    "preempted": lambda sequence: sequence.written and sequence.slot.blocks is None,
    "done": lambda sequence: len(sequence.ids) == sequence.longest,
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("windows", [(CONTEXT,), (16, CONTEXT)])
def test_a_cancelled_sequence_is_forgotten_in_every_phase(phase, windows):
    simulation = Simulation(windows, contexts=1.0, max_running=2, step_tokens=32)
    first = simulation.add(numbers(0, 60), to_write=90)
    second = simulation.add(numbers(0 if phase == "waiting for a beginning" else 500, 20), to_write=100)
    one = first if phase in ("reading", "writing", "done") else second
    simulation.step()
    for _ in range(200):
        if PHASES[phase](one):
            break
        simulation.step()
    assert PHASES[phase](one)
    assert (one.slot.blocks is None) == (phase not in ("reading", "writing"))
    held = simulation.scheduler.blocks.held
    own = sum(block >= 0 for table in one.slot.blocks.tables for block in table) if one.slot.blocks else 0
    for _ in range(2):  # idempotent
        simulation.cancel(one)
        simulation.scheduler.check_integrity()
        assert simulation.scheduler.blocks.held == held - own
    simulation.run()


def test_blocks_that_a_window_has_left_behind_are_free_again():
    simulation = Simulation(windows=(32, CONTEXT), step_tokens=16)
    sequence = simulation.add(numbers(0, 100), to_write=50)
    narrow, wide = simulation.scheduler.blocks.pools
    held = []
    while sequence in simulation.sequences:
        simulation.step()
        held.append((narrow.held, wide.held))
    assert max(count for count, _ in held) <= (32 + 16) // BLOCK + 1
    assert held[-2] == (3, 10)


def test_without_a_beginning_in_common_nothing_is_reused():
    simulation = Simulation(contexts=4.0)
    for i in range(5):
        simulation.add(numbers(1000 * i, 60), to_write=5)
    simulation.run()
    assert simulation.scheduler.tally.reused_tokens == 0
    assert simulation.scheduler.tally.prompt_tokens == 300
