"""Who waits when all cores are busy."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")

SAY = "; import os; print(os.sched_getscheduler(0))"


def policy_after(code: str) -> int:
    """The policy of a process that has run some code."""
    said = subprocess.run(
        [sys.executable, "-c", "from nanochat_ray.precedence import *; " + code + SAY],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(said.stdout)


def test_what_runs_beside_others_takes_idle_cores_only():
    assert policy_after("only_when_idle()") == os.SCHED_IDLE


def test_what_gives_way_can_take_precedence_again():
    assert policy_after("give_way()") == os.SCHED_BATCH
    assert policy_after("give_way(); take_precedence()") == os.SCHED_OTHER
