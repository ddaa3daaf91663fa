"""Whose rights a generated program has: an id of its own where there is one, in containers that know few users too."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.eval.sandbox_walls import NOBODY, id_ranges, users_within

ALL_IDS = "         0          0 4294967295\n"
FEW_IDS = "         0     100000      65536\n"  # rootless Podman, userns-remap, Kubernetes with user namespaces
ONLY_ROOT = "0 1000 1\n"

INSIDE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from nanochat_ray.eval.sandbox_filters import check, libc
check(libc.unshare(0x10000000))
print("in a user namespace of its own", flush=True)
sys.stdin.readline()
from nanochat_ray.eval.sandbox import run_program
program = "import os\\nprint([os.getuid(), os.getgid(), os.getgroups()], flush=True)\\ndef f(x): return x"
right = run_program(program, "assert solution.f(3) == 3")
wrong = run_program(program, "assert solution.f(3) == 4")
threads = "import threading, time\\nts = [threading.Thread(target=time.sleep, args=(0.3,)) for _ in range(6)]\\n"
threads += "for t in ts: t.start()\\nfor t in ts: t.join()\\ndef f(x): return x"
with ThreadPoolExecutor(4) as pool:
    at_once = list(pool.map(lambda _: run_program(threads, "assert solution.f(3) == 3").detail, range(4)))
print(json.dumps([right.outcome, right.detail, right.stdout, right.walls, wrong.outcome, at_once]))
"""


def in_user_namespace(uid_map: str, gid_map: str, groups: str) -> list:
    """What INSIDE prints where only these ids are known; a visible skip where the system makes no such namespace."""
    code = [sys.executable, "-c", INSIDE]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as us:
        if not us.stdout.readline():
            pytest.skip(f"this system makes no user namespaces: {us.communicate()[1].splitlines()[-1]}")
        try:
            write(us.pid, "setgroups", groups)
            write(us.pid, "uid_map", uid_map)
            write(us.pid, "gid_map", gid_map)
        except PermissionError as error:
            us.kill()
            pytest.skip(f"this user may not map these ids: {error}")
        said, errors = us.communicate("\n")
    assert us.returncode == 0, errors
    return json.loads(said)


def write(pid: int, name: str, text: str) -> None:
    with open(f"/proc/{pid}/{name}", "w") as file:
        file.write(text)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="user namespaces are Linux's")
def test_where_a_container_knows_few_users_a_program_is_nobody():
    outcome, detail, told, walls, wrong, at_once = in_user_namespace("0 0 65536", "0 0 65536", "allow")
    assert (outcome, detail, wrong) == ("passed", "", "failed")
    assert told == f"{[NOBODY, NOBODY, []]}\n"
    assert "user" in walls
    assert at_once == [""] * 4  # nobody's threads are counted together


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="user namespaces are Linux's")
def test_where_only_root_is_known_a_program_runs_behind_the_other_walls():
    # what every user may map, if the system lets them make user namespaces at all
    outcome, detail, told, walls, wrong, _ = in_user_namespace(f"0 {os.geteuid()} 1", f"0 {os.getegid()} 1", "deny")
    assert (outcome, detail, wrong) == ("passed", "", "failed")
    assert told.startswith("[0, 0, ")
    assert "user" not in walls
    assert "limits" in walls


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="user namespaces are Linux's")
def test_where_groups_cannot_be_left_a_program_keeps_its_user():
    outcome, detail, told, walls, wrong, _ = in_user_namespace("0 0 65536", "0 0 65536", "deny")
    assert (outcome, detail, wrong) == ("passed", "", "failed")
    assert told.startswith("[0, 0, ")
    assert "user" not in walls


@pytest.mark.parametrize(
    ("uid_map", "gid_map", "users"),
    [
        (ALL_IDS, ALL_IDS, (1 << 30, (1 << 30) + 1)),
        (FEW_IDS, FEW_IDS, (NOBODY, NOBODY)),
        (ALL_IDS, FEW_IDS, (NOBODY, NOBODY)),
        (FEW_IDS, ALL_IDS, (NOBODY, NOBODY)),
        (ONLY_ROOT, ONLY_ROOT, None),
        (ALL_IDS, ONLY_ROOT, None),
        (ONLY_ROOT, FEW_IDS, None),
        ("0 1000 1\n1 100000 65533\n", FEW_IDS, None),  # 65534 is the first that is missing
        ("0 1000 1\n1 100000 65534\n", FEW_IDS, (NOBODY, NOBODY)),
        (f"0 0 1\n{1 << 30} 5 1\n", ALL_IDS, None),  # the judge's, but not the program's
        (f"0 0 1\n{1 << 30} 5 1\n{(1 << 30) + 1} 9 1\n", ALL_IDS, (1 << 30, (1 << 30) + 1)),
        ("", "", None),  # a namespace without maps
    ],
)
def test_judge_and_program_have_ids_of_their_own_or_nobodys_or_none(uid_map, gid_map, users):
    assert users_within(1 << 30, [id_ranges(uid_map), id_ranges(gid_map)]) == users


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2**32 - 1), st.integers(1, 20)), max_size=5))
def test_a_map_knows_the_ids_that_any_of_its_lines_covers(lines):
    ranges = id_ranges("".join(f"{inside:10} {outside:10} {count:10}\n" for inside, outside, count in lines))
    known = {inside + n for inside, _, count in lines for n in range(count)}
    assert {number for number in range(100) if any(number in each for each in ranges)} == known
