"""The calculator: right results, and no text that makes it fail, hang or do anything else."""

import math
import re
import threading
import time

import pytest
from hypothesis import given, settings
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
        ("('banana').count(('an'))", "2"),
        ("1+" * 249 + "1", "250"),
        ("(" * 98 + "1" + ")" * 98, "1"),
        ("-2**2", "-4"),
        ("2**-1**2", "0.5"),
        ("2**3**2", "512"),
        ("-2*-3", "6"),
        ("8--2", "10"),
        ("00+0", "0"),
        ("1./4", "0.25"),
        ("(2)\n*\t(3)", "6"),
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
        ("(" * 240 + "1" + ")" * 240, "too deep"),
        ("-" * 400 + "1", "too deep"),
        ("1**" * 100 + "1", "too deep"),
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


HOSTILE = [
    "9**9**9", "9**9**9**9**9", "2**(2**(2**(2**99)))", "(9**99)**99", "10**10**10%7", "9**-9**9", "9.9**99**99",
    "'a'*10**9", "'a'*1000000000", "('a'+'b').count('a')", "'%s' % 5", "'%99999999999d' % 1", "'{}'.format(1)",
    "''.count.__self__", "().__class__.__base__.__subclasses__()", "'a'.__class__", "'a'.count.__globals__",
    "(1).real", "1 .real", "1..real", "(1).__add__(1)", "'a'.join('b')", "'a'.count('a').bit_length()",
    "lambda: 1", "(lambda x: x)(1)", "f'{1}'", "f'{9**9**9}'", "F\"{exit()}\"", "rb'a'.count(b'a')", "b'a'", "u'a'",
    "'a''b'", "'a' 'b'.count('a')", "'''a'''.count('a')", "...", "Ellipsis", "1...2", "1..", "..1", ".", "1.2.3",
    "nan", "NaN+1", "float('nan')", "inf", "-inf", "1e999", "1e999-1e999", "1E5", "0x10", "0b1", "0o7", "007", "1j",
    "2J*2", "(-1)**.5", "(-8)**(1/3)", "0.0**-1", "0**-0.5", "(x:=5)", "[1]", "[i for i in (1,2)]", "{1:2}", "{1}",
    "(1,)", "1,2", "1<2", "1==1", "not 1", "1 and 2", "1 if 2 else 3", "~1", "1<<9999999", "1>>1", "1|1", "1@1", "1^1",
    "1!=1", "*1", "**1", "await 1", "yield 1", "print(1)", "exec('1')", "eval('1')", "open('/etc/passwd')", "1_000",
    "__import__('os').system('id')", "import os", "del x", "assert 0", "raise", "1;1", "1\n1", "1 # one", "1\\\n+1",
    "\x00", "1\x00", "'\x00'.count('\x00')", "\ud800", "'\ud800'.count('\ud800')", "\udfff+1", "\ufeff1", "\u202e1+1",
    "１+１", "٣+٤", "²", "1²", "½", "①", "Ⅷ", "1\xa0+1", "𝟙+𝟙", "1\u2003+\u20031", "−−1", "∞", "π", "e", "1÷0", "×",
    "()", "(", ")", ")(", "((", "(1", "1)", "(1))", "('a'", "'a", '"a', "'a'.count(", "'a'.count()", "'a'.count(1)",
    "'a'.count('a'", "'a'.count('a'))", "1.count('1')", "(1).count('1')", "'a'.count('a').count('a')", ".count('a')",
    "'a'.count.count('a')", "1+'a'", "-'a'", "'a'+1", "'a'//1", "('a')", "'1'", "1(2)", "(1)(2)", "'a'(1)", "2(3+4)",
    "1 2", "1+", "+", "-", "--", "*", "/", "//", "///", "1***2", "1//0", "1%0", "1/0.0", "5%(1-1)", "1%-0.0",
    "(" * 250, ")" * 250, "(" * 249 + "1" + ")" * 249, "-" * 499 + "1", "+-" * 249 + "1", "--" * 49 + "1",
    "-(" * 160 + "1" + ")" * 160, "1**" * 160 + "1", "1-(" * 120 + "1" + ")" * 120, "'a'.count(" * 40, "1+" * 250,
    "9" * 500, "0." + "0" * 490 + "1", "9" * 400 + ".0", "9*" * 249 + "9", "9." * 200, "1/" * 249 + "3",
    "7%" * 249 + "3", ".1**" * 90 + ".1", "10**120*10**120", "10**119//7", "-(10**119)%7", "1.5%10**119",
    "2.5//10**-119", "(10**119)/(10**118+1)", "(1/3)**(10**9)", "1.0000001**(10**12)", "(10**100)**(10**-100)",
    "0**(10**119)", "(-1)**(10**119)", "1**(10**119)", "(10**119)**0.5", "", " ", "\n", "\t1\n",
    "1" + " " * 498 + "+", " " * 10_000 + "1", "1+1 " * 10_000, "[" * 10_000, "'" * 499, '"' * 500, "'a" * 250,
]  # fmt: skip


