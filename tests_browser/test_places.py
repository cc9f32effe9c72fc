"""Layouts: objects placed by dragging or by keyboard, for models that know positions, and restored from a job."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from service.settings import Settings
from tests_browser.test_access import violations


@pytest.fixture
def shown(placed: Settings) -> Settings:
    return placed


@pytest.fixture
def opened(page: Page, server: httpx.Client) -> Iterator[Page]:
    """The page with the model `placed`, a red cube and a blue sphere."""
    page.goto(str(server.base_url))
    page.get_by_label("Model").select_option("placed")
    for label in ("red cube", "blue sphere"):
        page.get_by_role("button", name=label, exact=True).click()
    yield page
    page.goto("about:blank")


def place(page: Page, label: str) -> Locator:
    return page.locator(f"#places [data-label='{label}']")


def draw(page: Page, server: httpx.Client) -> dict[str, Any]:
    page.get_by_label("Steps").fill("2")
    page.locator("#go").click()
    page.wait_for_url(re.compile("#[0-9a-f]{32}$"))
    expect(page.locator("#job")).to_have_attribute("data-status", "finished")
    job: dict[str, Any] = server.get(f"/jobs/{page.url.partition('#')[2]}").json()
    return job


def body_of(command: str) -> dict[str, Any]:
    """Return the JSON body of a curl line."""
    body: dict[str, Any] = json.loads(command[command.index("-d '") + 4 : command.rindex("'")])
    return body


def test_objects_are_dragged_to_their_places(opened: Page, server: httpx.Client) -> None:
    expect(opened.locator("#places")).to_be_hidden()
    opened.get_by_role("button", name="Choose", exact=True).click()
    square = opened.locator("#places").bounding_box()
    assert square is not None
    for label, (x, y) in (("red cube", (0.25, 0.75)), ("blue sphere", (1.5, 0.5))):
        place(opened, label).hover()
        opened.mouse.down()
        opened.mouse.move(square["x"] + x * square["width"], square["y"] + y * square["height"], steps=5)
        opened.mouse.up()
    job = draw(opened, server)
    (cube, sphere) = job["layouts"][0]
    assert (cube["x"], cube["y"]) == pytest.approx((0.25, 0.75), abs=0.011)
    assert (sphere["x"], sphere["y"]) == pytest.approx((1.0, 0.5), abs=0.011)  # clipped at the edge
    assert violations(opened) == []
    again = body_of(opened.locator("#command").text_content() or "")
    assert (again["labels"], again["layouts"]) == (job["labels"], job["layouts"])


def test_keys_move_objects_and_places_follow_what_is_chosen(opened: Page, server: httpx.Client) -> None:
    opened.get_by_role("button", name="Choose", exact=True).click()
    place(opened, "red cube").focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowDown", "Shift+ArrowUp"):
        opened.keyboard.press(key)
    words = "red cube, 40 % from the left, 54 % from the top"
    expect(place(opened, "red cube")).to_have_attribute("aria-label", words)
    expect(opened.get_by_role("status")).to_have_text(words)
    opened.get_by_role("button", name="gray cylinder", exact=True).click()
    opened.locator("#picker").get_by_role("button", name="blue sphere", exact=True).click()
    expect(opened.locator("#places .place")).to_have_count(2)
    opened.get_by_role("button", name="Add a picture").click()
    opened.get_by_role("button", name="cyan cube", exact=True).click()
    expect(opened.locator("#places")).to_be_hidden()  # the model places these
    job = draw(opened, server)
    assert job["labels"] == [["red cube", "gray cylinder"], ["cyan cube"]]
    (first, second), nothing = job["layouts"][0], job["layouts"][1]
    assert (first, nothing) == ({"x": 0.4, "y": 0.54}, None)
    assert second != first

    opened.get_by_role("button", name="Clear").click()
    opened.get_by_role("button", name="Edit as new").click()
    expect(place(opened, "red cube")).to_have_attribute("aria-label", words)
    opened.get_by_role("button", name="Leave to chance").click()
    expect(opened.locator("#places")).to_be_hidden()
    assert "layouts" not in body_of(opened.locator("#command").text_content() or "")


def test_a_model_that_knows_no_positions_is_told_none(opened: Page, server: httpx.Client) -> None:
    opened.get_by_role("button", name="Choose", exact=True).click()
    opened.get_by_label("Model").select_option("other")
    expect(opened.locator("#places-block")).to_be_hidden()
    job = draw(opened, server)
    assert (job["model"], job["layouts"]) == ("other", None)
