"""A visitor of the chat page: a real browser, a fresh profile, and what people do on the page."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}


@contextmanager
def running_browser() -> Iterator[Browser]:
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


@contextmanager
def visitor(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A fresh visitor's page. A script error or a violation of the page's own policy fails the test."""
    usual = {
        "viewport": {"width": 1100, "height": 760},
        "reduced_motion": "reduce",
    }  # nothing moves while it is measured
    context = browser.new_context(**{**usual, **options})
    context.set_default_timeout(10_000)
    problems: list[str] = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("console", lambda line: problems.append(line.text) if _is_problem(line.text) else None)
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#ideas button").first).to_be_attached()
    yield page
    context.close()
    assert not problems, problems


def _is_problem(text: str) -> bool:
    return bool(re.search("content security policy|trusted ?type|trustedhtml|this page failed", text, re.IGNORECASE))


def another_tab(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(url)
    return page


def message_box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message", exact=True)


def send(page: Page, text: str) -> None:
    message_box(page).fill(text)
    page.locator("#send").click()


def finished(page: Page) -> None:
    """The newest reply is closed: its actions are there and the button sends again."""
    expect(page.locator(".msg.assistant").last).to_have_attribute("aria-busy", "false")


def ask(page: Page, text: str) -> None:
    """Send, and wait for the whole reply."""
    send(page, text)
    expect(page.locator(".msg.user .body").last).to_have_text(text)
    finished(page)


def questions(page: Page) -> Locator:
    return page.locator(".msg.user .body")


def replies(page: Page) -> Locator:
    return page.locator(".msg.assistant .body")


def notice(page: Page) -> Locator:
    return page.locator(".notice")


def titles(page: Page) -> Locator:
    return page.locator("#chats .open")


def more(page: Page, title: str, action: str) -> None:
    """Something from a conversation's menu."""
    page.locator("#chats li", has=page.get_by_role("button", name=title, exact=True)).hover()
    page.get_by_role("button", name=f"More for {title}").click()
    page.get_by_role("menuitem", name=action).click()


def stored(page: Page) -> list[dict[str, Any]]:
    """The conversations in the browser's storage."""
    return page.evaluate(
        """() => Object.keys(localStorage).filter((key) => key.startsWith("nanochat_ray/chat/"))
                 .map((key) => JSON.parse(localStorage.getItem(key)))"""
    )
