"""The chat page in a real browser: asking, stopping, asking again, and what is kept of it."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.fake_chat_scripts import MARKDOWN, call, finish, say
from tests.page_browser import (
    another_tab,
    ask,
    finished,
    message_box,
    more,
    questions,
    replies,
    send,
    stored,
    titles,
    visitor,
)

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser, api):
    with visitor(browser, api.url, permissions=["clipboard-read", "clipboard-write"], accept_downloads=True) as page:
        yield page


def clipboard(page) -> str:
    return page.evaluate("navigator.clipboard.readText()")


def saved_file(page, act) -> tuple[str, str]:
    """(name, text) of the file that `act` saves."""
    with page.expect_download() as download:
        act()
    return download.value.suggested_filename, Path(download.value.path()).read_text(encoding="utf-8")


def test_a_question_is_answered_and_the_answer_streams(page):
    send(page, "slow")
    expect(questions(page)).to_have_text("slow")
    expect(replies(page)).to_contain_text("tick tick")
    length = len(replies(page).inner_text())
    expect(replies(page)).to_contain_text("tick " * (length // 5 + 5))  # more has come since
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator(".msg.assistant")).to_have_attribute("aria-busy", "true")


@pytest.mark.parametrize("key", [None, "Escape"])
def test_stop_ends_the_reply_and_the_request_behind_it(page, api, key):
    send(page, "slow")
    expect(replies(page)).to_contain_text("tick tick")
    page.keyboard.press(key) if key else page.get_by_role("button", name="Stop").click()
    expect(page.locator("#log").get_by_text("Stopped.")).to_be_visible()
    text = replies(page).inner_text()
    page.wait_for_timeout(250)
    assert replies(page).inner_text() == text
    assert api.asked[0].gone
    assert len(api.asked) == 1  # nothing else is sent
    assert stored(page)[0]["messages"][1]["end"] == "stopped"


def test_regenerate_asks_the_same_again_under_a_new_key(page, api):
    ask(page, "hello")
    page.get_by_role("button", name="Regenerate").click()
    expect(replies(page)).to_have_text("Hello from the script.")
    finished(page)
    first, second = api.asked
    assert first.body == second.body
    assert first.key != second.key
    assert second.last_id is None
    expect(replies(page)).to_have_count(1)


def test_editing_a_message_asks_again_from_there(page, api):
    ask(page, "hello")
    ask(page, "markdown")
    page.locator(".msg.user").first.hover()
    page.get_by_role("button", name="Edit message").first.click()
    box = page.get_by_role("textbox", name="Edit message")
    expect(box).to_be_focused()
    box.press("Escape")
    expect(questions(page)).to_have_text(["hello", "markdown"])
    page.locator(".msg.user").first.hover()
    page.get_by_role("button", name="Edit message").first.click()
    box.fill("What is 17*23?")
    page.locator(".editor").get_by_role("button", name="Send").click()
    expect(questions(page)).to_have_text(["What is 17*23?"])
    expect(replies(page)).to_contain_text("so it is 391.")
    assert [message["content"] for message in api.asked[-1].body["messages"]] == ["What is 17*23?"]
    expect(titles(page)).to_have_text(["What is 17*23?"])
    finished(page)
    page.get_by_role("button", name="Undo").click()
    expect(questions(page)).to_have_text(["hello", "markdown"])
    expect(titles(page)).to_have_text(["hello"])
    page.reload()
    expect(questions(page)).to_have_text(["hello", "markdown"])


def test_a_call_is_calculating_then_has_its_result_and_goes_back_with_the_next_question(page, api):
    from tests.fake_chat_scripts import gate

    api.scripts["sum"] = [
        say("First "),
        call("", None),
        gate("sum"),
        call("6*7", "42"),
        say(" then "),
        call("1/0", "error: division by zero"),
        say(" end."),
    ]
    send(page, "sum")
    expect(page.locator(".chip.open")).to_have_text("calculating…")
    api.gate("sum").set()
    finished(page)
    expect(page.locator(".chip")).to_have_text(["6*7 = 42", "1/0 error: division by zero"])
    expect(page.locator(".chip.failed")).to_have_count(1)
    expect(replies(page)).to_have_text("First 6*7 = 42 then 1/0 error: division by zero end.")
    ask(page, "hello")
    assert api.asked[-1].body["messages"][1]["content"] == [
        {"type": "text", "text": "First "},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": " then "},
        {"type": "python", "text": "1/0"},
        {"type": "python_output", "text": "error: division by zero"},
        {"type": "text", "text": " end."},
    ]


def test_the_message_and_its_code_can_be_copied(page):
    ask(page, "markdown")
    code = MARKDOWN.split("```python\n")[1].split("\n```")[0]
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.locator(".copy-code")).to_have_text("Copied")
    assert clipboard(page) == code
    page.locator(".msg.assistant").get_by_role("button", name="Copy message").click()
    expect(page.locator(".msg.assistant .acts .done")).to_be_visible()
    assert clipboard(page) == MARKDOWN


def test_under_a_reply_stand_its_tokens_speed_and_time_to_the_first(page, api):
    from tests.fake_chat_scripts import wait

    api.scripts["steady"] = [step for _ in range(10) for step in (say("tick "), wait(0.03))]
    ask(page, "steady")
    expect(page.locator(".readout")).to_have_text(re.compile(r"^10 tokens · \d\d tok/s · first after \d+ ms$"))
    assert api.asked[0].body["stream_options"] == {"include_usage": True}


def test_a_reply_at_its_limit_says_so(page, api):
    api.scripts["much"] = [say("And so on and"), finish("length")]
    ask(page, "much")
    expect(page.locator("#log").get_by_text("The reply reached its length limit.")).to_be_visible()


def test_a_reply_goes_on_while_another_conversation_is_open(page, api):
    from tests.fake_chat_scripts import gate

    api.scripts["patient"] = [say("Begun"), gate("go"), say(" and done.")]
    send(page, "patient")
    expect(replies(page)).to_have_text("Begun")
    page.get_by_role("button", name="New chat").click()
    ask(page, "hello")
    expect(page.locator("#chats .dot")).to_have_count(1)
    api.gate("go").set()
    expect(page.locator("#chats .dot")).to_have_count(0)
    page.get_by_role("button", name="patient", exact=True).click()
    expect(replies(page)).to_have_text("Begun and done.")


def test_conversations_survive_a_reload_and_are_found_by_title_and_text(page):
    ask(page, "What is 17*23?")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()
    ask(page, "hello")
    page.reload()
    expect(questions(page)).to_have_text("hello")  # the open one stays open
    expect(titles(page)).to_have_text(["hello", "What is 17*23?"])
    for words, found in (("17*", ["What is 17*23?"]), ("SCRIPT", ["hello"]), ("nowhere", [])):
        page.get_by_role("searchbox").fill(words)
        expect(titles(page)).to_have_text(found)
    page.get_by_role("searchbox").fill("")
    page.get_by_role("button", name="What is 17*23?", exact=True).click()
    expect(page.locator(".chip")).to_have_text("17*23 = 391")
    page.go_back()
    expect(questions(page)).to_have_text("hello")


def test_a_conversation_can_be_renamed_deleted_and_brought_back(page):
    ask(page, "hello")
    more(page, "hello", "Rename")
    page.get_by_role("textbox", name="New title").fill("Greetings")
    page.keyboard.press("Enter")
    expect(titles(page)).to_have_text(["Greetings"])
    assert stored(page)[0]["title"] == "Greetings"
    more(page, "Greetings", "Rename")
    page.get_by_role("textbox", name="New title").fill("No")
    page.keyboard.press("Escape")
    expect(titles(page)).to_have_text(["Greetings"])
    more(page, "Greetings", "Delete")
    expect(titles(page)).to_have_count(0)
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()
    assert stored(page) == []
    page.get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_text(["Greetings"])
    expect(replies(page)).to_have_text("Hello from the script.")


def test_conversations_are_exported_one_and_all_as_json_and_as_markdown(page):
    ask(page, "What is 17*23?")
    page.get_by_role("button", name="New chat").click()
    ask(page, "hello")

    name, text = saved_file(page, lambda: more(page, "What is 17*23?", "Export as Markdown"))
    assert name == "nanochat-What-is-17-23.md"
    assert text.startswith("# What is 17*23?\n")
    assert "**You**\n\nWhat is 17*23?\n\n**Model**\n\nLet me see: 17*23 = 391 so it is 391.\n" in text

    name, text = saved_file(page, lambda: more(page, "hello", "Export as JSON"))
    assert name == "nanochat-hello.json"
    assert [chat["title"] for chat in json.loads(text)["chats"]] == ["hello"]

    def export_all(kind: str) -> None:
        page.get_by_role("button", name="Export all").click()
        page.get_by_role("menuitem", name=kind).click()

    _, text = saved_file(page, lambda: export_all("All as JSON"))
    assert [chat["title"] for chat in json.loads(text)["chats"]] == ["hello", "What is 17*23?"]
    _, text = saved_file(page, lambda: export_all("All as Markdown"))
    assert text.index("# hello") < text.index("# What is 17*23?")


def test_two_tabs_keep_each_others_conversations_and_see_their_changes(page, api):
    ask(page, "hello")
    other = another_tab(page.context, page.url)
    expect(replies(other)).to_have_text("Hello from the script.")
    ask(other, "What is 17*23?")
    expect(questions(page)).to_have_text(["hello", "What is 17*23?"])  # the same conversation, open in both
    other.get_by_role("button", name="New chat").click()
    ask(other, "markdown")
    page.get_by_role("button", name="New chat").click()
    ask(page, "once more")
    assert sorted(chat["title"] for chat in stored(page)) == ["hello", "markdown", "once more"]
    for tab in (page, other):
        expect(titles(tab)).to_have_text(["once more", "markdown", "hello"])
    more(other, "once more", "Delete")
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()
    expect(page.locator("#toasts")).to_contain_text("deleted in another tab")


def test_settings_are_sent_and_kept_but_the_key_only_for_this_tab(page, api):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("11")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("dialog")).to_be_visible()  # out of range: said, not sent
    fields = {"Temperature": "0", "Top-k": "20", "Top-p": "0.9", "Longest reply": "64", "Seed": "7"}
    for label, value in {**fields, "System prompt": "Be brief.", "API key": "secret-key"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Appearance").select_option("dark")
    page.get_by_label("Seed").press("Enter")
    expect(page.get_by_role("button", name="System prompt Be brief.")).to_be_visible()
    page.reload()
    ask(page, "hello")
    body = api.asked[0].body
    assert {name: body[name] for name in ("temperature", "top_k", "top_p", "max_tokens", "seed")} == {
        "temperature": 0, "top_k": 20, "top_p": 0.9, "max_tokens": 64, "seed": 7,
    }  # fmt: skip
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert "theme" not in body
    assert "system" not in body
    assert api.asked[0].headers["authorization"] == "Bearer secret-key"
    assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    other = another_tab(page.context, api.url)
    ask(other, "hello")
    assert "authorization" not in api.asked[-1].headers


def test_a_suggested_question_is_sent_with_one_click(page):
    page.get_by_role("button", name="Who are you?").click()
    expect(replies(page)).to_have_text("Hello from the script.")


def test_what_cannot_be_read_is_kept_and_the_rest_is_shown(page):
    ask(page, "hello")
    page.evaluate("""() => {
        localStorage.setItem("nanochat_ray/chat/broken", "{not json");
        const odd = { id: "odd", title: "x", time: 1, messages: [{ role: "user", parts: [{ text: 7 }] }] };
        localStorage.setItem("nanochat_ray/chat/odd", JSON.stringify(odd));
        localStorage.setItem("nanochat_ray/settings", "[");
    }""")
    page.reload()
    expect(titles(page)).to_have_text(["hello"])
    expect(page.locator("#chats")).to_contain_text("2 conversations cannot be read. They are left as they are.")
    ask(page, "still works")
    assert page.evaluate("localStorage.getItem('nanochat_ray/chat/broken')") == "{not json"
    _, text = saved_file(page, lambda: page.get_by_role("button", name="Save to a file").click())
    assert json.loads(text)["nanochat_ray/chat/broken"] == "{not json"


def test_a_full_storage_is_said_and_nothing_is_lost_while_the_page_is_open(page):
    page.evaluate("""() => {
        let size = 1 << 22;
        for (let at = 0; size >= 1; at += 1) {
            try { localStorage.setItem(`filler${at}`, "x".repeat(size)); } catch { size >>= 1; }
        }
    }""")
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("no room left")
    page.get_by_role("button", name="New chat").click()
    ask(page, "markdown")
    page.get_by_role("button", name="hello", exact=True).click()
    expect(replies(page)).to_have_text("Hello from the script.")
    _, text = saved_file(page, lambda: page.locator("#storage-export").click())
    assert len(json.loads(text)["chats"]) == 2
    page.evaluate(
        "for (const key of Object.keys(localStorage)) if (key.startsWith('filler')) localStorage.removeItem(key)"
    )
    ask(page, "again")
    more(page, "markdown", "Delete")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert [chat["title"] for chat in stored(page)] == ["hello"]


def test_conversations_of_the_earlier_page_are_read(page):
    chat = {
        "id": "old", "time": 1_700_000_000_000, "title": "From before",
        "messages": [
            {"role": "user", "parts": [{"text": "question"}]},
            {"role": "assistant", "parts": [{"text": "answer "}, {"expression": "1+1", "result": "2"}], "end": "stop"},
            {"role": "user", "parts": [{"text": "cut off"}]},
            {"role": "assistant", "parts": []},
        ],
    }  # fmt: skip
    page.evaluate("(chat) => localStorage.setItem('nanochat_ray/chat/old', JSON.stringify(chat))", chat)
    page.reload()
    page.get_by_role("button", name="From before", exact=True).click()
    expect(replies(page).first).to_have_text("answer 1+1 = 2")
    expect(page.get_by_role("alert")).to_contain_text("The page was closed while this reply was being written.")
    page.get_by_role("button", name="Retry").click()
    expect(replies(page).last).to_have_text("Hello from the script.")


def test_the_text_stays_in_the_box_while_a_reply_is_being_written(page):
    send(page, "slow")
    expect(replies(page)).to_contain_text("tick")
    message_box(page).fill("the next question")
    message_box(page).press("Enter")
    expect(message_box(page)).to_have_value("the next question")
    expect(questions(page)).to_have_count(1)
