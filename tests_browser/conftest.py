"""The page in a real Chromium, served by a real API, with a worker that samples from toy checkpoints."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright
from redis import Redis

from service.settings import Settings
from service.store.jobs import JobStore
from service.worker import runner
from tests.conftest import running, serving

pytest_plugins = ["tests.conftest"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=60_000)  # a busy machine samples slowly


def browser_on_path() -> str | None:
    """The system's Chromium; None lets Playwright use its own."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work as root, as in containers; the page under test is our own
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=browser_on_path(), args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session", autouse=True)
def _previews() -> None:
    """Show previews as often as possible: toy networks are quick."""
    runner.LIVE_EVERY_S = 0.05


@pytest.fixture
def address(client: httpx.Client) -> str:
    return str(client.base_url)


@pytest.fixture
def server(shown: Settings, connection: Redis, alive: JobStore) -> Iterator[httpx.Client]:
    """An API and a worker with the settings `shown`, which a module defines."""
    with serving(shown) as client, running(connection, shown):
        yield client


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile with access to the clipboard."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def complaints() -> list[str]:
    """Script errors and violations of the content security policy; a test fails with any left at its end."""
    return []


@pytest.fixture
def page(context: BrowserContext, complaints: list[str]) -> Iterator[Page]:
    page = context.new_page()

    def listen(message: ConsoleMessage) -> None:
        not_ready = message.location["url"].endswith("/readyz")  # 503 without a worker is what the page asks for
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
    """Choose the objects of some pictures by clicking."""
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
