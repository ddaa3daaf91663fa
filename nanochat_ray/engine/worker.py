"""Runs many replies on one model: a thread of its own, one step of each in turn.

    schedule → run → deliver, forever: the reply that has waited longest gets one step, its pieces go to its owner.

Memory is bounded by the number of replies admitted at once; whoever comes later is refused, before anything is begun.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanochat_ray.engine.engine import Engine, Generation
from nanochat_ray.engine.reply import Piece
from nanochat_ray.engine.sampler import SamplingParams

STUCK_AFTER_S = 120.0  # one step never takes this long, not even a prefill chunk of a large model on a CPU

Deliver = Callable[[list[Piece] | Exception], None]


class Busy(Exception):
    """As many replies are being written as the engine takes."""


@dataclass(eq=False)
class Ticket:
    """A reply that was admitted."""

    generation: Generation
    deliver: Deliver
    cancelled: bool = False


@dataclass
class Counters:
    """Totals since the start; `busy_s` is the time spent in steps."""

    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    tokens: int = 0
    busy_s: float = 0.0


@dataclass
class EngineThread:
    """The only thread that touches the model.

    Args:
        max_replies: how many are written at the same time.
    """

    engine: Engine
    max_replies: int = 8
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self._turns: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._step_began: float | None = None  # monotonic; None between steps
        self._running: Ticket | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, deliver: Deliver) -> Ticket:
        """Admit a reply. `deliver` is called on the engine's thread with each step's pieces, or once with an error.

        Raises:
            UserError: the prompt does not fit.
            Busy: too many replies are being written.
        """
        generation = self.engine.start(prompt_ids, params)
        ticket = Ticket(generation, deliver)
        with self._changed:
            if self.active >= self.max_replies:
                self.counters.refused += 1
                raise Busy(f"{self.max_replies} replies are being written already")
            self._turns.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a reply: it gets no further step, and its cache is freed when the present step is over. Idempotent."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._turns:
                self._turns.remove(ticket)
                self.counters.cancelled += 1
                ticket.generation.close()

    def close(self) -> None:
        """Stop the thread after the present step; replies in progress are dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def active(self) -> int:
        """Replies admitted and not over."""
        return len(self._turns) + (self._running is not None)

    def healthy(self) -> bool:
        """Whether the thread lives and its present step is not stuck."""
        began = self._step_began
        return self._thread.is_alive() and (began is None or time.monotonic() - began < STUCK_AFTER_S)

    def _run(self) -> None:
        while (ticket := self._next()) is not None:
            outcome = self._step(ticket)
            with self._changed:
                self._running = None
                again = self._account(ticket, outcome)
                if again:
                    self._turns.append(ticket)
                else:
                    ticket.generation.close()
            if not ticket.cancelled:
                ticket.deliver(outcome)

    def _next(self) -> Ticket | None:
        with self._changed:
            while not self._turns and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            self._running = self._turns.popleft()
            return self._running

    def _step(self, ticket: Ticket) -> list[Piece] | Exception:
        began = self._step_began = time.monotonic()
        try:
            return ticket.generation.step()
        except Exception as error:  # belongs to this reply; it is delivered to its owner, and the others go on
            return error
        finally:
            self._step_began = None
            self.counters.busy_s += time.monotonic() - began

    def _account(self, ticket: Ticket, outcome: list[Piece] | Exception) -> bool:
        """Count what a step brought; whether the reply goes on."""
        if isinstance(outcome, Exception):
            self.counters.failed += 1
            return False
        self.counters.tokens += sum(len(piece.tokens) for piece in outcome)
        if ticket.generation.finished:
            self.counters.completed += 1
            return False
        if ticket.cancelled:
            self.counters.cancelled += 1
            return False
        return True
