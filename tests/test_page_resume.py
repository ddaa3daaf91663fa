"""The chat page when things go wrong: lost connections, lost machines, full servers, replaced models, closed tabs."""

import pytest
from playwright.sync_api import Page, expect

from tests.fake_chat_api import FakeChatApi
from tests.fake_chat_scripts import call, drop, error, gate, raw, refuse, say, state, tokens, wait
from tests.page_browser import (
    another_tab,
    ask,
    finished,
    message_box,
    more,
    notice,
    replies,
    send,
    stored,
    titles,
    visitor,
)

pytestmark = pytest.mark.browser


def alert(page: Page):
    return page.locator("#log").get_by_role("alert")


def health(page: Page):
    return page.locator("#status")


def same_reply(api: FakeChatApi) -> list[str | None]:
    """Last-Event-ID of every request, which all ask for one and the same reply."""
    assert len({asked.key for asked in api.asked}) == 1
    assert all(asked.body == api.asked[0].body for asked in api.asked)
    return [asked.last_id for asked in api.asked]


def test_a_dropped_reply_goes_on_in_place_with_nothing_lost_or_doubled(page, api):
    send(page, "drop")
    expect(notice(page)).to_contain_text("Connection lost, reconnecting…")
    expect(replies(page)).to_have_text("One two three four five six seven eight.")
    finished(page)
    assert same_reply(api) == [None, "m1.4", "m1.8"]
    expect(notice(page)).to_have_count(0)
    expect(page.locator(".readout")).to_contain_text("11 tokens")
    expect(page.locator(".readout")).to_contain_text("resumed after a lost connection")
    assert "request" not in stored(page)[0]["messages"][1]


def test_a_reply_that_broke_before_its_first_word_comes_whole(page, api):
    api.scripts["early"] = [drop(2), say("All of it.")]
    send(page, "early")
    expect(replies(page)).to_have_text("All of it.")
    assert same_reply(api) == [None, None, None]


def test_a_call_that_was_open_when_the_connection_broke_gets_its_result(page, api):
    api.scripts["sum"] = [say("It is "), call("", None), wait(0.2), drop(), call("2+2", "4"), say(".")]
    send(page, "sum")
    expect(replies(page)).to_have_text("It is 2+2 = 4.")
    finished(page)
    expect(page.locator(".chip")).to_have_count(1)
    assert same_reply(api) == [None, "m1.2"]


def test_a_page_loaded_again_in_mid_reply_goes_on_with_the_same_request(page, api):
    api.scripts["halves"] = [
        *tokens("The first half "),
        call("", None),
        gate("rest"),
        call("1+1", "2"),
        *tokens(" and the rest."),
    ]
    send(page, "halves")
    expect(page.locator(".chip.open")).to_be_visible()
    page.keyboard.press("Control+k")
    send(page, "/temp 2")  # concerns later replies only: this one must be asked for with the same body
    page.go_back()
    page.reload()
    expect(page.locator(".chip.open")).to_be_visible()
    api.gate("rest").set()
    expect(replies(page)).to_have_text("The first half 1+1 = 2 and the rest.")
    finished(page)
    assert same_reply(api) == [None, "m1.5"]
    assert api.asked[0].gone


def test_a_reply_from_long_ago_is_continued_only_when_asked(page, api):
    api.scripts["old"] = [*tokens("Long ago "), gate("rest"), say("and now.")]
    send(page, "old")
    expect(replies(page)).to_have_text("Long ago")
    page.evaluate("""() => {
        addEventListener("pagehide", () => {
            const key = Object.keys(localStorage).find((name) => name.startsWith("nanochat_ray/chat/"));
            const chat = JSON.parse(localStorage.getItem(key));
            chat.messages[1].request.at -= 3600_000;
            localStorage.setItem(key, JSON.stringify(chat));
        });
    }""")
    page.reload()
    expect(alert(page)).to_contain_text("The page was closed while this reply was being written.")
    assert len(api.asked) == 1
    api.gate("rest").set()
    page.get_by_role("button", name="Continue").click()
    expect(replies(page)).to_have_text("Long ago and now.")
    assert same_reply(api) == [None, "m1.3"]


def test_another_tab_waits_and_goes_on_when_the_writing_one_is_closed(page, api):
    api.scripts["shared"] = [*tokens("Begun here, "), gate("rest"), say("ended there.")]
    send(page, "shared")
    expect(replies(page)).to_have_text("Begun here,")
    while not stored(page)[0]["messages"][1]["parts"]:  # kept once a second
        page.wait_for_timeout(50)
    other = another_tab(page.context, page.url)
    expect(notice(other)).to_have_text("Another tab is writing this reply.")
    expect(replies(other)).to_have_text("Begun here,")
    message_box(other).fill("me too")
    expect(other.locator("#send")).to_be_disabled()
    page.goto("about:blank")
    expect(notice(other)).to_have_count(0)
    api.gate("rest").set()
    expect(replies(other)).to_have_text("Begun here, ended there.")
    assert same_reply(api) == [None, "m1.3"]


