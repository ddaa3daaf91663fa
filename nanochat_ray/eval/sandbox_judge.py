"""Two processes and the plain data between them: the program that was generated, and the judge that runs its tests.

The program never shares an interpreter with its tests. It is loaded in a process of its own and answers calls; the
judge runs the tests, where `solution` is an object whose attributes are the program's functions. Arguments go over as
data and results come back as data: what the judge compares are numbers, strings and containers that it made itself, so
that no clever `__eq__`, patched builtin, early exit or forged message decides anything. The one thing a program can do
about its tests is to return what they ask for.

Standard library only; runs inside the walls.
"""

import json
import os
import random
import struct
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME_BYTES = 8 << 20  # of one call or result, as JSON
MAX_DETAIL_CHARS = 300

# What ends a run without the judge's verdict being "passed"; `sandbox.Outcome` has the same words.
PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, KILLED = "passed", "failed", "timed out", "out of memory", "killed"


class ProgramEnded(Exception):
    """The other process closed its end of the pipe, or sent what is not a message."""


class ProgramError(Exception):
    """The program raised something: while it was loaded, or when a test called it."""


class _Incomparable:
    """Stands in the judge for a result that is not plain data; it equals nothing."""


def message(content: Any) -> bytes:
    """One message: four bytes of length, then JSON."""
    body = json.dumps(content).encode()
    return struct.pack(">I", len(body)) + body


def send(descriptor: int, content: Any) -> None:
    """Write one message."""
    data = memoryview(message(content))
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Read one message.

    Raises:
        ProgramEnded: the pipe is closed, or what comes is too long or no JSON.
    """
    length = struct.unpack(">I", _exactly(descriptor, 4))[0]
    if length > MAX_FRAME_BYTES:
        raise ProgramEnded(f"a result of {length:,} bytes")
    try:
        return json.loads(_exactly(descriptor, length))
    except (ValueError, RecursionError):
        raise ProgramEnded("a result that is not data") from None


def _exactly(descriptor: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            raise ProgramEnded("it ended")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def as_json(value: Any) -> Any:
    """A value as JSON that `from_json` makes the same value from, of the plain type: subclasses lose what they added.

    Raises:
        RecursionError: it is nested too deep, or contains itself.
    """
    match value:
        case None | bool():
            return value
        case int():
            return int(value) if -(2**62) < value < 2**62 else ["int", hex(value)]
        case float():
            return float(value)
        case str():
            return str.__str__(value)
        case list() | tuple() | set() | frozenset():
            kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
            return [kind.__name__, *map(as_json, value)]
        case dict():
            return ["dict", *([as_json(key), as_json(item)] for key, item in value.items())]
        case complex():
            return ["complex", value.real, value.imag]
        case bytes() | bytearray():
            return [type(value).__name__, value.hex()]
        case Fraction() | Decimal():
            return [type(value).__name__, str(value)]
        case Iterator():
            return ["iterator", *map(as_json, value)]
    return ["object", type(value).__name__]


_PLAIN: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda items: list(map(from_json, items)),
    "tuple": lambda items: tuple(map(from_json, items)),
    "set": lambda items: set(map(from_json, items)),
    "frozenset": lambda items: frozenset(map(from_json, items)),
    "dict": lambda items: {from_json(key): from_json(item) for key, item in items},
    "iterator": lambda items: iter(list(map(from_json, items))),
    "int": lambda items: int(items[0], 16),
    "complex": lambda items: complex(items[0], items[1]),
    "bytes": lambda items: bytes.fromhex(items[0]),
    "bytearray": lambda items: bytearray.fromhex(items[0]),
    "Fraction": lambda items: Fraction(items[0]),
    "Decimal": lambda items: Decimal(items[0]),
    "object": lambda items: _Incomparable(),
}


def from_json(value: Any) -> Any:
    """The value that `as_json` wrote. Only these plain types are ever made, whatever was sent.

    Raises:
        ProgramEnded: it is not what `as_json` writes.
    """
    if not isinstance(value, list | dict):
        return value
    try:
        return _PLAIN[value[0]](value[1:])
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise ProgramEnded("a result that is not data") from None


def answer_calls(program: str, calls: int, results: int) -> None:
    """Load the program, say whether that went well, then answer calls until the pipe is closed. Never returns.

    Runs in the program's own process; from the first line on, everything here is at the program's mercy.
    """
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    send(results, _attempt(lambda: exec(compile(program, "<program>", "exec"), module.__dict__)))
    while True:
        name, arguments, named = receive(calls)
        send(results, _attempt(lambda: _call(module, name, arguments, named)))  # noqa: B023 (called at once)


def _call(module: types.ModuleType, name: str, arguments: Any, named: Any) -> Any:
    return as_json(getattr(module, name)(*from_json(arguments), **from_json(named)))


def _attempt(action: Callable[[], Any]) -> dict[str, Any]:
    try:
        outcome = {"value": action()}
    except MemoryError:
        outcome = {"error": "MemoryError", "memory": True}
    except SystemExit as end:
        outcome = {"error": f"it called exit({end.code!r})"}
    except BaseException as error:  # whatever it is, the tests are to hear of it, and the next call is answered
        outcome = {"error": describe(error)}
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # the program's own replacement of the stream; its output is its own affair
            continue
    return outcome


def describe(error: BaseException, source: str = "") -> str:
    """`Type: message`, one line; with the line of `source` it comes from, if it is an assertion without message."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1:] or [type(error).__name__]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
    lines = source.splitlines()
    if source and frames and text[0] == "AssertionError" and 0 < (frames[-1].lineno or 0) <= len(lines):
        text = [f"AssertionError: {lines[(frames[-1].lineno or 0) - 1].strip()}"]
    return text[0][:MAX_DETAIL_CHARS]


class Solution:
    """The program as its tests see it: every attribute is a function that calls the program's of the same name."""

    def __init__(self, calls: int, results: int) -> None:
        self._calls, self._results = calls, results

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                send(self._calls, [name, as_json(arguments), as_json(named)])
            except BrokenPipeError:
                raise ProgramEnded("it ended") from None
            return read_result(self._results)

        return call


def read_result(results: int) -> Any:
    """The value of the next result.

    Raises:
        ProgramError, MemoryError: the program raised something.
        ProgramEnded: it ended, or sent what is not a result.
    """
    result = receive(results)
    if not isinstance(result, dict) or not ({"value", "error"} & result.keys()):
        raise ProgramEnded("a result that is not data")
    if result.get("memory"):
        raise MemoryError
    if "error" in result:
        raise ProgramError(str(result["error"])[:MAX_DETAIL_CHARS])
    return from_json(result["value"])


def judge(read_tests: Callable[[], str], calls: int, results: int) -> tuple[str, str]:
    """(outcome, detail): wait until the program is loaded, read the tests, run them to their end.

    `read_tests` is called only then, when the program's process exists: no copy of the tests is ever in its memory.
    """
    tests = ""
    try:
        read_result(results)
        tests = read_tests()
        random.seed(0)  # tests that draw examples draw the same ones every time
        exec(compile(tests, "<tests>", "exec"), {"__name__": "tests", "solution": Solution(calls, results)})
    except ProgramEnded as error:
        return KILLED, str(error)
    except ProgramError as error:
        return FAILED, str(error)
    except MemoryError:
        return OUT_OF_MEMORY, "MemoryError"
    except (Exception, SystemExit) as error:
        return FAILED, describe(error, tests)
    return PASSED, ""
