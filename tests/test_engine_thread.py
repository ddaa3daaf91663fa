"""The engine's thread: whoever submits from wherever gets every piece once, and nothing is left behind."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from nanochat_ray.engine import worker
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.engine.worker import Ended, EngineThread, Full
from nanochat_ray.errors import UserError
from nanochat_ray.precedence import give_way, take_precedence
from tests.exact_model import TOKENIZER, ExactModel, slow_reply
from tests.fakes import CRASH, ScriptedModel, script

END = TOKENIZER.special("assistant_end")
GREEDY = SamplingParams(temperature=0.0, max_tokens=2000)


def prompt(question: str) -> list[int]:
    special = TOKENIZER.special
    return [special("user_start"), *question.encode(), special("user_end"), special("assistant_start")]


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.0005)


class GatedModel(ScriptedModel):
    """Makes only the steps that it is allowed."""

    def __post_init__(self):
        super().__post_init__()
        self.allowed = threading.Semaphore(0)
        self.waits = threading.Event()  # in a step that is not allowed yet

    def forward(self, batch):
        self.waits.set()
        self.allowed.acquire()
        self.waits.clear()
        return super().forward(batch)


class PolicyModel(ScriptedModel):
    """Notes how the threads that make its steps are scheduled."""

    def __post_init__(self):
        super().__post_init__()
        self.policies = set()

    def forward(self, batch):
        self.policies.add(os.sched_getscheduler(0))
        return super().forward(batch)


class Inbox:
    """What is delivered, by ticket and as it came."""

    def __init__(self):
        self.deliveries = []

    def __call__(self, delivered):
        self.deliveries.append(list(delivered))

    def of(self, ticket):
        """The pieces of a reply, and the exception that ended it."""
        outcomes = [outcome for delivered in self.deliveries for other, outcome in delivered if other is ticket]
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert errors in ([], outcomes[-1:])
        pieces = [piece for outcome in outcomes if isinstance(outcome, list) for piece in outcome]
        return pieces, errors[0] if errors else None

    def over(self, ticket):
        pieces, error = self.of(ticket)
        return error is not None or (pieces and pieces[-1].finish)

    def text(self, ticket):
        return "".join(piece.text for piece in self.of(ticket)[0])


@pytest.fixture
def start():
    started: list[EngineThread] = []

    def begin(model, max_waiting=100, deliver=None, **options):
        inbox = Inbox()
        started.append(EngineThread(Engine(model, TOKENIZER, **options), deliver or inbox, max_waiting))
        return started[-1], inbox

    yield begin
    for thread in started:
        if isinstance(thread.engine.model, GatedModel):
            thread.engine.model.allowed.release(10_000)
        thread.close()


def scripted(*parts, **options) -> ScriptedModel:
    return ScriptedModel({"": script(*parts)}, **options)


def gated(*parts) -> GatedModel:
    return GatedModel({"": script(*parts)})


def test_replies_of_many_threads_are_each_its_own(start):
    thread, inbox = start(ExactModel(windows=(16,)), max_running=5, step_tokens=24)
    wanted = {}

    def submit(number):
        for i in range(6):
            params = SamplingParams(temperature=1.0, seed=100 * number + i, max_tokens=20)
            wanted[thread.submit([65] * (10 + i), params)] = list(slow_reply([65] * (10 + i), params))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    until(lambda: thread.active == 0)
    assert len(wanted) == 24
    assert all(inbox.of(ticket) == (pieces, None) for ticket, pieces in wanted.items())
    assert thread.counters.completed == 24
    assert thread.counters.generated_tokens == sum(len(pieces) for pieces in wanted.values())
    assert thread.engine.scheduler.blocks.held == 0


def test_each_step_is_delivered_at_once_and_brings_each_reply_one_outcome(start):
    model = gated("x" * 12)
    thread, inbox = start(model)
    tickets = [thread.submit(prompt("q"), GREEDY) for _ in range(3)]
    model.allowed.release(100)
    until(lambda: all(inbox.over(ticket) for ticket in tickets))
    assert len(inbox.deliveries) == model.steps <= 14  # the first may have begun alone
    for delivered in inbox.deliveries:
        assert max(Counter(id(ticket) for ticket, _ in delivered).values()) == 1
    assert sum(len(delivered) == 3 for delivered in inbox.deliveries) >= 12, "replies do not take turns"
    assert [inbox.text(ticket) for ticket in tickets] == ["x" * 12] * 3


def test_too_many_are_refused_before_anything_begins(start):
    model = gated("x" * 50)
    thread, _ = start(model, max_waiting=1, max_running=2)
    tickets = [thread.submit(prompt("q"), GREEDY) for _ in range(3)]
    for _ in range(2):
        with pytest.raises(Full, match="3 replies"):
            thread.submit(prompt("q"), GREEDY)
    assert thread.counters.refused == 2
    assert thread.active == 3
    thread.cancel(tickets[0])
    tickets.append(thread.submit(prompt("q"), GREEDY))
    with pytest.raises(UserError, match="empty"):
        thread.submit([], GREEDY)
    assert (thread.counters.refused, thread.active) == (2, 3)


def test_a_cancelled_reply_is_gone_after_the_present_step(start):
    model = gated("x" * 100)
    thread, inbox = start(model)
    ticket, other = (thread.submit(prompt(q), GREEDY) for q in ("one", "another"))
    model.allowed.release(4)
    until(lambda: model.steps == 4 and model.waits.is_set())
    before = len(inbox.of(ticket)[0])
    thread.cancel(ticket)
    thread.cancel(ticket)
    model.allowed.release()
    until(lambda: model.steps == 5 and model.waits.is_set())
    assert ticket.reply.slot.blocks is None
    assert thread.engine.scheduler.running == [other.reply.slot]
    assert len(inbox.of(ticket)[0]) == before
    assert (thread.counters.cancelled, thread.active) == (1, 1)
    model.allowed.release(200)
    until(lambda: inbox.over(other))
    assert len(inbox.of(ticket)[0]) == before
    assert thread.engine.scheduler.blocks.held == 0


def test_replies_that_wait_are_cancelled_as_well_and_the_thread_goes_to_sleep(start):
    model = gated("x" * 100)
    thread, inbox = start(model, max_running=1)
    tickets = [thread.submit(prompt("q"), GREEDY) for _ in range(4)]
    until(model.waits.is_set)
    for ticket in reversed(tickets):
        thread.cancel(ticket)
    model.allowed.release()
    until(lambda: not thread.engine.busy)
    assert model.steps == 1
    assert inbox.deliveries == []
    assert thread.counters.cancelled == 4
    late = thread.submit(prompt("q"), SamplingParams(max_tokens=2))
    model.allowed.release(10)
    until(lambda: inbox.over(late))


def test_how_many_are_ahead_goes_down_to_none(start):
    model = gated("ab")  # and the end: three steps each
    thread, _ = start(model, max_running=1)
    tickets = [thread.submit(prompt("q"), GREEDY) for _ in range(4)]
    for steps, ahead in ((0, [0, 0, 1, 2]), (3, [0, 0, 0, 1]), (6, [0, 0, 0, 0])):
        until(lambda steps=steps: model.steps == steps and model.waits.is_set())
        assert [thread.ahead(ticket) for ticket in tickets] == ahead
        assert (thread.stats()["running"], thread.stats()["waiting"]) == (1, 3 - steps // 3)
        model.allowed.release(3)


def test_a_reply_that_was_over_before_it_began_is_delivered_and_counted(start):
    thread, inbox = start(scripted("x"))
    ticket = thread.submit(prompt("q"), SamplingParams(max_tokens=3), said=list(b"abc"))
    until(lambda: inbox.over(ticket))
    assert [piece.finish for piece in inbox.of(ticket)[0]] == ["length"]
    until(lambda: thread.active == 0)
    assert (thread.counters.completed, thread.counters.generated_tokens) == (1, 0)


def test_a_model_that_fails_fails_one_reply_and_the_others_go_on(start):
    thread, inbox = start(ScriptedModel({"bad": [*script("ab"), CRASH], "": script("fine " * 5)}))
    bad, good = thread.submit(prompt("bad"), GREEDY), thread.submit(prompt("good"), GREEDY)
    until(lambda: inbox.over(bad) and inbox.over(good))
    assert isinstance(inbox.of(bad)[1], RuntimeError)
    assert (inbox.text(bad), inbox.text(good)) == ("ab", "fine " * 5)
    until(lambda: thread.active == 0)
    assert thread.healthy()
    assert (thread.counters.failed, thread.counters.completed) == (1, 1)


def test_thousands_of_replies_leave_nothing_behind(start):
    thread, inbox = start(scripted("ab"), max_waiting=50)
    cancelled = 0
    for number in range(2000):
        until(lambda: thread.active < 50)
        ticket = thread.submit(prompt(str(number % 7)), SamplingParams(max_tokens=1 + number % 3))
        if number % 5 == 0:
            thread.cancel(ticket)
            cancelled += 1
    until(lambda: thread.active == 0 and not thread.engine.busy)
    over = sum(1 for delivered in inbox.deliveries for _, outcome in delivered if outcome and outcome[-1].finish)
    assert over == thread.counters.completed == 2000 - cancelled
    assert thread.counters.cancelled == cancelled
    until(lambda: not (thread._new or thread._cancelled or thread._active))
    scheduler = thread.engine.scheduler
    assert (scheduler.running, len(scheduler.waiting), scheduler.blocks.held) == ([], 0, 0)
    scheduler.check_integrity()


def test_a_step_that_hangs_is_not_healthy_and_nobody_is_kept_waiting_at_the_door(start, monkeypatch):
    monkeypatch.setattr(worker, "STUCK_AFTER_S", 0.05)
    model = gated("x" * 5)
    thread, inbox = start(model)
    assert thread.healthy()
    ticket = thread.submit(prompt("q"), GREEDY)
    until(lambda: not thread.healthy())
    began = time.monotonic()
    other = thread.submit(prompt("other"), GREEDY)
    thread.cancel(other)
    assert thread.stats()["running"] == 1
    assert time.monotonic() - began < 1
    model.allowed.release(100)
    until(lambda: inbox.over(ticket))
    until(thread.healthy)


def test_closing_drops_what_is_in_progress_and_takes_nothing_more(start):
    thread, inbox = start(scripted("x" * 1000, seconds_per_step=0.001))
    ticket = thread.submit(prompt("q"), GREEDY)
    until(lambda: inbox.of(ticket)[0])
    thread.close()
    thread.close()
    count = len(inbox.deliveries)
    assert not thread.healthy()
    with pytest.raises(Full, match="stopped"):
        thread.submit(prompt("q"), GREEDY)
    thread.cancel(ticket)
    assert len(inbox.deliveries) == count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_the_engine_ends_it_and_everybody_hears_of_it(start, monkeypatch):
    thread, inbox = start(scripted("x" * 1000, seconds_per_step=0.001))
    tickets = [thread.submit(prompt("q"), GREEDY) for _ in range(3)]
    until(lambda: all(inbox.of(ticket)[0] for ticket in tickets))

    def defect():
        raise AssertionError("a block is free twice")

    monkeypatch.setattr(thread.engine.scheduler, "schedule", defect)
    until(lambda: not thread.healthy())
    for ticket in tickets:
        ended = inbox.of(ticket)[1]
        assert isinstance(ended, Ended)
        assert isinstance(ended.__cause__, AssertionError)
    assert (thread.counters.failed, thread.active) == (3, 0)
    with pytest.raises(Full, match="stopped"):
        thread.submit(prompt("q"), GREEDY)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_fails_every_reply_ends_the_engine(start, monkeypatch):
    thread, inbox = start(scripted("x" * 1000, seconds_per_step=0.001), max_running=2)
    first = thread.submit(prompt("q"), GREEDY)
    until(lambda: inbox.of(first)[0])

    def broken(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(thread.engine.model, "forward", broken)
    outcomes = []
    for _ in range(worker.FAILED_STEPS):
        try:
            ticket = thread.submit(prompt("q"), GREEDY)
        except Full:
            break
        until(lambda: inbox.of(ticket)[1])  # noqa: B023 (it is over before the next)
        outcomes.append(inbox.of(ticket)[1])
    until(lambda: not thread.healthy())
    assert {type(outcome) for outcome in outcomes} <= {RuntimeError, Ended}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_fails_to_take_what_is_delivered_ends_the_thread_visibly(start):
    def deliver(delivered):
        raise RuntimeError("nobody listens")

    thread, _ = start(scripted("x" * 1000), deliver=deliver)
    thread.submit(prompt("q"), GREEDY)
    until(lambda: not thread.healthy())
    with pytest.raises(Full, match="stopped"):
        thread.submit(prompt("q"), GREEDY)


def test_the_numbers_it_reports_add_up(start):
    thread, inbox = start(scripted("abc"), max_running=2)
    tickets = [thread.submit(prompt("q" * 40), GREEDY) for _ in range(3)]
    until(lambda: all(inbox.over(ticket) for ticket in tickets))
    until(lambda: thread.active == 0)
    stats = thread.stats()
    assert stats["prompt_tokens"] == 3 * 43
    assert stats["prefix_hit_tokens"] == 2 * 32
    assert stats["generated_tokens"] == 3 * 4
    assert (stats["running"], stats["waiting"], stats["kv_used"], stats["preempted"]) == (0, 0, 0, 0)
    assert stats["kv_blocks"] == 2 * -(-4096 // 16)
    assert 0 < stats["busy_s"] < 10
    assert stats["steps"] >= 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets threads give way")
def test_the_model_is_not_interrupted_by_a_process_around_it_that_gives_way(start):
    around, model = [], PolicyModel({"": script("abc")})

    def serve():  # a thread of its own, so that the tests that follow do not give way, too
        give_way()
        around.append(os.sched_getscheduler(0))
        thread, inbox = start(model)
        ticket = thread.submit(prompt("q"), GREEDY)
        until(lambda: inbox.over(ticket))

    server = threading.Thread(target=serve)
    server.start()
    server.join()
    assert around == [os.SCHED_BATCH]
    assert model.policies == {os.SCHED_OTHER}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets threads give way")
def test_a_policy_that_the_user_chose_is_left_alone():
    policies = []

    def under_chrt():
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        for change in (give_way, take_precedence):
            change()
            policies.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=under_chrt)
    thread.start()
    thread.join()
    assert policies == [os.SCHED_IDLE] * 2
