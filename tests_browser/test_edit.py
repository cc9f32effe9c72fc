"""Editing a picture: objects are dragged, recoloured, removed and added; changes are drawn, undone and downloaded."""

import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from service.settings import Settings
from tests_browser.test_access import violations


@pytest.fixture
def shown(placed: Settings) -> Settings:
    return placed


@pytest.fixture
def dialog(page: Page, server: httpx.Client) -> Iterator[Locator]:
    """The dialog that edits a picture of a red cube and a blue sphere."""
    layouts = [[{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 0.5}]]
    body = {"labels": [["red cube", "blue sphere"]], "layouts": layouts, "model": "placed", "steps": 2, "seed": 7}
    job = server.post("/generate", json=body).json()
    page.goto(f"{server.base_url}#{job['id']}")
    page.get_by_role("button", name=re.compile("^Picture 1: .*Enlarge")).click()
    page.get_by_role("button", name="Edit", exact=True).click()
    yield page.locator("#edit-dialog")
    page.goto("about:blank")


def handle(dialog: Locator, label: str) -> Locator:
    return dialog.locator(f".place[data-label='{label}']")


def newest(server: httpx.Client) -> list[dict[str, Any]]:
    """Return the edits of the newest job."""
    edits: list[dict[str, Any]] = server.get("/jobs?limit=1").json()["jobs"][0]["options"]["edits"]
    return edits


def test_each_change_is_drawn_beside_the_picture_before_it(dialog: Locator, page: Page, server: httpx.Client) -> None:
    box = dialog.locator(".edited").bounding_box()
    assert box is not None
    handle(dialog, "red cube").hover()
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"], steps=4)
    page.mouse.up()
    expect(dialog.locator(".story li")).to_have_count(2)
    expect(dialog.locator("figcaption")).to_have_text(["Before", "After: move red cube"])
    (moved,) = newest(server)
    assert moved["move"] == {
        "label": "red cube",
        "x": pytest.approx(0.25, abs=0.03),
        "y": pytest.approx(0.25, abs=0.03),
    }
    assert violations(page) == []

    dialog.get_by_label("Make it a").select_option("cyan cube")
    expect(dialog.locator(".story li")).to_have_count(3)
    dialog.get_by_label("Add an object").select_option("gray cylinder")
    expect(dialog.locator(".place")).to_have_count(3)
    handle(dialog, "blue sphere").click()
    dialog.get_by_role("button", name="Remove").click()
    expect(dialog.locator(".story li")).to_have_count(5)
    assert [next(iter(one)) for one in newest(server)] == ["move", "recolour", "add", "remove"]
    assert [place.get_attribute("data-label") for place in dialog.locator(".place").all()] == [
        "cyan cube",
        "gray cylinder",
    ]

    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download the strip").click()
    strip = Image.open(io.BytesIO(download.value.path().read_bytes()))
    assert strip.size == (8 + 5 * (16 + 8), 8 + 16 + 28)  # five pictures of 16x16

    dialog.get_by_role("button", name="Undo").click()
    expect(dialog.locator(".place")).to_have_count(3)
    dialog.locator("#edit-object").select_option("gray cylinder")
    dialog.get_by_role("button", name="Remove").click()
    expect(dialog.locator(".story li")).to_have_count(5)
    assert [next(iter(one)) for one in newest(server)] == ["move", "recolour", "add", "remove"]
    expect(handle(dialog, "gray cylinder")).to_have_count(0)


def test_keys_move_an_object_and_refusals_are_shown(
    dialog: Locator, page: Page, server: httpx.Client, complaints: list[str]
) -> None:
    handle(dialog, "blue sphere").focus()
    for key in ("ArrowUp", "ArrowUp", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    words = "blue sphere, 74 % from the left, 40 % from the top"
    expect(handle(dialog, "blue sphere")).to_have_attribute("aria-label", words)
    page.keyboard.press("Enter")
    expect(dialog.locator(".story li")).to_have_count(2)
    assert newest(server) == [{"move": {"label": "blue sphere", "x": 0.74, "y": 0.4}}]
    page.route("**/edit", lambda route: route.fulfill(status=429, json={"detail": "the queue is full"}))
    dialog.get_by_role("button", name="Remove").click()
    expect(dialog.locator("#edit-hint")).to_have_text("The queue is full.")
    complaints.clear()  # of the 429
    expect(dialog.locator(".story li")).to_have_count(2)
    dialog.get_by_role("button", name="Close").click()
    expect(page.locator("#picture-dialog")).to_be_visible()