def computed_in_time(expressions):
    results = []
    for expression in expressions:
        began = time.thread_time()
        calculation = calculate(expression)
        assert time.thread_time() - began < 0.2, expression
        assert calculation.text
        assert len(calculation.text) < 200
        assert calculation.ok != calculation.text.startswith("error: ")
        if calculation.ok:
            assert math.isfinite(float(calculation.text)), expression
        results.append(calculation)
    return results


def test_no_hostile_expression_fails_or_takes_long():
    results = dict(zip(HOSTILE, computed_in_time(HOSTILE), strict=True))
    computed = {expression for expression, calculation in results.items() if calculation.ok}
    arithmetic = re.compile(r"('[^']*'\.count\('[^']*'\)|[0-9.+\-*/%()\s−×÷])*")
    assert not {expression for expression in computed if not arithmetic.fullmatch(expression)}
    assert {"9**9**9", "'a'*10**9", "10**120*10**120", "()", "１+１", "1e999", "1 2", "2(3+4)"} & computed == set()


@pytest.mark.parametrize("stack_kb", [64, 256, 8192])
def test_it_works_in_any_thread_and_in_several_at_once(stack_kb):
    expected = computed_in_time(HOSTILE)
    found = []
    before = threading.stack_size(stack_kb * 1024)
    try:
        threads = [threading.Thread(target=lambda: found.append(list(map(calculate, HOSTILE)))) for _ in range(4)]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(before)
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_it_works_however_deep_its_caller_is():
    def deep(levels):
        return deep(levels - 1) if levels else calculate("(" * 90 + "1" + ")" * 90)

    results = set()
    for levels in range(0, 2000, 5):
        try:
            results.add(deep(levels).text)
        except RecursionError:
            break
    assert results == {"1", "error: too deep"}


fragments = st.sampled_from([*"0123456789+-*/%(). ,'\"", "**", "//", ".count(", "'ab'", "9" * 30, "0.5", "é", "\n"])


@given(st.one_of(st.text(max_size=600), st.lists(fragments, max_size=120).map("".join)))
def test_no_text_makes_it_raise_or_take_long(text):
    computed_in_time([text])


spaces = st.sampled_from(["", "", " "])
literals = st.one_of(
    st.integers(0, 10**6).map(str),
    st.tuples(st.integers(0, 10**4), st.integers(0, 10**4)).map(lambda parts: f"{parts[0]}.{parts[1]}"),
    st.tuples(st.text("ab ", max_size=5), st.text("ab", max_size=2)).map(
        lambda pair: f"'{pair[0]}'.count('{pair[1]}')"
    ),
)
expressions = st.recursive(
    literals,
    lambda inner: st.one_of(
        st.tuples(inner, spaces, st.sampled_from(["+", "-", "*", "//", "%", "**"]), spaces, inner).map("".join),
        st.tuples(st.sampled_from("+-"), inner).map("".join),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=10,
)


@settings(max_examples=60)
@given(expressions, st.sampled_from(["", " / 7", " / .25", "/ (-3)"]))  # inside, our exact quotients would differ
def test_any_expression_is_worth_what_python_says(expression, divided):
    expression = f"({expression}){divided}"
    calculation = calculate(expression)
    if calculation.text in ("error: too large", "error: too long", "error: too deep"):
        return  # some of them would keep Python busy for years
    try:
        value = eval(expression)
    except ZeroDivisionError:
        assert calculation.text == "error: division by zero"
        return
    if isinstance(value, complex):
        assert calculation.text == "error: not a real number"
        return
    assert calculation.ok, calculation
    if isinstance(value, int):
        assert calculation.text == str(value)
    else:
        assert math.isclose(float(calculation.text), value, rel_tol=1e-9)


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
