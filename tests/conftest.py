"""Fixtures every test may use."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite shares two cores with its own Ray workers
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25)
settings.load_profile("default")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora, chats and tasks, which are not part of the repository."""
    folder = Path(os.environ.get("NANOCHAT_RAY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"real data not found at {folder}; CI must not skip what needs it; set NANOCHAT_RAY_TEST_DATA")
        pytest.skip(f"real data not found at {folder}; set NANOCHAT_RAY_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def ray_cluster():
    """The one Ray cluster of the session: local, with room for three workers."""
    from nanochat_ray.cluster import connect

    with connect(None, workers=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def s3_store():
    """An S3 server, and in the environment what its clients need."""
    from tests.s3_store import running_store

    with running_store() as store:
        yield store


@pytest.fixture(scope="session")
def chat_server():
    """The one chat server of the session, with a scripted model, in a process and a Ray cluster of its own."""
    from tests.serving import scripted_server

    with scripted_server() as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    """A real Chromium. Not for the whole session: while Playwright runs, nothing else may run an event loop."""
    from tests.page_browser import running_browser

    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def fake_chat_api():
    """The server of the page's tests, which does as it is told."""
    from tests.fake_chat_api import running_fake

    with running_fake() as api:
        yield api


@pytest.fixture
def api(fake_chat_api):
    """The same, as if new for each test."""
    yield fake_chat_api
    fake_chat_api.reset()


@pytest.fixture
def page(browser, api):
    """A fresh visitor's page."""
    from tests.page_browser import visitor

    with visitor(browser, api.url) as page:
        yield page
