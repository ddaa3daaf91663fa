"""The chat page for everyone: by keyboard, with a screen reader, in the dark, on a phone. axe-core looks for faults."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.fake_chat_scripts import error, gate, say, tokens
from tests.page_browser import (
    PHONE,
    ask,
    finished,
    message_box,
    notice,
    questions,
    replies,
    send,
    titles,
    visitor,
)

pytestmark = pytest.mark.browser

AXE = Path(__file__).with_name("vendor") / "axe.min.js"


def faults(page: Page) -> list[str]:
    """axe-core's serious and critical findings, one line each."""
    if page.evaluate("typeof axe === 'undefined'"):
        page.evaluate(f"() => {{ {AXE.read_text()} }}")
    return page.evaluate("""async () => {
        const found = await axe.run(document, { resultTypes: ["violations"] });
        return found.violations.filter(({ impact }) => ["serious", "critical"].includes(impact))
            .flatMap(({ id, nodes }) => nodes.map(({ html, failureSummary }) => `${id}: ${html} ${failureSummary}`));
    }""")


def check_all_states(page: Page, api) -> None:
    """Empty, a conversation with code, a call and an error, the list of commands, the menu, every dialog."""
    assert faults(page) == []
    api.scripts["breaks"] = [say("Half a"), error("the model failed")]
    ask(page, "What is 17*23?")
    ask(page, "markdown")
    ask(page, "breaks")
    page.locator("#scroll").evaluate("(box) => { box.scrollTop = 100; }")
    assert faults(page) == []
    message_box(page).fill("/")
    expect(page.get_by_role("option").first).to_be_visible()
    assert faults(page) == []
    message_box(page).fill("")
    for button in ("Settings", "Help"):
        page.get_by_role("button", name=button).click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert faults(page) == []
        page.keyboard.press("Escape")


def test_axe_finds_no_fault_in_the_light(page, api):
    check_all_states(page, api)
    send(page, "moved")
    expect(notice(page)).to_be_visible()
    page.get_by_role("button", name="More for").click()
    expect(page.get_by_role("menu")).to_be_visible()
    assert faults(page) == []


def test_axe_finds_no_fault_in_the_dark(browser, api):
    with visitor(browser, api.url, color_scheme="dark") as page:
        check_all_states(page, api)
        send(page, "moved")
        expect(notice(page)).to_be_visible()
        assert faults(page) == []


def test_axe_finds_no_fault_on_a_phone(browser, api):
    with visitor(browser, api.url, **PHONE) as page:
        check_all_states(page, api)
        page.get_by_role("button", name="Conversations", exact=True).click()
        expect(page.get_by_role("button", name="New chat")).to_be_visible()
        page.wait_for_timeout(250)  # the drawer is in place, so that axe sees its true colours
        assert faults(page) == []


def test_on_a_phone_nothing_overflows_and_conversations_are_a_drawer(browser, api):
    api.scripts["wide"] = [
        say(f"{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n|{'a|' * 30}\n|{'-|' * 30}\n|{'b|' * 30}\n\n`{'z' * 200}`")
    ]
    with visitor(browser, api.url, **PHONE) as page:

        def check_width() -> None:
            assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [360, 360]
            assert page.evaluate("document.getElementById('scroll').scrollWidth <= innerWidth")

        check_width()
        ask(page, "wide")
        ask(page, "w" * 400)
        check_width()
        assert page.locator("#box").bounding_box()["y"] < 700
        expect(page.get_by_role("button", name="New chat")).not_to_be_visible()
        opener = page.get_by_role("button", name="Conversations", exact=True)
        opener.click()
        new = page.get_by_role("button", name="New chat")
        expect(new).to_be_focused()
        expect(page.locator("#main")).to_have_js_property("inert", True)
        page.keyboard.press("Escape")
        expect(new).not_to_be_visible()
        expect(opener).to_be_focused()
        opener.click()
        new.click()
        expect(page.get_by_text("Ask the model you trained")).to_be_visible()
        check_width()
        page.get_by_role("button", name="Settings").click()
        check_width()
        box = page.get_by_role("dialog").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["height"] <= 700


def test_enter_sends_and_shift_enter_starts_a_line(page):
    box = message_box(page)
    expect(box).to_be_focused()
    box.press_sequentially("first")
    box.press("Shift+Enter")
    box.press_sequentially("second")
    box.press("Enter")
    expect(questions(page)).to_have_text("first\nsecond")
    finished(page)
    expect(box).to_have_value("")
    expect(box).to_be_focused()


def test_keys_begin_a_conversation_edit_the_last_message_and_skip_to_the_box(page):
    ask(page, "hello")
    message_box(page).press("ArrowUp")
    editor = page.get_by_role("textbox", name="Edit message")
    expect(editor).to_be_focused()
    expect(editor).to_have_value("hello")
    editor.fill("hello again")
    editor.press("Enter")
    expect(questions(page)).to_have_text(["hello again"])
    expect(message_box(page)).to_be_focused()
    finished(page)
    page.keyboard.press("Control+k")
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()
    skip = page.get_by_role("link", name="Skip to the message box")
    expect(skip).not_to_be_in_viewport()
    skip.focus()
    expect(skip).to_be_in_viewport()
    assert page.locator("a, button, input, textarea").first.get_attribute("id") == "skip"
    page.keyboard.press("Enter")
    expect(message_box(page)).to_be_focused()


