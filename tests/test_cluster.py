"""Joining a cluster; what needs a real one is in the tests of training and of submitted jobs."""

import signal
import socket
import subprocess
import time

import psutil
import pytest

from nanochat_ray import cluster
from nanochat_ray.cluster import connect, ending_all
from nanochat_ray.errors import UserError


def test_an_address_where_nothing_answers_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster answers at 127.0.0.1:{port}; check --address"):
        connect(f"127.0.0.1:{port}").__enter__()
    assert time.monotonic() - began < 10


def test_processes_that_do_not_end_with_the_cluster_are_killed(monkeypatch):
    """As a worker that hangs in its exit; the others are left their time."""
    monkeypatch.setattr(cluster, "END_WITHIN_S", 0.5)
    hanging, ending = (subprocess.Popen(["sleep", seconds]) for seconds in ("60", "0.1"))
    with ending_all([psutil.Process(process.pid) for process in (hanging, ending)]):
        assert hanging.poll() is None
    assert (hanging.wait(5), ending.wait(5)) == (-signal.SIGKILL, 0)
