"""The page on a slow or flaky connection: what is lost is asked for again, and what cannot be had is said in words."""

import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from service.store.jobs import JobStore
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


@pytest.mark.parametrize("answers", ["**/events", "**/images/0.png"])
def test_what_a_key_may_not_read_yet_is_read_later(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client, complaints: list[str], answers: str
) -> None:
    asked = list[str]()

    def refuse_the_first(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) > 1:
            route.continue_()
        else:
            route.fulfill(status=429, headers={"Retry-After": "1"}, json={"title": "Too many requests"})

    opened.route(answers, refuse_the_first)
    compose(LISTS[:1])
    drawn(opened, client, Steps="2")
    expect(opened.locator(".card[data-state=exact] img, .card[data-state=judged] img")).to_be_visible()
    assert len(asked) == 2
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


def look_again(page: Page) -> None:
    """Let the page look whether the service is back, as it does every 20 s."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_what_could_not_be_read_is_read_once_the_service_is_back(
    page: Page, address: str, working: Runner, client: httpx.Client, complaints: list[str]
) -> None:
    """The labels, and then the job of the page's address."""
    job = client.post("/generate", json={"labels": LISTS[:1], "steps": 2}).json()
    for lost in ("**/labels", f"**/jobs/{job['id']}"):
        page.route(lost, lambda route: route.abort())
    page.goto(f"{address}#{job['id']}")
    said = "The service does not answer."
    expect(page.locator("#job")).to_contain_text(said)
    expect(page.locator("#refusal")).to_contain_text(said)
    page.unroute("**/labels")
    look_again(page)
    page.locator("#picker button").first.wait_for()
    expect(page.locator("#refusal")).to_be_empty()
    expect(page.locator("#job")).to_contain_text(said)
    page.unroute(f"**/jobs/{job['id']}")
    look_again(page)
    expect(page.locator(".card [data-verdict]").first).to_be_visible()
    complaints.clear()


@pytest.mark.parametrize("lost", ["**/jobs?*", "**/openapi.json"])
@pytest.mark.parametrize("status", [0, 503])
def test_jobs_and_limits_are_read_once_the_service_is_back(
    page: Page, address: str, client: httpx.Client, alive: JobStore, complaints: list[str], lost: str, status: int
) -> None:
    client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).raise_for_status()
    page.route(lost, lambda route: route.fulfill(status=status) if status else route.abort())
    page.goto(address)
    expect(page.locator("#refusal")).not_to_be_empty()
    page.unroute(lost)
    look_again(page)
    expect(page.locator("#jobs a")).to_have_count(1)
    expect(page.get_by_label("Steps")).to_have_attribute("max", "1000")
    expect(page.locator("#refusal")).to_be_empty()
    complaints.clear()


def test_the_gallery_shows_how_jobs_went_on_that_are_not_on_show(
    page: Page, address: str, client: httpx.Client, alive: JobStore
) -> None:
    """Nothing tells the page of the end of a job that another tab or a program created."""
    job = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()["id"]
    page.goto(address)
    expect(page.locator("#jobs .status")).to_have_text("queued")
    client.post(f"/jobs/{job}/cancel").raise_for_status()
    look_again(page)
    expect(page.locator("#jobs .status")).to_have_text("cancelled")
    expect(page.get_by_role("button", name=re.compile("^Delete: "))).to_be_visible()


def test_a_thumbnail_that_could_not_be_read_is_read_later(
    page: Page, address: str, client: httpx.Client, working: Runner, complaints: list[str]
) -> None:
    client.post("/generate", json={"labels": LISTS[:1], "steps": 2}).raise_for_status()
    page.route("**/grid.png", lambda route: route.fulfill(status=503))
    page.goto(address)
    expect(page.locator("#jobs img[data-lost]")).to_have_count(1)
    page.unroute("**/grid.png")
    look_again(page)
    expect(page.locator("#jobs img")).to_be_visible()
    complaints.clear()


def test_a_phone_shows_why_a_download_failed(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client, complaints: list[str]
) -> None:
    """The button is far below the place where refusals stand."""
    opened.set_viewport_size({"width": 360, "height": 640})
    compose(LISTS[:1])
    drawn(opened, client, Steps="2")
    opened.context.set_offline(True)
    opened.get_by_role("button", name="Download zip").click()
    expect(opened.get_by_role("alert")).to_contain_text("The service does not answer.")
    expect(opened.get_by_role("alert")).to_be_in_viewport()
    opened.context.set_offline(False)
    complaints.clear()


def test_labels_do_not_wait_for_the_largest_answer(page: Page, address: str, working: Runner) -> None:
    """The OpenAPI document has the limits of the fields, and takes seconds on a slow connection."""
    held = list[Route]()
    page.route("**/openapi.json", lambda route: held.append(route))
    page.goto(address)
    page.get_by_role("button", name="red cube", exact=True).click()
    page.get_by_label("Steps").fill("2")
    page.locator("#go").click()
    expect(page.locator(".card [data-verdict]").first).to_be_visible()
    sampler = page.locator("#sampler option")
    expect(sampler).to_have_count(1)
    held.pop().continue_()
    expect(sampler).not_to_have_count(1)
    expect(page.get_by_label("Steps")).to_have_attribute("max", "1000")


def test_a_job_keeps_its_sampler_before_the_largest_answer_is_there(
    page: Page, address: str, client: httpx.Client, working: Runner
) -> None:
    """Samplers to choose from come with the OpenAPI document."""
    held = list[Route]()
    page.route("**/openapi.json", lambda route: held.append(route))
    body = {"labels": LISTS[:1], "steps": 2, "sampler": "ddpm"}
    page.goto(f"{address}#{client.post('/generate', json=body).json()['id']}")
    page.locator("#picker button").first.wait_for()
    page.get_by_role("button", name="Edit as new").click()
    expect(page.get_by_label("Sampler")).to_have_value("ddpm")
    held[0].continue_()
    expect(page.get_by_label("Steps")).to_have_attribute("max", "1000")
    expect(page.get_by_label("Sampler")).to_have_value("ddpm")


def test_a_connection_that_stays_silent_is_replaced(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client
) -> None:
    """As one that a router forgot: no error ends it."""
    held = list[Route]()
    opened.route("**/events", lambda route: route.continue_() if held else held.append(route))
    opened.clock.install()
    compose(LISTS[:1])
    opened.get_by_label("Steps").fill("2")
    opened.locator("#go").click()
    opened.wait_for_url("**/#*")
    client.get(f"/jobs/{opened.url.partition('#')[2]}/events").raise_for_status()  # until its end
    expect(opened.locator("#job")).to_have_attribute("data-status", re.compile("queued|running"))
    opened.clock.run_for(20_000)
    expect(opened.locator(".card [data-verdict]").first).to_be_visible()
