"""The page on a slow or flaky connection: what is lost is asked for again, and what cannot be had is said in words."""

from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from service.worker.runner import Runner
from tests_browser.test_page import LISTS, drawn

Compose = Callable[[list[list[str]]], None]


@pytest.mark.parametrize("answers", ["**/generate", "**/images/0.png"])
def test_an_answer_that_was_cut_off_is_asked_for_again(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client, complaints: list[str], answers: str
) -> None:
    """The job is the same one, and no picture stays empty."""
    asked = list[str]()

    def cut_the_first(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) > 1:
            route.continue_()
        elif route.request.method == "POST":
            route.fulfill(status=202, content_type="application/json", body=route.fetch().text()[:40])
        else:
            route.abort()

    opened.route(answers, cut_the_first)
    compose(LISTS[:1])
    drawn(opened, client, Steps="2")
    expect(opened.locator(".card[data-state=exact] img, .card[data-state=judged] img")).to_be_visible()
    assert len(asked) >= 2
    assert len(client.get("/jobs").json()["jobs"]) == 1
    expect(opened.locator("#go")).to_be_enabled()
    complaints.clear()
