"""Models of two vocabularies in one storage, each with its evaluator: chosen, drawn, judged, edited as new, scored."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from iclevr.labels import ICLEVR
from service.contract.recipe import KEYWORD
from service.settings import Settings
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator
from tests_browser.conftest import choose
from tests_browser.test_access import violations
from tests_browser.test_page import zip_of
from tests_browser.test_places import body_of, draw

ANIMALS = Vocabulary(tuple(f"{size} {animal}" for animal in ("cat", "dog") for size in ("tiny", "small", "big")))
LONG = Vocabulary(tuple(f"somebody seen from the side, with a_label_of_more_than_forty_letters_{i}" for i in range(3)))
PETS = [["big dog", "tiny cat"], ["small cat"]]


@pytest.fixture(scope="module")
def shown(placed: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with i-CLEVR's promoted model, `placed`, and `animals` and `long`, which other evaluators judge."""
    folder = shutil.copytree(str(placed.storage), tmp_path_factory.mktemp("both") / "storage")
    publish_toy_evaluator(folder, "animals-evaluator", ANIMALS)
    publish_toy_denoiser(folder, "animals", 5, vocabulary=ANIMALS)
    publish_toy_evaluator(folder, "long-evaluator", LONG)
    publish_toy_denoiser(folder, "long", 6, vocabulary=LONG)
    return placed.model_copy(update={"storage": folder})


@pytest.fixture
def opened(page: Page, server: httpx.Client) -> Iterator[Page]:
    page.goto(str(server.base_url))
    page.locator("#picker button").first.wait_for()
    yield page
    page.goto("about:blank")


def choose_model(page: Page, name: str, first_label: str) -> None:
    """Choose a model, and wait until its labels are offered."""
    page.get_by_label("Model").select_option(name)
    expect(page.locator("#picker button").first).to_have_attribute("data-label", first_label)


def drawings(page: Page) -> set[str]:
    """What the examples of the empty page show: letters where a label has no drawing."""
    return set(page.locator(".ghosts .drawing").evaluate_all("all => all.map((one) => one.textContent)"))


def test_another_vocabulary_is_drawn_and_judged_by_its_own_evaluator(opened: Page, server: httpx.Client) -> None:
    choose_model(opened, "placed", ICLEVR.names[0])
    assert drawings(opened) == {""}
    opened.get_by_role("button", name="red cube", exact=True).click()
    opened.get_by_role("button", name="Choose", exact=True).click()
    expect(opened.locator("#places")).to_be_visible()

    choose_model(opened, "animals", ANIMALS.names[0])
    expect(opened.locator("#picker button")).to_have_count(len(ANIMALS))
    expect(opened.locator("#chosen")).to_have_text("Nothing chosen yet.")
    expect(opened.locator("#places-block")).to_be_hidden()
    expect(opened.locator("#places .place")).to_have_count(0)
    assert drawings(opened) <= {"ti", "sm", "bi"}
    choose(opened, PETS)
    assert violations(opened) == []
    job = draw(opened, server)
    assert (job["model"], job["labels"], job["layouts"]) == ("animals", PETS, None)
    pictures = job["result"]["pictures"]
    assert {label for picture in pictures for label in picture["scores"]} <= set(ANIMALS.names)
    png = Image.open(io.BytesIO(server.get(pictures[0]["url"]).content))
    assert json.loads(png.text[KEYWORD])["evaluator"]["name"] == "animals-evaluator"  # type: ignore[attr-defined]
    for index, labels in enumerate(PETS):
        lines = opened.locator(".card").nth(index).locator(".object")
        for label in labels:
            asked = lines.filter(has=opened.get_by_text(label, exact=True))
            expect(asked).to_have_attribute("data-verdict", re.compile("right|missing"))
    expect(opened.locator("#jobs img")).to_be_visible()
    assert violations(opened) == []


def test_examples_are_drawn_by_the_chosen_model(opened: Page, server: httpx.Client) -> None:
    choose_model(opened, "animals", ANIMALS.names[0])
    opened.get_by_label("Steps").fill("2")
    opened.get_by_role("button", name="Or draw these").click()
    expect(opened.locator("#job")).to_have_attribute("data-status", "finished")
    job = server.get(f"/jobs/{opened.url.partition('#')[2]}").json()
    assert (job["model"], len(job["labels"])) == ("animals", 8)


def test_a_job_of_another_model_is_edited_as_new_with_its_labels_and_places(opened: Page, server: httpx.Client) -> None:
    placed = {"labels": [["red cube"]], "layouts": [[{"x": 0.3, "y": 0.6}]], "steps": 2, "model": "placed"}
    animals = {"labels": PETS, "steps": 2, "model": "animals"}
    for body in (animals, placed, animals):  # each while the page offers what another model draws
        job = server.post("/generate", json=body).json()
        opened.evaluate("id => { location.hash = id }", job["id"])
        expect(opened.locator("#job")).to_have_attribute("data-status", "finished")
        expect(opened.locator(".card")).to_have_count(len(job["labels"]))
        opened.get_by_role("button", name="Edit as new").click()
        expect(opened.get_by_label("Model")).to_have_value(job["model"])
        again = body_of(opened.locator("#command").text_content() or "")
        assert (again["labels"], again.get("layouts"), again["model"]) == (job["labels"], job["layouts"], job["model"])
        vocabulary = ANIMALS if job["model"] == "animals" else ICLEVR
        expect(opened.locator("#picker button")).to_have_count(len(vocabulary))