def test_a_menu_and_a_dialog_keep_the_focus_and_give_it_back(page):
    ask(page, "hello")
    opener = page.get_by_role("button", name="More for hello")
    opener.focus()
    page.keyboard.press("Enter")
    items = page.get_by_role("menuitem")
    expect(items.first).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(items.last).to_be_focused()
    page.keyboard.press("Home")
    expect(items.first).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("menu")).to_have_count(0)
    expect(opener).to_be_focused()
    settings = page.get_by_role("button", name="Settings")
    settings.focus()
    page.keyboard.press("Enter")
    for _ in range(15):
        page.keyboard.press("Tab")
        assert page.evaluate(
            "Boolean(document.activeElement.closest('dialog')) || document.activeElement === document.body"
        )
    page.keyboard.press("Escape")
    expect(settings).to_be_focused()


def test_commands_are_suggested_and_chosen_by_keyboard(page, api):
    box = message_box(page)
    box.press_sequentially("/te")
    expect(page.get_by_role("option")).to_have_text(["/tempXTemperature; 0 always takes the likeliest token"])
    expect(box).to_have_attribute("aria-activedescendant", "command-temp")
    box.press("Enter")
    expect(box).to_have_value("/temp ")
    box.press_sequentially("0.25")
    box.press("Enter")
    expect(page.locator("#toasts")).to_contain_text("Temperature: 0.25")
    box.press_sequentially("/")
    box.press("ArrowUp")
    expect(page.get_by_role("option", selected=True)).to_contain_text("/help")
    box.press("Escape")
    expect(page.get_by_role("listbox")).not_to_be_visible()
    box.fill("")
    for line in ("/topk 9", "/max 33", "/seed 5", "/topp 0.5", "/system Answer in French."):
        send(page, line)
    send(page, "//really a message")
    finished(page)
    expect(questions(page)).to_have_text("/really a message")
    body = api.asked[0].body
    assert (body["temperature"], body["top_k"], body["max_tokens"], body["seed"], body["top_p"]) == (
        0.25,
        9,
        33,
        5,
        0.5,
    )
    assert body["messages"][0] == {"role": "system", "content": "Answer in French."}
    box.press_sequentially("/retry")
    box.press("Enter")
    expect(replies(page)).to_have_text("Hello from the script.")
    finished(page)
    assert len(api.asked) == 2
    with page.expect_download() as download:
        send(page, "/export json")
    assert download.value.suggested_filename == "nanochat-really-a-message.json"
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="/really a message", exact=True).click()
    box.press_sequentially("/new")
    box.press("Enter")
    expect(page.get_by_text("Ask the model you trained")).to_be_visible()
    send(page, "/help")
    expect(page.get_by_role("dialog", name="Commands and keys")).to_contain_text("/retry")


def test_a_command_that_makes_no_sense_is_explained(page, api):
    for line, words in {
        "/temp warm": "The temperature must be a number from 0 to 10.",
        "/topk 1.5": "The top-k must be a whole number from 1 to",
        "/dance": "There is no command /dance.",
        "/export pdf": "/export md or /export json",
        "/retry": "There is nothing to write again yet.",
    }.items():
        send(page, line)
        expect(page.locator("#toasts")).to_contain_text(words)
    expect(titles(page)).to_have_count(0)
    assert api.asked == []


def test_a_screen_reader_hears_blocks_and_states_but_not_every_token(page, api):
    page.evaluate("""() => {
        window.heard = [];
        new MutationObserver((changes) => {
            for (const { addedNodes } of changes) for (const node of addedNodes) heard.push(node.textContent);
        }).observe(document.getElementById("announcer"), { childList: true });
    }""")
    api.scripts["spoken"] = [*tokens("First paragraph.\n\nSecond one.\n\n", 3), gate("more"), *tokens("The last.", 3)]
    send(page, "spoken")
    expect(page.locator("#announcer")).to_contain_text("First paragraph.")
    api.gate("more").set()
    finished(page)
    assert page.evaluate("heard") == ["First paragraph.", "Second one.", "The last.", "The reply is complete"]
    assert page.locator("#log").get_attribute("aria-live") == "off"
    expect(page.get_by_role("article", name="Reply")).to_have_count(1)
    expect(page.locator("#announcer")).to_have_attribute("aria-live", "polite")


def test_the_view_follows_the_reply_until_the_reader_scrolls_up(page):
    send(page, "long")
    scroll = page.locator("#scroll")
    away = "(box) => box.scrollHeight - box.scrollTop - box.clientHeight"
    while scroll.evaluate("(box) => box.scrollHeight - box.clientHeight") < 400:
        page.wait_for_timeout(30)
    assert scroll.evaluate(away) < 60
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -300)
    newest = page.get_by_role("button", name="To the newest message")
    expect(newest).to_be_visible()
    place = scroll.evaluate("(box) => box.scrollTop")
    page.wait_for_timeout(200)
    assert scroll.evaluate("(box) => box.scrollTop") == place
    newest.click()
    expect(newest).not_to_be_visible()
    page.wait_for_timeout(200)
    assert scroll.evaluate(away) < 60


def test_the_chosen_theme_is_there_before_the_page_is_drawn(page, api):
    page.evaluate("localStorage.setItem('nanochat_ray/settings', JSON.stringify({ theme: 'dark' }))")
    page.route("**/page/app.js", lambda route: route.abort())
    page.goto(api.url)
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
