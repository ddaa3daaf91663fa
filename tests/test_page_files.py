"""The chat page as it is served: types, validators, policy, and nothing but its own files."""

import asyncio

import pytest

from nanochat_ray.serve.api import api_of
from nanochat_ray.serve.page import PAGE_FOLDER, page_files
from tests.asgi import Answer, Client
from tests.fake_backend import FakeBackend


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "index.html").write_text("<!doctype html><script>1</script><style>a{}</style>ü")
    (tmp_path / "app.js").write_text("export {}")
    (tmp_path / "style.css").write_text("a{}")
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "x.js").write_text("1")
    (tmp_path / "secret.env").write_text("no")
    return tmp_path


def get(folder, path: str, headers: dict[str, str] | None = None) -> Answer:
    return asyncio.run(Client(api_of(FakeBackend(), page=folder)).ask(path, headers=headers))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/index.html", "text/html; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/vendor/x.js", "text/javascript; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
    ],
)
def test_files_have_their_type_and_are_asked_for_again_only_if_they_changed(folder, path, kind):
    answer = get(folder, path)
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    tag = answer.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = get(folder, path, {"if-none-match": known})
        assert (again.status, again.content, again.headers["etag"]) == (304, b"", tag)
    (folder / "index.html").write_text("new")
    (folder / "app.js").write_text("new")
    assert get(folder, path, {"if-none-match": '"other"'}).status == 200


def test_the_policy_allows_the_folder_and_exactly_what_stands_in_the_page(folder):
    policy = get(folder, "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/secret.env", "/page/../api.py", "/page//etc/passwd", "/page/vendor"]
)
def test_nothing_else_is_served(folder, path):
    assert get(folder, path).status == 404


def test_a_folder_without_a_page_is_no_reason_to_fail(tmp_path):
    assert get(tmp_path, "/").status == 404
    assert get(tmp_path / "missing", "/").status == 404


def test_the_real_page_needs_no_key_and_nothing_from_elsewhere():
    files = page_files()
    assert PAGE_FOLDER.is_dir()
    for name, file in files.items():
        if name.endswith(".html"):
            html = file.content.decode()
            assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in html