def test_a_queued_request_says_how_many_are_ahead(page, api):
    send(page, "queued")
    expect(notice(page)).to_have_text("Waiting for a free place: 3 ahead of you.")
    api.gate("free").set()
    expect(notice(page)).to_have_text("Waiting for a free place: you are next.")
    expect(replies(page)).to_have_text("At last.")
    expect(notice(page)).to_have_count(0)


def test_a_replica_that_starts_is_said(page, api):
    send(page, "starting")
    expect(notice(page)).to_contain_text("Starting a replica of the model")
    api.gate("started").set()
    expect(replies(page)).to_have_text("Awake now.")


def test_a_reply_that_moved_to_another_machine_says_so(page, api):
    send(page, "moved")
    expect(notice(page)).to_have_text("The machine was lost, another one goes on…")
    expect(replies(page)).to_have_text("One")
    api.gate("elsewhere").set()
    expect(replies(page)).to_have_text("One two.")
    expect(page.locator(".readout")).to_contain_text("went on at another machine")


def test_a_full_server_is_counted_down_and_tried_again(page, api):
    send(page, "full")
    expect(notice(page)).to_contain_text("The server is full; trying again soon.")
    expect(notice(page)).to_contain_text("2 s")
    expect(notice(page)).to_contain_text("1 s")
    expect(replies(page)).to_have_text("There was a place.")
    assert same_reply(api) == [None, None]


def test_a_server_that_filled_up_in_mid_reply_is_tried_again_for_the_rest(page, api):
    full = error("no place left for it", "overloaded", times=1)
    api.scripts["squeezed"] = [*tokens("Half and "), full, say("half.")]
    send(page, "squeezed")
    expect(notice(page)).to_contain_text("The server is full; trying again soon.")
    expect(replies(page)).to_have_text("Half and half.")
    assert same_reply(api) == [None, "m1.3"]


def test_trying_now_ends_the_wait_and_stop_ends_the_reply(page, api):
    starting = refuse(503, "no replica yet", "starting", "60", times=2)
    api.scripts["asleep"] = [starting, say("Never said.")]
    send(page, "asleep")
    expect(notice(page)).to_contain_text("Starting a replica; trying again soon.")
    page.get_by_role("button", name="Try now").click()
    expect(notice(page)).to_contain_text("60 s")
    assert len(api.asked) == 2
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#log").get_by_text("Stopped.")).to_be_visible()
    assert len(api.asked) == 2


def test_a_replaced_model_cannot_continue_and_regenerate_is_offered(page, api):
    send(page, "replaced")
    expect(alert(page)).to_contain_text(
        "The model was replaced while it was writing, so this reply cannot be continued."
    )
    expect(replies(page)).to_have_text("The old model")
    api.scripts["replaced"] = [say("The new model.")]
    alert(page).get_by_role("button", name="Regenerate").click()
    expect(replies(page)).to_have_text("The new model.")
    assert api.asked[-1].key != api.asked[0].key
    assert api.asked[-1].last_id is None


def test_what_cannot_be_mended_is_said_in_words_with_retry(page, api):
    for script, words in (
        ([say("Half a"), error("the model failed on this machine")], "The model failed on this machine"),
        ([say("Half a"), raw(b"data: <html>\n\n")], "The server sent something this page does not understand: <html>"),
        ([refuse(400, "max_tokens: too many", "invalid_request_error", times=9)], "Max_tokens: too many"),
        ([refuse(418, "", "", times=9)], "The server answered 418."),
    ):
        api.scripts["breaks"] = script
        api.asked.clear()
        ask(page, "breaks")
        expect(alert(page)).to_contain_text(words)
        expect(replies(page)).to_have_text("Half a" if script[0].kind == "delta" else "")
        assert len(api.asked) == 1
        api.scripts["breaks"] = [say("Better.")]
        alert(page).get_by_role("button", name="Retry").click()
        expect(replies(page)).to_have_text("Better.")
        expect(alert(page)).to_have_count(0)
        page.get_by_role("button", name="New chat").click()


def test_a_server_that_wants_a_key_is_given_one(page, api):
    api.scripts["locked"] = [refuse(401, "this server needs an API key", "authentication_error"), say("Welcome.")]
    ask(page, "locked")
    expect(alert(page)).to_contain_text("This server needs an API key")
    alert(page).get_by_role("button", name="Enter an API key").click()
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("k-123")
    page.get_by_role("button", name="Done").click()
    api.scripts["locked"] = [say("Welcome.")]
    alert(page).get_by_role("button", name="Retry").click()
    expect(replies(page)).to_have_text("Welcome.")
    assert api.asked[-1].headers["authorization"] == "Bearer k-123"


