"""What the tokens of a reply mean: text, calculator calls, the end. A state machine over ids, with no model in it.

Because the state follows from the reply's tokens alone, a reply can be taken up from any of its tokens: pass those that
exist to `replay` and go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.sampler import TokenLogprob
from nanochat_ray.engine.text import Detokenizer, StopFinder

MAX_TOOL_CALLS = 16

FinishReason = Literal["stop", "length", "tool_limit"]


class ChatTokenizer(Protocol):
    """What generation needs of `nanochat_ray.tokenizer.Tokenizer`."""

    def special(self, name: str) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclass(frozen=True)
class ToolCall:
    """A calculator call. `result` is None while the model is still writing the expression, which is empty then."""

    expression: str = ""
    result: str | None = None


@dataclass(frozen=True)
class Piece:
    """What one token added to a reply.

    tokens   ids that joined the sequence: the sampled one and, after a tool call, the forced result
    text     text for the reader that became certain
    tool     a tool call that began (`result` None) or has its result
    finish   set on the last piece: `stop` (the model ended its turn, or a stop string was found), `length`
             (max_tokens or the context is used up) or `tool_limit` (more calls than MAX_TOOL_CALLS)
    logprobs one per sampled token, if they were asked for; forced tokens have none
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    tool: ToolCall | None = None
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Reply:
    """Reads a reply token by token; runs the calculator when a call is complete and says which tokens must follow."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._python_start = tokenizer.special("python_start")
        self._python_end = tokenizer.special("python_end")
        self._output_start = tokenizer.special("output_start")
        self._output_end = tokenizer.special("output_end")
        # Whatever else is special has no place inside a reply, so it ends the turn as assistant_end does.
        self._ends = {
            tokenizer.special(name) for name in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
        }
        self._text = Detokenizer(tokenizer.decode_bytes)
        self._stops = StopFinder(stops)
        self._expression: list[int] | None = None  # tokens since python_start
        self._tool_calls = 0
        self.forced: list[int] = []  # tokens that must come next, in order, before anything is sampled

    def push(self, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> Piece:
        """Take the next token of the reply, a sampled one (with its log-probability) or the first of `forced`."""
        return replace(self._push(token), logprobs=logprobs) if logprobs else self._push(token)

    def replay(self, tokens: Sequence[int]) -> None:
        """Take tokens that were shown already.

        Raises:
            ValueError: the reply is already over within these tokens.
        """
        for token in tokens:
            if self.push(token).finish is not None:
                raise ValueError("these tokens already end the reply; there is nothing to continue")

    def cut(self, last: Piece) -> Piece:
        """The same piece as the last one of a reply that ran out of room: with the text that was held back."""
        return replace(last, text=last.text + self._rest(), finish="length")

    def _push(self, token: int) -> Piece:
        if self.forced:
            expected = self.forced.pop(0)
            if token != expected:
                raise ValueError(f"token {expected} was forced to come next, not {token}")
            return Piece((token,))
        if token in self._ends:
            return Piece((token,), text=self._rest(), finish="stop")
        if self._expression is not None:
            return self._push_inside_call(token)
        if token == self._python_start:
            if self._tool_calls == MAX_TOOL_CALLS:
                return Piece((token,), text=self._rest(), finish="tool_limit")
            self._tool_calls += 1
            self._expression = []
            # Text from before the call is shown before the call, so nothing may be held back across it.
            return Piece((token,), text=self._rest(), tool=ToolCall())
        if token in (self._python_end, self._output_start, self._output_end):
            return Piece((token,), text=self._rest(), finish="stop")
        text, stopped = self._stops.push(self._text.push(token))
        return Piece((token,), text=text, finish="stop" if stopped else None)

    def _push_inside_call(self, token: int) -> Piece:
        assert self._expression is not None
        if token != self._python_end:
            self._expression.append(token)
            return Piece((token,))
        expression = self._tokenizer.decode_bytes(self._expression).decode("utf-8", errors="replace")
        self._expression = None
        calculation = calculate(expression)
        self.forced = [self._output_start, *self._tokenizer.encode(calculation.text), self._output_end]
        return Piece((token,), tool=ToolCall(expression, calculation.text))

    def _rest(self) -> str:
        shown, stopped = self._stops.push(self._text.flush())
        return shown if stopped else shown + self._stops.flush()
