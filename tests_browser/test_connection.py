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


def test_a_job_that_ended_during_a_long_break_is_shown_as_it_ended(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client
) -> None:
    """Results that are kept in storage have events for a minute only: after it a client that resumes gets a 204."""
    asked = list[str]()

    def break_off(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            body = 'event: status\ndata: {"status": "running"}\nid: 0-1\n\n'
            route.fulfill(status=200, content_type="text/event-stream", body=body)
        else:
            client.get(f"/jobs/{opened.url.partition('#')[2]}/events").raise_for_status()  # until its end
            route.fulfill(status=204)

    opened.route("**/events", break_off)
    compose(LISTS)
    drawn(opened, client, Steps="2")
    expect(opened.locator(".card [data-verdict]").first).to_be_visible()
    assert len(asked) == 2