def test_pictures_of_another_vocabulary_are_scored_by_its_evaluator(
    opened: Page, server: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "test.json").write_text(json.dumps(PETS))
    (tmp_path / "mine.zip").write_bytes(zip_of(PETS))
    opened.get_by_role("tab", name="Score a test file").click()
    opened.locator("#file").set_input_files([tmp_path / "mine.zip", tmp_path / "test.json"])
    expect(opened.locator("#zip")).to_contain_text("The model's evaluator judges them.")
    choose_model(opened, "animals", ANIMALS.names[0])
    assert violations(opened) == []
    opened.get_by_role("button", name="Score these pictures").click()
    expect(opened.locator("#job")).to_have_attribute("data-status", "finished")
    job = server.get(f"/jobs/{opened.url.partition('#')[2]}").json()
    assert (job["model"], job["labels"], job["options"]) == ("animals-evaluator", PETS, None)
    assert "-F 'model=animals'" in (opened.locator("#command").text_content() or "")


def test_the_chosen_model_stays_when_a_key_is_saved(opened: Page) -> None:
    """All is read again with the key."""
    choose_model(opened, "animals", "tiny cat")
    choose(opened, PETS[:1])
    opened.get_by_role("button", name="Key", exact=True).click()
    with opened.expect_response("**/openapi.json"):
        opened.get_by_role("button", name="Save").click()
    expect(opened.get_by_label("Model")).to_have_value("animals")
    expect(opened.locator("#picker button").first).to_have_attribute("data-label", "tiny cat")
    expect(opened.locator("#chosen")).to_have_text("big dog and tiny cat")


def test_labels_that_are_numbers_are_ranked_by_probability(opened: Page) -> None:
    """JavaScript's objects order such keys by their value, whatever the answer's order."""
    opened.evaluate("""async () => {
        const { Card } = await import("./static/card.js");
        const { Lightbox } = await import("./static/lightbox.js");
        const card = new Card(0, ["7"], {});
        const scores = JSON.parse('{"7": 0.9, "9": 0.4, "1": 0.1}');
        Object.assign(card, { source: "static/icon.svg", result: { labels: ["7"], scores, accuracy: 1, f1: 1 } });
        new Lightbox(async () => null).open([card], card, null);
    }""")
    expect(opened.locator(".facts")).to_contain_text("Next most likely9, 40 %")


def test_any_label_has_a_drawing(opened: Page) -> None:
    """Also one that every JavaScript object has as a property, or whose second letter is a surrogate pair."""
    drawn = opened.evaluate(
        """async (labels) => {
        const { drawing } = await import("./static/labels.js");
        return labels.map((label) => drawing(label).outerHTML);
    }""",
        ["constructor", "red valueOf", "a\U0001f34e"],
    )
    letters = '<span class="drawing letters" aria-hidden="true">'
    assert drawn[0] == f"{letters}co</span>"
    assert 'fill="#c2382e"' in drawn[1]
    assert drawn[2] == f"{letters}a\U0001f34e</span>"


def test_the_labels_are_those_of_the_model_chosen_last(opened: Page) -> None:
    """Even if an earlier choice is answered later."""
    held = list[Route]()
    opened.route("**/labels?model=animals", lambda route: held.append(route))
    opened.get_by_label("Model").select_option("animals")
    with opened.expect_response("**/labels?model=placed"):
        opened.get_by_label("Model").select_option("placed")
    with opened.expect_response("**/labels?model=animals"):
        held.pop().continue_()
    opened.wait_for_timeout(200)
    expect(opened.locator("#picker button")).to_have_count(len(ICLEVR))


@pytest.mark.parametrize("width", [1280, 360])
def test_long_labels_can_be_read_to_their_ends(opened: Page, server: httpx.Client, width: int) -> None:
    """In the picker, and beside the enlarged picture: labels may differ in their last letters only."""
    opened.set_viewport_size({"width": width, "height": 740})
    choose_model(opened, "long", LONG.names[0])
    for label in LONG.names:
        opened.get_by_role("button", name=label, exact=True).click()
    for selector in ("#picker", "#chosen"):
        assert opened.locator(selector).evaluate("one => one.scrollWidth <= one.clientWidth"), selector
    button, text = opened.locator(".choice").first.bounding_box(), opened.locator(".choice span").first.bounding_box()
    assert button is not None
    assert text is not None
    assert text["y"] >= button["y"] + 4
    assert text["x"] + text["width"] <= button["x"] + button["width"]
    draw(opened, server)
    opened.locator(".frame").click()
    expect(opened.locator(".about [data-verdict]").first).to_be_visible()
    for name in opened.locator(".about .object-name").all():
        assert name.evaluate("one => one.scrollWidth <= one.clientWidth")
    assert opened.evaluate("document.documentElement.scrollWidth") == width
