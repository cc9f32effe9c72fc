"""The page in a real Chromium, on the API as a real server, with a runner that draws with toy checkpoints."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from service.settings import Settings

pytest_plugins = ["tests.conftest"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=20_000)  # on a busy machine, sampling takes its time


def browser_on_path() -> str | None:
    """A Chromium of the system's; None leaves the choice to Playwright, which has its own."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # root, as in containers, cannot have Chromium's sandbox; the page under test is our own
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=browser_on_path(), args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def settings(settings: Settings) -> Settings:
    """Previews as often as they can be had: toy networks are quick."""
    return settings.model_copy(update={"live_every_s": 0.05})


@pytest.fixture
def address(client: httpx.Client) -> str:
    return str(client.base_url)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile that may copy to the clipboard."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complained of: errors of scripts, and what the content policy forbade. Empty at a test's end,
    unless the test empties it."""
    return []


@pytest.fixture
def page(context: BrowserContext, complaints: list[str]) -> Iterator[Page]:
    page = context.new_page()

    def listen(message: ConsoleMessage) -> None:
        not_ready = message.location["url"].endswith("/readyz")  # 503 without a worker, as the page is to find out
        if message.type in ("error", "warning") and not not_ready:
            complaints.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    assert complaints == []


@pytest.fixture
def opened(page: Page, address: str) -> Page:
    """The page with its labels loaded."""
    page.goto(address)
    page.locator("#picker button").first.wait_for()
    return page


def choose(page: Page, pictures: list[list[str]]) -> None:
    """Chooses the objects of some pictures by clicks."""
    page.get_by_role("button", name="Clear").click()
    for index, labels in enumerate(pictures):
        if index:
            page.get_by_role("button", name="Add a picture").click()
        for label in labels:
            page.get_by_role("button", name=label, exact=True).click()


@pytest.fixture
def compose(opened: Page) -> Callable[[list[list[str]]], None]:
    """`choose` on the opened page."""
    return functools.partial(choose, opened)
