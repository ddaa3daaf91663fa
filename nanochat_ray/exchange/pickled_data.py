"""Reads the data in a pickle without running it: a machine for the few instructions that hold plain data.

A pickle is a program: whoever loads it calls what it names. So this reader calls nothing. It knows numbers, texts,
bytes, tuples, dictionaries and objects of one named class, of which it returns the state; every other instruction and
every other name is refused. It never recurses and makes nothing larger than the pickle is, so that neither nesting nor
size can hurt it. Protocols 0 to 5 (instructions: https://docs.python.org/3/library/pickletools.html).
"""

import pickletools
from dataclasses import dataclass
from typing import Any


class NotPlainData(Exception):
    """The pickle is damaged, or would run code; the message says what stands in it."""


@dataclass(frozen=True)
class _Name:
    """What a pickle calls `module.name`; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Object:
    """An instance of the class; `state` is None until the pickle gives it one."""

    state: Any = None


# How the protocols before 3 spell bytes and new objects. No call is made: their arguments are read for what they mean.
_LATIN1 = _Name("_codecs", "encode")
_NEW = {_Name("copy_reg", "_reconstructor"), _Name("copyreg", "_reconstructor")}
_ROOT = {_Name("__builtin__", "object"), _Name("builtins", "object")}
_MARK = object()
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_object(data: bytes, module: str, name: str) -> Any:
    """The state of the one object that `data` is a pickle of, an instance of `module.name`.

    Raises:
        NotPlainData: it is anything else.
    """
    machine = _Machine(_Name(module, name))
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.run(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise NotPlainData(f"it is damaged ({error})") from error
    return machine.result()


class _Machine:
    def __init__(self, wanted: _Name):
        self._wanted = wanted
        self._known = {wanted, _LATIN1, *_NEW, *_ROOT}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode == "MARK":
            stack.append(_MARK)
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif opcode == "EMPTY_DICT":
            stack.append({})
        elif opcode == "DICT":
            stack.append(self._fill({}, self._since_mark()))
        elif opcode == "SETITEM":
            pair = [stack.pop(), stack.pop()][::-1]
            self._fill(stack[-1], pair)
        elif opcode == "SETITEMS":
            pairs = self._since_mark()
            self._fill(stack[-1], pairs)
        elif opcode == "GLOBAL":
            stack.append(self._name(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self._name(module, name))
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(self._made(called, arguments, opcode))
        elif opcode == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], _Object) or stack[-1].state is not None:
                raise NotPlainData("it gives a state to what is no new object")
            stack[-1].state = state
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise NotPlainData(f"it has the instruction {opcode}, which plain data does not need")

    def result(self) -> Any:
        if len(self._stack) != 1 or not isinstance(self._stack[0], _Object):
            raise NotPlainData(f"it holds no {self._wanted}")
        return self._stack[0].state

    def _since_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off with it."""
        found = []
        while (value := self._stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def _fill(self, target: Any, pairs: list[Any]) -> dict[Any, Any]:
        if type(target) is not dict or len(pairs) % 2:
            raise NotPlainData("it fills what is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, bytes):  # a nested key would be hashed by recursion
                raise NotPlainData("it has a key that is neither text nor bytes")
            target[key] = value
        return target

    def _name(self, module: Any, name: Any) -> _Name:
        found = _Name(str(module)[:80], str(name)[:80]) if isinstance(module, str) and isinstance(name, str) else None
        if found not in self._known:
            raise NotPlainData(f"it names {found or 'something that is no text'}, which would run as code")
        return found

    def _made(self, called: Any, arguments: Any, opcode: str) -> Any:
        if opcode == "NEWOBJ" and called == self._wanted and arguments == ():
            return _Object()
        if opcode == "REDUCE" and type(arguments) is tuple and type(called) is _Name:
            if called in _NEW and len(arguments) == 3:
                made, root, state = arguments
                if made == self._wanted and type(root) is _Name and root in _ROOT and state is None:
                    return _Object()
            if called == _LATIN1 and len(arguments) == 2:
                text, encoding = arguments
                if type(text) is str and encoding == "latin1":
                    return text.encode("latin1")
        what = called if type(called) is _Name else f"a {type(called).__name__}"
        raise NotPlainData(f"it calls {what}, which would run as code")
