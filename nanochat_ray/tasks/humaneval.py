"""HumanEval: a function's head and docstring, to be completed; tests decide. From a reply to a program and its tests.

Chen et al., "Evaluating Large Language Models Trained on Code", 2021. Columns task_id, prompt (imports, helpers, the
head with its docstring), canonical_solution (the body), test (defines `check(candidate)`) and entry_point.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from textwrap import indent

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.public_sets import PublicSet, read_split

HUMANEVAL = PublicSet(
    "openai/openai_humaneval",
    "openai_humaneval",
    "humaneval/openai_humaneval",
    ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
)

# A fence that is never closed holds the rest: the reply was cut off there.
_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py")


@dataclass(frozen=True)
class Problem:
    """One problem; every field is Python source, as published."""

    task_id: str
    prompt: str
    test: str
    entry_point: str
    canonical_solution: str


@dataclass(frozen=True)
class CheckedProgram:
    """What the sandbox is to run: the program, not trusted, and its tests, which call it as `solution.<name>`."""

    program: str
    tests: str


def load_humaneval(split: str, tasks: Folder | None) -> list[Problem]:
    """All problems of `test`, the only split, from a tasks folder or (None) from the hub.

    Raises:
        UserError: the split cannot be read, or a row has no prompt for its entry point or no tests.
    """
    problems = []
    for where, row in read_split(HUMANEVAL, split, tasks):
        problem = Problem(**{column: row[column] or "" for column in HUMANEVAL.columns})
        if not problem.entry_point.isidentifier() or f"def {problem.entry_point}(" not in problem.prompt:
            raise UserError(f"{where}: the prompt does not define the entry point {problem.entry_point!r}")
        if "def check(" not in problem.test:
            raise UserError(f"{where}: the tests define no check(candidate)")
        problems.append(problem)
    return problems


def extract_program(reply: str) -> str:
    """The code in a reply: its first block fenced as Python, else its first fenced without a language, else all of it.

    Indentation stays, blank lines around it go.
    """
    blocks = [(language.lower(), code) for language, code in _BLOCK.findall(reply)]
    python = [code for language, code in blocks if language in _PYTHON]
    nameless = [code for language, code in blocks if not language]
    code = (python or nameless or [reply])[0]
    return re.sub(r"\A(?:[ \t]*\n)+", "", code).rstrip()


def checked_program(problem: Problem, reply: str) -> CheckedProgram:
    """The program that a reply stands for, and the problem's tests.

    The prompt comes first, for its imports and helpers. A whole function replaces the one it begins; a mere body is
    indented, if it is not, to continue it. What is neither stays as it is, and fails.

    The tests have the prompt too, whose helpers some of them call; their own entry point is the program's, whatever
    else the program defines: its `check` is not the one that is run.
    """
    name = problem.entry_point
    tests = f"_candidate = solution.{name}\n{problem.prompt}\n{problem.test}\n{name} = _candidate\ncheck({name})\n"
    return CheckedProgram(program=_complete(problem, extract_program(reply)), tests=tests)


def _complete(problem: Problem, code: str) -> str:
    whole = f"{problem.prompt.rstrip()}\n\n\n{code}\n"
    if _defines(code, problem.entry_point):
        return whole
    head = problem.prompt.rstrip() + "\n"
    # Three ways to indent a body: it is; its first line is not, where the reply lost the blanks in front; nothing is.
    # Right is the one by which most of it comes into the function.
    bodies = [code, "    " + code, indent(code, "    ")]
    lengths = [_length(head + body, problem.entry_point) for body in bodies]
    if max(lengths) <= _length(head, problem.entry_point):
        return whole
    return f"{head}{bodies[lengths.index(max(lengths))]}\n"


def _defines(code: str, name: str) -> bool:
    """Whether code gives a value to a name at its top level; for code that does not parse, whether it seems to."""
    tree = _parsed(code)
    if tree is None:
        return re.search(rf"^(?:async +)?def +{name}\b", code, re.MULTILINE) is not None
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=found) | ast.AsyncFunctionDef(name=found) | ast.ClassDef(name=found):
                names = [found]
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=found)):
                names = [found]
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names = [alias.asname or alias.name for alias in aliases]
            case _:
                names = []
        if name in names:
            return True
    return False


def _length(code: str, name: str) -> int:
    """Number of statements in the function of that name; 0 where there is none."""
    tree = _parsed(code)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name] if tree else []
    return len(functions[-1].body) if functions else 0


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
