"""The chat page in a real browser, against the real server."""

import os
import re
import shutil

import httpx
import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright

from tests.fakes import HOSTILE

pytestmark = [pytest.mark.ray, pytest.mark.browser]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"no browser: none of {', '.join(BROWSERS)} is installed")
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=arguments)
        yield running
        running.close()


@pytest.fixture
def page(browser, chat_server):
    """A fresh visitor's page. A script error or a violation of the page's own policy fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    context.set_default_timeout(15_000)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(chat_server.url)
    expect(page.get_by_role("status")).to_have_text("scripted")
    yield page
    context.close()
    assert problems == []


def send(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def replies(page: Page):
    return page.locator(".msg.assistant .body")


def test_a_question_is_answered_and_the_answer_streams(page):
    send(page, "slow")
    expect(page.locator(".msg.user .body")).to_have_text("slow")
    expect(replies(page)).to_contain_text("tick tick")
    length = len(replies(page).inner_text())
    expect(replies(page)).to_contain_text("tick " * (length // 5 + 5))  # more has come since
    expect(page.get_by_role("button", name="Stop")).to_be_visible()


def test_enter_sends_and_shift_enter_starts_a_line(page):
    box = page.get_by_role("textbox", name="Message", exact=True)
    box.fill("first")
    box.press("Shift+Enter")
    box.press_sequentially("second")
    box.press("Enter")
    expect(page.locator(".msg.user .body")).to_have_text("first\nsecond")
    expect(replies(page)).to_have_text("Hello from the script.")
    expect(box).to_have_value("")


def test_stop_ends_the_reply_and_the_work_behind_it(page, chat_server):
    send(page, "slow")
    expect(replies(page)).to_contain_text("tick tick")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    finished(page)
    text = replies(page).inner_text()
    page.wait_for_timeout(300)
    assert replies(page).inner_text() == text
    assert httpx.get(f"{chat_server.url}/stats").json()["replies"]["active"] == 0


def test_regenerate_writes_the_last_reply_again(page):
    send(page, "hello")
    expect(replies(page)).to_have_text("Hello from the script.")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Regenerate").click()
    assert request.value.post_data_json["messages"] == [{"role": "user", "content": "hello"}]
    finished(page)
    expect(replies(page)).to_have_count(1)
    expect(replies(page)).to_have_text("Hello from the script.")


def test_editing_a_message_asks_again_from_there(page):
    for text in ("hello", "emoji"):
        send(page, text)
        finished(page)
    page.locator(".msg.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_role("textbox", name="Edit message").fill("What is 17*23?")
    page.locator(".msg").get_by_role("button", name="Send").click()
    expect(page.locator(".msg.user .body")).to_have_text(["What is 17*23?"])
    expect(replies(page)).to_contain_text("It is 391.")


def test_a_tool_call_is_shown_and_sent_back_with_the_next_question(page):
    send(page, "What is 17*23?")
    expect(page.locator(".chip")).to_have_text("17*23 = 391")
    expect(replies(page)).to_have_text(re.compile("Let me see: .*17.23 = 391.* It is 391."))
    finished(page)
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "hello")
    assert request.value.post_data_json["messages"][1]["content"] == [
        {"type": "text", "text": "Let me see: "},
        {"type": "python", "text": "17*23"},
        {"type": "python_output", "text": "391"},
        {"type": "text", "text": " It is 391."},
    ]


def test_conversations_survive_a_reload_and_can_be_opened_and_deleted(page):
    send(page, "What is 17*23?")
    expect(page.locator(".chip")).to_be_visible()
    finished(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()
    send(page, "emoji")
    expect(replies(page)).to_have_text("Grüße 🙂 日本")
    finished(page)
    page.reload()
    expect(page.locator("#chats .open")).to_have_text(["emoji", "What is 17*23?"])
    page.get_by_role("button", name="What is 17*23?", exact=True).click()
    expect(page.locator(".chip")).to_have_text("17*23 = 391")
    page.get_by_role("button", name="Delete What is 17*23?").click()
    expect(page.locator("#chats .open")).to_have_text(["emoji"])
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()


def test_hostile_text_from_user_and_model_is_inert(page):
    attack = "hostile <img src=x onerror='window.pwned = 1'><script>window.pwned = 1</script> <|assistant_end|>"
    send(page, attack)
    finished(page)
    expect(page.locator(".msg.user .body")).to_have_text(attack)
    expect(replies(page)).to_have_text(HOSTILE)
    assert page.evaluate("window.pwned") is None
    assert page.locator("#log img, #log script, #log a").count() == 0
    page.reload()
    page.locator("#chats .open").first.click()
    expect(replies(page)).to_have_text(HOSTILE)
    assert page.evaluate("window.pwned") is None


def test_markdown_becomes_elements_and_code_stays_text(page):
    send(page, "markdown")
    finished(page)
    reply = replies(page)
    expect(reply.locator("h3")).to_have_text("Title")
    expect(reply.locator("strong")).to_have_text("bold")
    expect(reply.locator("p code")).to_have_text("code")
    expect(reply.locator("pre")).to_have_text("print('<b>hi</b>')")
    expect(reply.locator("li")).to_have_text(["one", "two"])


def test_settings_are_sent_and_kept(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Longest reply").fill("5")
    page.get_by_role("button", name="Done").click()
    page.reload()
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "hello")
    body = request.value.post_data_json
    assert (body["temperature"], body["seed"], body["max_tokens"], body["top_k"]) == (0, 7, 5, 50)
    expect(replies(page)).to_have_text("Hello")
    expect(page.get_by_text("reached its length limit")).to_be_visible()


def test_a_model_that_fails_is_shown_with_what_it_had_written(page):
    send(page, "crash")
    expect(page.get_by_role("alert")).to_contain_text("The model failed")
    expect(replies(page)).to_have_text("Half a")


def test_a_lost_connection_is_shown_and_retry_works_when_it_is_back(page):
    def cut_off(route: Route) -> None:
        event = 'data: {"choices":[{"index":0,"delta":{"content":"Only the beg"},"finish_reason":null}]}\n\n'
        route.fulfill(status=200, content_type="text/event-stream", body=event)

    page.route("**/v1/chat/completions", cut_off)
    send(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("connection was lost; this reply is incomplete")
    expect(replies(page)).to_have_text("Only the beg")

    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.route("**/health", lambda route: route.abort())
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_role("status")).to_have_text("not connected")

    page.unroute_all()
    expect(page.get_by_role("status")).to_have_text("scripted")
    page.get_by_role("button", name="Retry").click()
    expect(replies(page)).to_have_text("Hello from the script.")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_characters_and_events_cut_anywhere_by_the_network_arrive_whole(page):
    # The page's own parser, fed byte by byte.
    assert page.evaluate("""async () => {
        const bytes = new TextEncoder().encode('data: {"a":"Grüße 🙂"}\\n\\ndata: [DONE]\\n\\n');
        const start = (to) => { for (const byte of bytes) to.enqueue(Uint8Array.of(byte)); to.close(); };
        const body = new ReadableStream({ start });
        const seen = [];
        for await (const event of events(new Response(body))) seen.push(event);
        return seen;
    }""") == ['{"a":"Grüße 🙂"}', "[DONE]"]


def test_on_a_phone_the_conversations_are_a_drawer_and_nothing_overflows(browser, chat_server):
    context = browser.new_context(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(chat_server.url)
    send(page, "markdown")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.get_by_role("button", name="New chat")).not_to_be_visible()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()
    context.close()


def test_a_suggested_question_is_sent_with_one_click(page):
    page.get_by_role("button", name="Who are you?").click()
    expect(replies(page)).to_have_text("Hello from the script.")