def test_an_unreachable_server_is_said_and_found_again(page, api):
    for path in ("**/health", "**/v1/chat/completions"):
        page.route(path, lambda route: route.abort())
    send(page, "hello")
    expect(notice(page)).to_contain_text("The server cannot be reached, trying again…")
    page.evaluate("dispatchEvent(new Event('offline'))")
    expect(health(page)).to_have_text("server unreachable")
    page.unroute_all()
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(replies(page)).to_have_text("Hello from the script.")
    expect(health(page)).to_contain_text("tiny-d4")
    expect(alert(page)).to_have_count(0)


def test_after_two_minutes_it_gives_up_and_can_be_continued(browser, api):
    with visitor(browser, api.url) as page:
        page.clock.install()
        api.scripts["gone"] = [*tokens("Half of it "), wait(0.2), drop(), say("and the rest.")]
        page.route("**/v1/chat/completions", lambda route: route.continue_() if len(api.asked) == 0 else route.abort())
        send(page, "gone")
        expect(notice(page)).to_contain_text("Connection lost")
        for _ in range(16):
            page.clock.fast_forward(9_000)
            page.wait_for_timeout(30)
        expect(alert(page)).to_contain_text("The connection was lost and did not come back; this reply is incomplete.")
        page.unroute_all()
        page.get_by_role("button", name="Continue").click()
        expect(replies(page)).to_have_text("Half of it and the rest.")
        assert same_reply(api) == [None, "m1.3"]


def test_a_connection_that_fell_silent_is_given_up_but_not_one_that_keeps_alive(browser, api):
    with visitor(browser, api.url) as page:
        page.clock.install()
        api.scripts["silent"] = [say("So "), gate("keep-alive"), raw(b":\n\n"), gate("rest"), say("far.")]
        send(page, "silent")
        expect(replies(page)).to_have_text("So")
        page.clock.fast_forward(20_000)
        api.gate("keep-alive").set()
        page.wait_for_timeout(200)
        page.clock.fast_forward(20_000)
        page.wait_for_timeout(100)
        assert len(api.asked) == 1
        page.clock.fast_forward(36_000)
        expect(notice(page)).to_contain_text("Connection lost")
        api.gate("rest").set()
        page.clock.fast_forward(1_000)
        expect(replies(page)).to_have_text("So far.")
        assert same_reply(api) == [None, "m1.1"]


def test_the_light_in_the_header_follows_the_servers_health(page, api):
    expect(health(page)).to_have_attribute("data-level", "ok")
    api.health = (503, {"status": "starting a replica", "model": "tiny-d4"})
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(health(page)).to_have_text("tiny-d4starting a replica")
    expect(health(page)).to_have_attribute("data-level", "waiting")
    api.health = (200, {"status": "ok", "model": "tiny-d4"})
    expect(health(page)).to_have_attribute("data-level", "ok")  # it asks by itself


def test_deleting_a_conversation_stops_its_reply_and_does_not_bring_it_back(page, api):
    send(page, "slow")
    expect(replies(page)).to_contain_text("tick tick")
    more(page, "slow", "Delete")
    expect(titles(page)).to_have_count(0)
    page.wait_for_timeout(200)
    assert api.asked[0].gone
    assert stored(page) == []


def test_states_may_come_in_any_number_and_unknown_ones_are_harmless(page, api):
    api.scripts["states"] = [state("dreaming"), raw(b": hello\n\n:\n\n"), state("queued", ahead=1), say("Fine.")]
    ask(page, "states")
    expect(replies(page)).to_have_text("Fine.")


def test_events_cut_anywhere_by_the_network_arrive_whole(page):
    text = (
        ': state {"state":"queued","ahead":2}\n\nid: 7\ndata: {"a":"Grüße 🙂"}\r\n\r\n'
        "event: x\rdata: one\rdata:two\r\r:\n\nid: 9\ndata: lost"
    )
    seen = page.evaluate(
        """async (text) => {
            const { SseParser } = await import("/page/sse.js");
            const whole = new SseParser().push(text);
            const bytes = new SseParser(), decoder = new TextDecoder(), cut = [];
            for (const byte of new TextEncoder().encode(text)) {
                cut.push(...bytes.push(decoder.decode(Uint8Array.of(byte), { stream: true })));
            }
            return [whole, cut];
        }""",
        text,
    )
    assert seen[0] == seen[1]
    assert seen[0] == [
        {"comment": 'state {"state":"queued","ahead":2}'},
        {"data": '{"a":"Grüße 🙂"}', "id": "7"},
        {"data": "one\ntwo", "id": None},
        {"comment": ""},
    ]
