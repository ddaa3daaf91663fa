"""The sandbox with programs that mean well: what passes, what is told, what goes between a program and its tests."""

import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UserError
from nanochat_ray.eval import sandbox
from nanochat_ray.eval.sandbox import Limits, Outcome, described, protections, run_program
from nanochat_ray.eval.sandbox_judge import ProgramEnded, as_json, from_json
from nanochat_ray.eval.sandbox_walls import WALLS
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.humaneval import checked_program, load_humaneval

TESTS = """
def check(f):
    assert f(3) == 9
    assert f(x=-4) == 16, "negative"
check(solution.square)
"""


@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        ("def square(x): return x * x", Outcome.PASSED, ""),
        ("class square:\n  def __new__(cls, x): return x * x", Outcome.PASSED, ""),
        ("import math, functools\nsquare = functools.partial(lambda x, n: math.pow(x, n), n=2)", Outcome.PASSED, ""),
        ("def square(x): return x", Outcome.FAILED, "AssertionError: assert f(3) == 9"),
        ("def square(x): return x * abs(x)", Outcome.FAILED, "AssertionError: negative"),
        ("def square(x): return 1 / 0", Outcome.FAILED, "ZeroDivisionError: division by zero"),
        ("def squared(x): return x * x", Outcome.FAILED, "AttributeError: module 'solution' has no attribute 'square'"),
        ("import numpy", Outcome.FAILED, "ModuleNotFoundError: No module named 'numpy'"),
        ("if __name__ == '__main__': raise ValueError\nsquare = lambda x: x * x", Outcome.PASSED, ""),
    ],
)
def test_a_program_passes_when_its_tests_do_and_else_says_why(program, outcome, detail):
    result = run_program(program, TESTS)
    assert (result.outcome, result.detail) == (outcome, detail)
    assert result.passed == (outcome == Outcome.PASSED)


def test_what_a_program_writes_is_kept_up_to_a_limit():
    program = (
        "import sys, os\nprint('é' * 9, flush=True)\nsys.stderr.write('no newline')\nos.write(1, b'\\xff' + b'x' * 99)"
    )
    result = run_program(program, limits=Limits(kept_bytes=50))
    assert result.passed
    assert result.stdout.startswith("é" * 9 + "\n\ufffdxxx")
    assert len(result.stdout) == 9 + 1 + 50 - 19
    assert result.stderr == "no newline"


def test_a_program_finds_an_empty_folder_that_is_its_home_and_temporary_folder_and_no_environment():
    program = (
        "import os, tempfile\nhere = os.getcwd()\nfound = os.listdir()\n"
        "open('file', 'w').write('text')\nwhere = lambda: [here, os.path.expanduser('~'), tempfile.gettempdir()]\n"
        "def read(): return [found, open('file').read(), sorted(os.environ)]"
    )
    tests = (
        "assert len(set(solution.where())) == 1\n"
        "assert solution.read() == [[], 'text', ['HOME', 'LANG', 'PATH', 'TMPDIR']]"
    )
    assert run_program(program, tests).detail == ""


def test_what_a_program_does_to_its_arguments_is_not_seen():
    assert run_program(
        "def f(x):\n  x.append(1)\n  return x", "a = []\nassert solution.f(a) == [1]\nassert a == []"
    ).passed


def test_sets_have_one_order_and_random_tests_draw_the_same_in_every_run():
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e'})"
    tests = "import random\nassert False, (solution.f(), random.random())"
    (detail,) = {run_program(program, tests).detail for _ in range(3)}
    assert "'a'" in detail


def test_many_threads_may_run_programs_at_once():
    programs = [f"def square(x): return x * x + {n % 2}" for n in range(12)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda program: run_program(program, TESTS), programs))
    assert [result.passed for result in results] == [n % 2 == 0 for n in range(12)]


def test_protections_name_every_wall_as_standing_or_missing():
    walls = run_program("").walls
    told = protections()
    assert told == described(walls)
    assert len(told) == 1 + len(WALLS)
    assert sum(line.startswith("NOT in force") for line in told) == len(WALLS) - len(walls)
    assert "limits" in walls


