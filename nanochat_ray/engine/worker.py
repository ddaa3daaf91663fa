"""The engine's own thread: takes replies in, steps while there are any, and hands out what each step brought.

    thread = EngineThread(engine, deliver)      # deliver([(ticket, pieces or exception), …]), once per step
    ticket = thread.submit(prompt, params)      # from any thread
    thread.cancel(ticket)                       # it gets no further step

Memory is bounded by the number of replies admitted at once; whoever comes later is refused, before anything is begun.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanochat_ray.engine.engine import Engine, Outcome, RunningReply
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.errors import UserError
from nanochat_ray.precedence import take_precedence

FAILED_STEPS = 3  # in a row in which every reply failed: a device that is broken breaks all that come
STUCK_AFTER_S = 120.0  # one step never takes this long, not even a prefill chunk of a large model on a CPU

Deliver = Callable[[list[tuple["Ticket", Outcome]]], None]


class Ended(Exception):
    """The thread has ended because the engine failed, not this reply; says how."""


class Full(Exception):
    """As many replies wait or are being written as the engine takes, or it has stopped."""


@dataclass(eq=False)
class Ticket:
    """A reply that was admitted."""

    reply: RunningReply


@dataclass
class Counters:
    """Totals since the start; `busy_s` is the time spent in steps."""

    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    generated_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0


class EngineThread:
    """The only thread that touches the model.

    Args:
        deliver: called on the engine's thread after each step. If it or the engine itself raises, or FAILED_STEPS fail
            in a row, every reply gets `Ended` and the thread ends.
        max_waiting: replies that may wait beside those that run.
    """

    def __init__(self, engine: Engine, deliver: Deliver, max_waiting: int) -> None:
        self.engine = engine
        self.counters = Counters()
        self._deliver = deliver
        self._most = engine.scheduler.max_running + max_waiting
        self._changed = threading.Condition()  # guards what follows; never held during a step
        self._new: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._active: dict[Ticket, None] = {}  # in order of admission
        self._closing = False
        self._failed_steps = 0
        self._step_began: float | None = None  # monotonic; None between steps
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], params: SamplingParams, said: Sequence[int] = ()) -> Ticket:
        """Admit a reply; its first pieces come with the `deliver` of some later step.

        Raises:
            UserError: as `Engine.add`.
            Full: too many replies wait, or the thread has ended.
        """
        ticket = Ticket(self.engine.prepare(prompt, params, said))
        with self._changed:
            if self._closing:
                raise Full("the engine has stopped")
            if len(self._active) >= self._most:
                self.counters.refused += 1
                raise Full(f"{len(self._active)} replies are being written or wait already")
            self._active[ticket] = None
            self._new.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a reply: nothing more is delivered for it after the present step. Idempotent."""
        with self._changed:
            if ticket in self._active:
                del self._active[ticket]
                self._cancelled.append(ticket)
                self.counters.cancelled += 1
                self._changed.notify()

    def close(self) -> None:
        """Stop the thread after the present step; replies in progress are dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def active(self) -> int:
        """Replies admitted and not over."""
        return len(self._active)

    def ahead(self, ticket: Ticket) -> int:
        """How many replies that have not begun were admitted before this one; 0 also when it has begun."""
        with self._changed:
            waiting = [other for other in self._active if other.reply.slot.blocks is None]
        return waiting.index(ticket) if ticket in waiting else 0

    def healthy(self) -> bool:
        """Whether the thread lives and its present step is not stuck."""
        began = self._step_began
        return self._thread.is_alive() and (began is None or time.monotonic() - began < STUCK_AFTER_S)

    def stats(self) -> dict[str, Any]:
        """Queue, blocks and totals, JSON-able."""
        scheduler = self.engine.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": max(0, self.active - len(scheduler.running)),
            "kv_blocks": scheduler.blocks.total,
            "kv_used": scheduler.blocks.held,
            "prompt_tokens": scheduler.tally.prompt_tokens,
            "prefix_hit_tokens": scheduler.tally.reused_tokens,
            "preempted": scheduler.tally.preempted,
            **asdict(self.counters),
        }

    def _run(self) -> None:
        take_precedence()
        try:
            while self._take_in():
                began = self._step_began = time.monotonic()
                outcomes = self.engine.step()
                self._step_began = None
                self.counters.steps += 1
                self.counters.busy_s += time.monotonic() - began
                self._note_failures(outcomes)
                if delivered := self._account(outcomes):
                    self._deliver(delivered)
        except Exception as error:  # a defect of the engine or of `deliver`: it ends, and nobody may wait for it
            with self._changed:
                self._closing = True
                failed, self._active = list(self._active), {}
                self.counters.failed += len(failed)
            ended = Ended(f"{type(error).__name__}")
            ended.__cause__ = error
            self._deliver([(ticket, ended) for ticket in failed])
            raise

    def _note_failures(self, outcomes: list[tuple[RunningReply, Outcome]]) -> None:
        """Raises what a reply failed of when too many steps failed."""
        errors = [outcome for _, outcome in outcomes if isinstance(outcome, Exception)]
        # A UserError names a damaged model; another engine would have the same.
        if not errors or len(errors) < len(outcomes) or isinstance(errors[0], UserError):
            self._failed_steps = 0 if outcomes else self._failed_steps
            return
        self._failed_steps += 1
        if self._failed_steps == FAILED_STEPS:
            raise errors[0]

    def _take_in(self) -> bool:
        """Wait until there is something to step, and bring the engine's queue up to date; False when closing."""
        with self._changed:
            while not (self._new or self._cancelled or self.engine.busy or self._closing):
                self._changed.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            if self._closing:
                return False
        for ticket in new:
            self.engine.enqueue(ticket.reply)
        for ticket in cancelled:
            self.engine.cancel(ticket.reply)
        return True

    def _account(self, outcomes: list[tuple[RunningReply, Outcome]]) -> list[tuple[Ticket, Outcome]]:
        """Count what a step brought; what is to be delivered of it."""
        with self._changed:
            tickets = {ticket.reply: ticket for ticket in self._active}
            delivered = [(tickets[reply], outcome) for reply, outcome in outcomes if reply in tickets]
            for ticket, outcome in delivered:
                if isinstance(outcome, Exception):
                    self.counters.failed += 1
                    del self._active[ticket]
                    continue
                self.counters.generated_tokens += sum(len(piece.tokens) for piece in outcome)
                if ticket.reply.finished:
                    self.counters.completed += 1
                    del self._active[ticket]
        return delivered
