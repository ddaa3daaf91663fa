"""The chat page in a real browser against the real server; its details are tested in tests/test_page_*.py."""

import httpx
import pytest
from playwright.sync_api import expect

from tests.fakes import HOSTILE
from tests.page_browser import ask, send, visitor

pytestmark = [pytest.mark.ray, pytest.mark.browser]


@pytest.fixture
def page(browser, chat_server):
    with visitor(browser, chat_server.url) as page:
        yield page


def test_a_question_is_answered_with_the_calculator(page):
    expect(page.get_by_role("status").first).to_contain_text("scripted")
    ask(page, "What is 17*23?")
    reply = page.locator(".msg.assistant .body").last
    expect(reply).to_contain_text("17*23")
    expect(reply).to_contain_text("391")
    expect(reply).to_contain_text("It is 391.")


def test_hostile_text_of_the_model_is_inert(page):
    ask(page, "hostile")
    reply = page.locator(".msg.assistant .body").last
    expect(reply).to_contain_text("still here")
    assert page.evaluate("window.pwned") is None
    assert "<script>" in HOSTILE
    assert reply.locator("script, img, iframe").count() == 0


def test_stop_ends_the_work_behind_the_reply(page, chat_server):
    send(page, "slow")
    expect(page.locator(".msg.assistant .body").last).to_contain_text("tick")
    page.locator("#send").click()
    expect(page.locator(".msg.assistant").last).to_have_attribute("aria-busy", "false")
    page.wait_for_timeout(2000)
    (replica,) = httpx.get(f"{chat_server.url}/stats").json()["replicas"]
    assert (replica["running"], replica["kv_used"]) == (0, 0)
