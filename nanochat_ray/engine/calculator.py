"""The calculator the model may call: arithmetic and `'text'.count('part')`. Never `eval`.

A parser of its own reads the expression by Python's rules and computes as it goes; whatever is not listed here is an
error. Length, depth and magnitude are bounded before anything is computed, so that no expression is slow. Python's own
parser is not used: it recurses in C, and nested parentheses overflow the small stack of a thread.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_CHARS = 500
MAX_DEPTH = 100
MAX_BITS = 400  # about 10^120, for integers and floats alike

_QUOTED = r"'[^'\\\n]*'|\"[^\"\\\n]*\""
_ALLOWED = re.compile(rf"(?:{_QUOTED}|\.count\b|[0-9.+\-*/%()\s])*")
_TOKEN = re.compile(rf"\s*(?:(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)|(?P<text>{_QUOTED})|(\*\*|//|\.count\b|[-+*/%()]))")
_THOUSANDS = re.compile(rf"({_QUOTED})|(?<=[0-9]),(?=[0-9]{{3}}(?![0-9]))")
_TYPOGRAPHY = str.maketrans({"×": "*", "÷": "/", "−": "-"})
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "**": 4}
_OF_SIGNS = 3  # -2**2 is -(2**2), -2*2 is (-2)*2


@dataclass(frozen=True)
class Calculation:
    """`text` is the result, or `error: <why>` when `ok` is false."""

    text: str
    ok: bool


class _Refused(Exception):
    """Why an expression is not computed."""


def calculate(expression: str) -> Calculation:
    """Compute an expression. Never raises and never takes long, whatever the text.

    Understands + − * / // % **, unary signs, parentheses, decimals, thousands commas and `'text'.count('part')`.
    Integers are exact; a quotient of integers that has no remainder is an integer; other results have 10 digits.
    """
    try:
        tokens = _Tokens(expression)
        result = _number(_expression(tokens, 1, MAX_DEPTH))
        if tokens.next is not None:
            raise _Refused("not arithmetic" if tokens.next == "(" else "not an expression")
        return Calculation(_format(result), ok=True)
    except _Refused as error:
        return Calculation(f"error: {error}", ok=False)
    except ZeroDivisionError:
        return Calculation("error: division by zero", ok=False)
    except OverflowError:
        return Calculation("error: too large", ok=False)
    except RecursionError:  # whoever calls us is deep already
        return Calculation("error: too deep", ok=False)


class _Tokens:
    """The parts of an expression, one at a time; `next` is None at the end."""

    def __init__(self, expression: str) -> None:
        if len(expression) > MAX_CHARS:
            raise _Refused("too long")
        text = _THOUSANDS.sub(lambda match: match.group(1) or "", expression.strip()).translate(_TYPOGRAPHY)
        # Names, escapes and odd literals are told from arithmetic that is merely broken.
        if not _ALLOWED.fullmatch(text):
            raise _Refused("not arithmetic")
        self._text, self._end = text, 0
        self.next: str | None = None
        self.take()

    def take(self) -> str | None:
        taken = self.next
        if self._text[self._end :].isspace() or self._end == len(self._text):
            self.next = None
            return taken
        match = _TOKEN.match(self._text, self._end)
        if match is None:
            raise _Refused("not an expression")
        self.next, self._end = match.group().strip(), match.end()
        return taken

    def expect(self, wanted: str) -> None:
        if self.take() != wanted:
            raise _Refused("not an expression")


Value = int | float | str


def _expression(tokens: _Tokens, lowest: int, depth: int) -> Value:
    """The value of what comes next, up to an operator that binds less than `lowest` (precedence climbing)."""
    if depth == 0:
        raise _Refused("too deep")
    if tokens.next in ("+", "-"):
        negative = tokens.take() == "-"
        operand = _number(_expression(tokens, _OF_SIGNS, depth - 1))
        value: Value = -operand if negative else operand
    else:
        value = _operand(tokens, depth)
    while (sign := tokens.next) in _PRECEDENCE and (binds := _PRECEDENCE[sign]) >= lowest:
        tokens.take()
        right = _expression(tokens, _OF_SIGNS if sign == "**" else binds + 1, depth - 1)
        value = _bounded(_BINARY[sign](_number(value), _number(right)))
    return value


def _operand(tokens: _Tokens, depth: int) -> Value:
    """A number, a text, or something in parentheses; then any `.count(…)`."""
    token = tokens.take()
    if token is None:
        raise _Refused("not an expression")
    value: Value
    if token == "(":
        value = _expression(tokens, 1, depth - 1)
        tokens.expect(")")
    elif token[0] in "'\"":
        value = token[1:-1]
    elif token[0].isdigit() or (token[0] == "." and token != ".count"):
        value = _literal(token)
    else:
        raise _Refused("not an expression")
    while tokens.next == ".count":
        tokens.take()
        if tokens.next != "(" or not isinstance(value, str):
            raise _Refused("not arithmetic")
        tokens.take()
        part = _expression(tokens, 1, depth - 1)
        tokens.expect(")")
        if not isinstance(part, str):
            raise _Refused("not arithmetic")
        value = value.count(part)
    return value


def _literal(token: str) -> int | float:
    if "." in token:
        return _bounded(float(token))
    if token[0] == "0" and token.strip("0"):  # 007, which Python refuses as well
        raise _Refused("not an expression")
    return _bounded(int(token))


def _number(value: Value) -> int | float:
    if isinstance(value, str):
        raise _Refused("not a number")
    return value


def _bounded(number: int | float) -> int | float:
    if isinstance(number, complex):  # a root of a negative number
        raise _Refused("not a real number")
    if isinstance(number, int):
        too_large = number.bit_length() > MAX_BITS
    else:
        too_large = not math.isfinite(number) or abs(number) >= 2.0**MAX_BITS
    if too_large:
        raise _Refused("too large")
    return number


def _divide(a: int | float, b: int | float) -> int | float:
    if isinstance(a, int) and isinstance(b, int) and b != 0 and a % b == 0:
        return a // b
    return a / b


def _power(a: int | float, b: int | float) -> int | float:
    # Both operands are bounded already, but 9**9**9 would be built before it could be measured.
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and a.bit_length() * abs(b) > 2 * MAX_BITS:
        raise _Refused("too large")
    return a**b


_BINARY: dict[str, Callable[[int | float, int | float], int | float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _divide,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": _power,
}


def _format(number: int | float) -> str:
    """`12`, `-3`, `0.3`, `1.5e+20`: an integral value below 2^53 is written without a point, others with 10 digits."""
    if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
        number = int(number)
    return str(number) if isinstance(number, int) else format(number, ".10g")
