"""The calculator the model may call: arithmetic and `'text'.count('part')`. Never `eval`.

An expression is parsed to a syntax tree and the tree is walked; whatever is not listed here is an error. Length, depth
and magnitude are bounded before anything is computed, so that no expression is slow.
"""

import ast
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
_THOUSANDS = re.compile(rf"({_QUOTED})|(?<=[0-9]),(?=[0-9]{{3}}(?![0-9]))")
_TYPOGRAPHY = str.maketrans({"×": "*", "÷": "/", "−": "-"})


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
        return Calculation(_format(_value(_parse(expression), MAX_DEPTH)), ok=True)
    except _Refused as error:
        return Calculation(f"error: {error}", ok=False)
    except ZeroDivisionError:
        return Calculation("error: division by zero", ok=False)
    except OverflowError:
        return Calculation("error: too large", ok=False)


def _parse(expression: str) -> ast.expr:
    if len(expression) > MAX_CHARS:
        raise _Refused("too long")
    text = _THOUSANDS.sub(lambda match: match.group(1) or "", expression.strip()).translate(_TYPOGRAPHY)
    # Checked before parsing: names, escapes and odd literals never reach the parser (which would warn about some).
    if not _ALLOWED.fullmatch(text):
        raise _Refused("not arithmetic")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the parser has its own limits on nesting
        raise _Refused("not an expression") from None


def _value(node: ast.expr, depth: int) -> int | float:
    if depth == 0:
        raise _Refused("too deep")
    match node:
        case ast.Constant(value=bool() | str() | bytes() | complex()):
            raise _Refused("not a number")
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, depth - 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left, depth - 1), _value(right, depth - 1)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise _Refused("not arithmetic")


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


_BINARY: dict[type[ast.operator], Callable[[int | float, int | float], int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _format(number: int | float) -> str:
    """`12`, `-3`, `0.3`, `1.5e+20`: an integral value below 2^53 is written without a point, others with 10 digits."""
    if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
        number = int(number)
    return str(number) if isinstance(number, int) else format(number, ".10g")