@given(st.sets(st.sampled_from(WALLS)))
def test_the_walls_of_any_machine_are_described_each_by_one_line_whatever_their_order(walls):
    told = described(sorted(walls))
    assert told == described(frozenset(walls))
    standing = {line for line in told[1:] if not line.startswith("NOT in force here: ")}
    assert len(standing) == len(walls)
    assert len(set(told)) == 1 + len(WALLS)
    assert standing == set(described(WALLS)[1:]) & set(told)


def test_walls_are_left_out_when_asked_and_unknown_ones_are_refused():
    assert not {"seccomp", "landlock"} & set(run_program("", without=("seccomp", "landlock")).walls)
    with pytest.raises(ValueError, match="moat"):
        run_program("", without=("moat",))


def test_a_keeper_that_is_killed_is_an_error_and_nobodys_verdict(monkeypatch):
    started = []
    start = sandbox.subprocess.Popen
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[0])

    def kill():
        while not started:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(started[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="sandbox for generated programs broke: its keeper ended with -9"):
        run_program("import time\ntime.sleep(60)", TESTS)
    killer.join()
    deadline = time.monotonic() + 5
    while left_of(started[0].args[-1]):
        assert time.monotonic() < deadline, "the judge and the program outlived their keeper"
        time.sleep(0.02)


def left_of(folder):
    """Processes of a run, which have its folder in their command lines."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if folder in (process.info["cmdline"] or [])[-1:] and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**99), 10**99) | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=4)
        | st.frozensets(st.integers() | st.text(), max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
    ),
    max_leaves=12,
)


@given(plain | st.fractions() | st.decimals(allow_nan=False) | st.complex_numbers(allow_nan=False))
def test_plain_data_goes_over_unchanged(value):
    import json

    back = from_json(json.loads(json.dumps(as_json(value))))
    assert repr(back) == repr(value) or back == value
    assert type(back) is type(value)


KINDS = [
    "list", "dict", "set", "int", "complex", "bytes", "bytearray", "Fraction", "Decimal", "iterator", "object", "eval",
]  # fmt: skip


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(
    st.text(max_size=3), inner)) | st.tuples(st.sampled_from(KINDS), st.integers() | st.text(max_size=3)
                                             | st.lists(st.integers())).map(list))  # fmt: skip
def test_whatever_is_sent_becomes_plain_data_or_is_refused(sent):
    try:
        value = from_json(sent)
    except ProgramEnded:
        return
    assert type(value).__module__ in ("builtins", "fractions", "decimal", "nanochat_ray.eval.sandbox_judge")


def test_what_is_no_plain_data_equals_nothing_and_iterators_are_read():
    strange = from_json(as_json(object()))
    assert strange != from_json(as_json(object()))
    assert list(from_json(as_json(map(str, [1, 2])))) == ["1", "2"]
    assert math.isnan(from_json(as_json(math.nan)))


@pytest.mark.slow
def test_every_canonical_solution_of_humaneval_passes_and_no_empty_one_does(shared_data):
    problems = load_humaneval("test", Folder.at(shared_data / "tasks"))

    def verdicts(reply_of):
        programs = [checked_program(problem, reply_of(problem)) for problem in problems]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda each: run_program(each.program, each.tests), programs))

    right = verdicts(lambda problem: problem.canonical_solution)
    assert {p.task_id: r.detail for p, r in zip(problems, right, strict=True) if not r.passed} == {}
    assert len(right) == 164
    wrong = verdicts(lambda problem: "    return None")
    assert {p.task_id for p, r in zip(problems, wrong, strict=True) if r.passed} == set()


@pytest.mark.ray
def test_it_runs_inside_ray_actors(ray_cluster):
    import ray

    @ray.remote(num_cpus=0.5)
    class Runner:
        def run(self, program):
            return run_program(program, TESTS).outcome

    runners = [Runner.options(max_concurrency=2).remote() for _ in range(2)]
    programs = ["def square(x): return x * x", "def square(x): return x", "import sys; sys.exit(0)"]
    assert ray.get([runner.run.remote(program) for runner in runners for program in programs]) == [
        Outcome.PASSED, Outcome.FAILED, Outcome.FAILED,
    ] * 2  # fmt: skip
