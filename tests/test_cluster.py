"""Joining a cluster; what needs a real one is in the tests of training and of submitted jobs."""

import socket
import time

import pytest

from nanochat_ray.cluster import connect
from nanochat_ray.errors import UserError


def test_an_address_where_nothing_answers_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster answers at 127.0.0.1:{port}; check --address"):
        connect(f"127.0.0.1:{port}").__enter__()
    assert time.monotonic() - began < 10
