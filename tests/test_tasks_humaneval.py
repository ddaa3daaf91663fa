"""HumanEval: the rows, and which program a reply stands for."""

import ast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.humaneval import HUMANEVAL, Problem, checked_program, extract_program, load_humaneval

PROMPT = '''from typing import List
import math


def area(r: float) -> float:
    return math.pi * r**2


def areas(radii: List[float]) -> List[float]:
    """ Areas of circles.
    >>> areas([0.0])
    [0.0]
    """
'''
TEST = "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1.0, 0.0]) == [area(1.0), 0.0]\n"
BODY = "    found = []\n    for r in radii:\n        found.append(area(r))\n    return found\n"
PROBLEM = Problem("Test/0", PROMPT, TEST, "areas", BODY)
WHOLE = PROMPT + BODY


class Remote:
    """What stands for the program in its tests, here without a sandbox."""

    def __init__(self, names):
        self.__dict__.update(names)


def right(reply):
    """Whether the tests pass."""
    checked = checked_program(PROBLEM, reply)
    program = {}
    try:
        exec(checked.program, program)
        exec(checked.tests, {"solution": Remote(program)})
    except (AssertionError, AttributeError, NameError, SyntaxError, TypeError):
        return False
    return True


def dedented(text):
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        BODY,
        BODY.strip(),
        dedented(BODY),
        "\n\n" + BODY + "\n",
        f"```python\n{WHOLE}```",
        f"Certainly!\n\n```python\n{WHOLE}\n```\nIt runs in O(n).\n```\nareas([1])\n```",
        f"```bash\npip install numpy\n```\nthen\n```py\n{WHOLE}```",
        f"```\n{BODY}```",
        f"```Python\n{BODY.strip()}\n```",
        f"```python\n{WHOLE}",
        f"1. Like this:\n   ```python\n{WHOLE}\n   ```",
        "def areas(radii):\n    return [area(r) for r in radii]",
        "def areas(radii: List[float]):\n    return [math.pi * r * r for r in radii]",
        "areas = lambda radii: [area(r) for r in radii]",
        "def helper(radii):\n    return [area(r) for r in radii]\n\nareas = helper",
        "return [area(r) for r in radii]",
        "    def one(r):\n        return area(r)\n    return [one(r) for r in radii]",
        "def check(f):\n    pass\n\n" + WHOLE,
    ],
)
def test_replies_that_are_right(reply):
    assert right(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot do that.",
        "```python\n```",
        "def areas(radii):\n    return []",
        "def area(r):\n    return 1.0\ndef areas(radii):\n    return [1.0, 1.0]",
        "def check(candidate):\n    pass",
        "check = lambda f: None\ndef areas(radii): return 1",
        "def other(radii):\n    return [area(r) for r in radii]",
        "def areas(radii):\n    return [area(r) for",
        "    return []",
    ],
)
def test_replies_that_are_not(reply):
    assert not right(reply)


def test_the_first_python_block_counts_and_its_indentation_stays():
    assert extract_program("```\na\n```\n```python\n\n  b\n\n```\n```python\nc\n```") == "  b"
    assert extract_program("```json\n{}\n```\n```\na\n```") == "a"
    assert extract_program("    return 1\n") == "    return 1"
    assert extract_program("a `b` c") == "a `b` c"


code = st.text(st.characters(exclude_characters="`\r", exclude_categories=["Cs"]), max_size=80).filter(
    lambda text: text.strip() and len(text.splitlines()) == text.count("\n") + 1
)


@given(code, st.sampled_from(["python", "py", "", "Python"]), st.sampled_from(["", "Here:\n", "a\n\n"]))
def test_a_fenced_program_is_what_it_is_without_its_fence(text, language, before):
    assert extract_program(f"{before}```{language}\n{text}\n```\nafter") == extract_program(text)


@given(st.one_of(st.text(), st.lists(st.sampled_from(["```", "\n", "    ", "python", "def areas(", "return 1", "):", "x"])).map("".join)))  # fmt: skip  # noqa: E501
def test_any_reply_becomes_a_program_that_holds_it(reply):
    checked = checked_program(PROBLEM, reply)
    assert checked.program.startswith(PROMPT.rstrip())
    assert extract_program(reply).strip() in checked.program.replace("\n    ", "\n") or "\n" in extract_program(reply)
    ast.parse(checked.tests)


def test_the_tests_do_not_depend_on_the_reply():
    assert checked_program(PROBLEM, "x").tests == checked_program(PROBLEM, WHOLE).tests


def test_all_published_problems_are_read_and_their_solutions_are_bodies_and_whole_functions(shared_data):
    problems = load_humaneval("test", Folder.at(shared_data / "tasks"))
    assert len(problems) == len({problem.task_id for problem in problems}) == 164
    for problem in problems:
        body = checked_program(problem, problem.canonical_solution).program
        whole = checked_program(problem, f"```python\n{problem.prompt}{problem.canonical_solution}```").program
        for program in (body, whole):
            functions = [node for node in ast.parse(program).body if isinstance(node, ast.FunctionDef)]
            last = [node for node in functions if node.name == problem.entry_point][-1]
            assert len(last.body) > 1  # more than the docstring
            compile(program, problem.task_id, "exec")


def row(**changes):
    return {column: getattr(PROBLEM, column) for column in HUMANEVAL.columns} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entry_point": "other"}, "row 2: the prompt does not define the entry point 'other'"),
        ({"entry_point": None}, "row 2: the prompt does not define the entry point ''"),
        ({"test": "assert True"}, r"row 2: the tests define no check\(candidate\)"),
        ({"prompt": None}, "row 2: the prompt does not define"),
    ],
)
def test_a_broken_row_is_named(tmp_path, changes, message):
    folder = tmp_path / HUMANEVAL.folder
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row(), row(**changes)]), folder / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=message):
        load_humaneval("test", Folder.at(tmp_path))
