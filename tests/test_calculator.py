"""The calculator: right results, and no text that makes it fail, hang or do anything else."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.engine.calculator import MAX_CHARS, calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12*7", "84"),
        (" 2 + 2 ", "4"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("-5 + +3", "-2"),
        ("10/4", "2.5"),
        ("10/5", "2"),
        ("1/3", "0.3333333333"),
        ("0.1+0.2", "0.3"),
        (".5*30", "15"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("7%3", "1"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("2**0.5", "1.414213562"),
        ("1,234,567+1", "1234568"),
        ("1,000.5*2", "2001"),
        ("3×4÷2−1", "5"),
        ("99999999999999999999*3", "299999999999999999997"),
        ("10**30/10**29", "10"),
        ("1e3", None),
        ("0*-1.5", "0"),
        ("'strawberry'.count('r')", "3"),
        ('"it\'s, 1,000".count("1,000")', "1"),
        ("'ab'.count('a') + 2", "3"),
        ("''.count('')", "1"),
    ],
)
def test_results(expression, result):
    calculation = calculate(expression)
    assert (calculation.text if calculation.ok else None) == result


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("9**9**9", "too large"),
        ("9**999999999999", "too large"),
        ("10**100*10**100", "too large"),
        ("1" * 400, "too large"),
        ("2.0**999", "too large"),
        ("1/0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0**-1", "division by zero"),
        ("(-8)**0.5", "not a real number"),
        ("1" * (MAX_CHARS + 1), "too long"),
        ("(" * 240 + "1" + ")" * 240, "not an expression"),
        ("-" * 400 + "1", "too deep"),
        ("1+" * 100 + "1", "too deep"),
        ("", "not an expression"),
        ("2+", "not an expression"),
        ("1\x00", "not arithmetic"),
        ("__import__('os')", "not arithmetic"),
        ("().__class__", "not arithmetic"),
        ("'a'*1000", "not a number"),
        ("'a'.upper()", "not arithmetic"),
        ("'a'.count('a','b')", "not arithmetic"),
        ("'a'.count", "not arithmetic"),
        ("1.count('a')", "not an expression"),
        ("x = 1", "not arithmetic"),
        ("1 if 1 else 2", "not arithmetic"),
        ("True+1", "not arithmetic"),
        ("1j*1j", "not arithmetic"),
        ("'\\n'.count('n')", "not arithmetic"),
        ("1,23+1", "not arithmetic"),
        ("(1)(2)", "not arithmetic"),
        ("1;2", "not arithmetic"),
    ],
)
def test_what_is_not_computed_says_why(expression, why):
    calculation = calculate(expression)
    assert not calculation.ok
    assert calculation.text == f"error: {why}"


fragments = st.sampled_from([*"0123456789+-*/%(). ,'\"", "**", "//", ".count(", "'ab'", "9" * 30, "0.5", "é", "\n"])


@given(st.one_of(st.text(max_size=600), st.lists(fragments, max_size=120).map("".join)))
def test_no_text_makes_it_raise_or_take_long(text):
    began = time.process_time()
    calculation = calculate(text)
    assert time.process_time() - began < 0.2
    assert calculation.text
    assert len(calculation.text) < 200


numbers = st.integers(-10_000, 10_000)


@given(numbers, numbers, numbers)
def test_integer_arithmetic_agrees_with_python(a, b, c):
    assert calculate(f"({a}) * ({b}) - ({c})").text == str(a * b - c)
    if c:
        assert calculate(f"({a}) // ({c}) + ({a}) % ({c})").text == str(a // c + a % c)
        assert math.isclose(float(calculate(f"({a}) / ({c})").text), a / c, rel_tol=1e-9)


@given(st.text("abcr ", max_size=40), st.text("abcr", min_size=1, max_size=2))
def test_count_agrees_with_python(text, part):
    assert calculate(f"'{text}'.count('{part}')").text == str(text.count(part))
