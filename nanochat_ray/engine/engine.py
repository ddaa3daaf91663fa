"""Many replies on one model, a step at a time: schedule → run → sample. No threads, no Ray.

    engine = Engine(model, tokenizer)
    reply = engine.add(render_prompt(tokenizer, messages), SamplingParams(seed=7))
    while engine.busy:
        for reply, outcome in engine.step(): ...          # the pieces that this step added, or an exception
    for piece in engine.stream(prompt, params): ...       # the same for a single reply

A reply does not depend on who else is there: sampling is keyed by (seed, position in the sequence), so all that can
differ are the logits. The fused step of the CPU (`kernels/cpu_step.py`) computes every token's logits by the same
operations in the same order in any batch, so there the reply is the same to the last bit, in every dtype. Torch's
matrix products round differently for different numbers of rows: with `TorchStep` logits agree to about 1e-5 in fp32
and 1e-2 in bf16, and a reply differs where two tokens are as close as that.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from nanochat_ray.engine.blocks import KVBlocks
from nanochat_ray.engine.reply import ChatTokenizer, Piece, Reply
from nanochat_ray.engine.sampler import SamplingParams, logprob_of, penalise, sample
from nanochat_ray.engine.scheduler import Scheduler, Slot, Turn
from nanochat_ray.errors import UserError
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, StepModel

MAX_RUNNING = 32
STEP_TOKENS = 128  # on two cores about 80 ms: what a long prompt may hold up the replies beside it

Outcome = list[Piece] | Exception


class Engine:
    """A model, the blocks of its cache, and the replies it is writing. Not safe for two threads at once.

    Args:
        model: a `TorchStep`, a `CpuStep`, or whatever is a `StepModel`.
        max_running: replies that take part in a step.
        step_tokens: tokens in a step; raised to `max_running`, so that each reply can have one.
        kv_bytes: memory for keys and values; None for room for `max_running` full contexts. At least one always fits.
    """

    def __init__(
        self,
        model: StepModel,
        tokenizer: ChatTokenizer,
        max_running: int = MAX_RUNNING,
        step_tokens: int = STEP_TOKENS,
        kv_bytes: int | None = None,
    ) -> None:
        step_tokens = max(step_tokens, max_running)
        self.model = model
        self.tokenizer = tokenizer
        self.context = model.context
        self._blocks = _blocks_per_group(model, max_running, step_tokens, kv_bytes)
        self._limits = max_running, step_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all replies and all that is stored: for a model whose blocks have been used by another meanwhile."""
        self.model.allocate(self._blocks)
        windows = [group.window for group in self.model.groups]
        self.scheduler = Scheduler(KVBlocks(windows, self._blocks), *self._limits)
        self._over_before_begun: list[RunningReply] = []

    def add(self, prompt: Sequence[int], params: SamplingParams, said: Sequence[int] = ()) -> "RunningReply":
        """`prepare` and `enqueue`."""
        reply = self.prepare(prompt, params, said)
        self.enqueue(reply)
        return reply

    def prepare(self, prompt: Sequence[int], params: SamplingParams, said: Sequence[int] = ()) -> "RunningReply":
        """A reply that has not begun; the engine does not know it yet. Safe beside a step of another thread.

        Args:
            prompt: token ids; for a chat they end with assistant_start.
            said: tokens of the reply that exist already; it goes on behind them. `max_tokens` counts them.

        Raises:
            UserError: the prompt is empty or leaves no room in the context, an id is no token of the model, or what was
                said ends the reply already or is not what the calculator would say.
        """
        if not prompt:
            raise UserError("the prompt is empty")
        if len(prompt) >= self.context:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, but the model's context is {self.context}; "
                "shorten it or start a new chat"
            )
        ids = [*prompt, *said]
        if not 0 <= min(ids) <= max(ids) < self.model.vocab_size:
            raise UserError(f"the prompt has ids that are no tokens of this model, which has {self.model.vocab_size}")
        return RunningReply(self, prompt, params, said)

    def enqueue(self, reply: "RunningReply") -> None:
        """Put a prepared reply at the end of the queue."""
        if reply.finished:
            self._over_before_begun.append(reply)
        else:
            self.scheduler.add(reply.slot)

    def cancel(self, reply: "RunningReply") -> None:
        """End a reply as it is and free its blocks. Idempotent."""
        reply.finished = True
        self.scheduler.remove(reply.slot)
        if reply in self._over_before_begun:
            self._over_before_begun.remove(reply)

    @property
    def busy(self) -> bool:
        """Whether there is something to step."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._over_before_begun)

    def step(self) -> list[tuple["RunningReply", Outcome]]:
        """One call of the model: what every reply got that took part, or the exception that ended it."""
        over: list[tuple[RunningReply, Outcome]] = [(reply, reply.take_first()) for reply in self._over_before_begun]
        self._over_before_begun.clear()
        turns = self.scheduler.schedule()
        return over + self._run(turns) if turns else over

    def stream(self, prompt: Sequence[int], params: SamplingParams, said: Sequence[int] = ()) -> Iterator[Piece]:
        """The pieces of one reply; the last one has `finish` set. Other replies advance, too, but only while it does.

        Raises:
            UserError: as `add`.
        """
        reply = self.prepare(prompt, params, said)
        if reply.finished:
            yield from reply.take_first()
            return
        self.enqueue(reply)
        try:
            while not reply.finished:
                for other, outcome in self.step():
                    if other is reply and isinstance(outcome, Exception):
                        raise outcome
                    if other is reply and isinstance(outcome, list):
                        yield from outcome
        finally:
            self.cancel(reply)

    def _run(self, turns: list[Turn]) -> list[tuple["RunningReply", Outcome]]:
        try:
            logits_RV = self.model.forward(_batch(turns, len(self.model.groups)))
        except Exception as error:
            if len(turns) > 1:  # only those fail that fail alone; reading the same tokens twice changes nothing
                return [result for turn in turns for result in self._run([turn])]
            reply = _reply_of(turns[0])
            self.cancel(reply)
            return [(reply, error)]
        results: list[tuple[RunningReply, Outcome]] = []
        row = 0
        for turn in turns:
            self.scheduler.done(turn)
            if turn.slot.unread:  # more of its prompt is to be read
                continue
            reply = _reply_of(turn)
            try:
                outcome: Outcome = reply.extend(logits_RV[row])
            except Exception as error:  # belongs to this reply; the others go on
                outcome = error
            row += 1
            if reply.finished or isinstance(outcome, Exception):
                self.cancel(reply)
            results.append((reply, outcome))
        return results


class RunningReply:
    """One reply in progress.

    ids             the whole sequence so far, prompt included
    prompt_tokens   how many of them were given
    finished        nothing more comes
    """

    def __init__(self, engine: Engine, prompt: Sequence[int], params: SamplingParams, said: Sequence[int] = ()) -> None:
        self.ids = [*prompt, *said]
        self.prompt_tokens = len(prompt)
        self.params = params
        self.finished = False
        self.slot = Slot(self)
        # The sequence ends here: after max_tokens, or when the context is full.
        self._limit = min(self.prompt_tokens + params.max_tokens, engine.context)
        self._reply = Reply(engine.tokenizer, params.stop)
        try:
            self._reply.replay(said)
        except ValueError as error:
            raise UserError(f"the reply cannot be continued: {error}") from error
        self._before, self._said = Counter(self.ids), Counter(said)
        # What was said may end in the middle of a tool result, or where there is no room for more.
        self._first: list[Piece] = self._append_forced()
        if not self.finished and len(self.ids) >= self._limit:
            self._first.append(self._reply.cut(Piece()))
            self.finished = True

    @property
    def new_tokens(self) -> int:
        """Tokens of the reply so far, tool results included."""
        return len(self.ids) - self.prompt_tokens

    def take_first(self) -> list[Piece]:
        """Pieces that were certain before the model was asked."""
        first, self._first = self._first, []
        return first

    def extend(self, logits_V: np.ndarray) -> list[Piece]:
        """Choose the next token; the pieces that it and the tokens that it forces add.

        Raises:
            UserError: as `sample`.
        """
        params, given = self.params, logits_V
        if params.penalised:
            logits_V = penalise(logits_V, params, self._before, self._said)
        token = sample(logits_V, params, position=len(self.ids))
        logprobs = () if params.logprobs is None else (logprob_of(given, token, params.logprobs),)
        return [*self.take_first(), self._append(token, logprobs), *self._append_forced()]

    def _append(self, token: int, logprobs: tuple = ()) -> Piece:
        self.ids.append(token)
        if self.params.penalised:
            self._before[token] += 1
            self._said[token] += 1
        piece = self._reply.push(token, logprobs)
        if piece.finish is None and len(self.ids) >= self._limit:
            piece = self._reply.cut(piece)
        self.finished = piece.finish is not None
        return piece

    def _append_forced(self) -> list[Piece]:
        """Add a pending tool result; the model will read it together with the end of its call."""
        pieces = []
        while self._reply.forced and not self.finished:
            pieces.append(self._append(self._reply.forced[0]))
        return pieces


def _reply_of(turn: Turn) -> RunningReply:
    assert isinstance(turn.slot.sequence, RunningReply)
    return turn.slot.sequence


def _batch(turns: Sequence[Turn], groups: int) -> RaggedBatch:
    """The tokens of a step, end to end."""
    ids: list[int] = []
    previous: list[int] = []
    positions: list[int] = []
    starts, wanted = [0], []
    for turn in turns:
        slot, first = turn.slot, turn.slot.stored
        sequence = slot.sequence.ids
        ids += sequence[first : first + turn.count]
        previous += sequence[first - 1 : first + turn.count - 1] if first else [-1, *sequence[: turn.count - 1]]
        positions += range(first, first + turn.count)
        starts.append(len(ids))
        if turn.count == slot.unread:
            wanted.append(len(ids) - 1)
    tables = []
    for group in range(groups):
        rows = [turn.slot.blocks.tables[group] for turn in turns if turn.slot.blocks is not None]
        table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
        for row, blocks in zip(table, rows, strict=True):
            row[: len(blocks)] = blocks
        tables.append(table)
    flat = [np.array(values, dtype=np.int32) for values in (ids, previous, positions, starts, wanted)]
    return RaggedBatch(flat[0], flat[1], flat[2], flat[3], tuple(tables), flat[4])


def _blocks_per_group(model: StepModel, max_running: int, step_tokens: int, kv_bytes: int | None) -> list[int]:
    """So many blocks that every reply that may run has a full context, as far as the memory allows."""
    context = -(-model.context // BLOCK)
    each = [min(context, -(-(group.window + step_tokens) // BLOCK) + 2) for group in model.groups]
    bytes_each = sum(count * model.block_bytes(group) for group, count in enumerate(each))
    contexts = max_running if kv_bytes is None else min(max_running, kv_bytes / bytes_each)
    if contexts < 1:
        raise UserError(f"keys and values of one context take {bytes_each / 1e9:.2f} GB, more than the memory for them")
    return [int(count * contexts) for count in each]
