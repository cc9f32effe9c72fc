"""A model's range: the number of objects, the area and the distance of their places, and the pictures' proportions."""

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from service.settings import Settings
from shared.support import Support
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler
from tests_browser.conftest import choose
from tests_browser.test_access import violations
from tests_browser.test_places import body_of, draw, place

AREA = ((0.2, 0.25), (0.8, 0.25), (0.9, 0.7), (0.1, 0.7))
LEARNT = Support(objects=(1, 3), area=AREA, nearest=0.2)
FOUR = ["red cube", "blue sphere", "gray cylinder", "cyan cube"]


@pytest.fixture(scope="module")
def shown(storage: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with more models: `learnt`, within LEARNT and squeezed from 4:3, `pairs`, `wide`, and `corner`."""
    folder = shutil.copytree(storage, tmp_path_factory.mktemp("learnt") / "storage")
    config = {"support": LEARNT.model_dump(mode="json"), "proportions": [4, 3]}
    publish_toy_denoiser(folder, "learnt", 3, positions=True, **config)
    pairs = publish_toy_denoiser(folder, "pairs", 4, support={"objects": [2, 2]})
    publish_toy_upsampler(folder, "wide", pairs)
    corner = {"objects": [1, 3], "area": [[0.6, 0.2], [0.9, 0.2], [0.9, 0.6], [0.6, 0.6]]}
    publish_toy_denoiser(folder, "corner", 5, positions=True, support=corner)
    return settings.model_copy(update={"storage": folder})


@pytest.fixture
def opened(page: Page, server: httpx.Client) -> Iterator[Page]:
    """The page with the model `learnt`."""
    page.goto(str(server.base_url))
    page.get_by_label("Model").select_option("learnt")
    expect(page.locator("#range")).to_have_text("1 to 3 objects in a picture.")
    yield page
    page.goto("about:blank")


def test_no_more_objects_than_the_model_draws(opened: Page) -> None:
    choose(opened, [FOUR[:3]])
    expect(opened.locator("#range")).to_have_text("3 objects: this model draws no more in a picture.")
    full = opened.get_by_role("button", name=FOUR[3], exact=True)
    expect(full).to_have_attribute("aria-disabled", "true")
    full.click(force=True)
    expect(opened.get_by_role("status")).to_have_text("3 objects: this model draws no more in a picture.")
    expect(opened.locator("#picker [aria-pressed=true]")).to_have_count(3)
    opened.locator("#picker").get_by_role("button", name=FOUR[0], exact=True).click()
    expect(full).to_have_attribute("aria-disabled", "false")
    full.click()
    expect(opened.locator("#chosen")).to_have_text("blue sphere, gray cylinder and cyan cube")
    assert violations(opened) == []


def test_another_model_marks_what_it_cannot_draw(opened: Page, server: httpx.Client) -> None:
    """Nothing is dropped: the picture is marked, said in words, and not sent."""
    opened.locator("#model").select_option("other")
    expect(opened.locator("#range")).to_have_text("1 to 16 objects in a picture.")
    choose(opened, [FOUR, FOUR[:1]])
    opened.locator("#model").select_option("learnt")
    words = "4 objects: this model draws 1 to 3 objects in a picture."
    tile = opened.get_by_role("button", name=f"Picture 1: red cube, blue sphere, gray cylinder and cyan cube. {words}")
    expect(tile).to_have_attribute("data-wrong", "")
    expect(opened.locator("#strip [data-wrong]")).to_have_count(1)
    expect(opened.get_by_role("status")).to_have_text(f"Picture 1: {words}")
    expect(opened.locator("#range")).to_have_text("1 to 3 objects in a picture.")  # the chosen picture fits
    opened.locator("#go").click()
    expect(tile).to_be_focused()
    expect(opened.locator("#range")).to_have_text(words)
    expect(opened.get_by_role("status")).to_have_text(f"Picture 1: {words}")
    assert server.get("/jobs").json()["jobs"] == []
    assert violations(opened) == []
    opened.locator("#model").select_option("pairs")
    expect(opened.locator("#range")).to_have_text("4 objects: this model draws 2 objects in a picture.")
    expect(opened.locator("#strip [data-wrong]")).to_have_count(2)
    opened.get_by_role("button", name="Random").click()
    expect(opened.locator("#strip [data-wrong]")).to_have_count(0)
    expect(opened.locator("#strip .tile[data-objects='2']")).to_have_count(8)


def test_a_refusal_is_shown_beside_the_labels(opened: Page, complaints: list[str]) -> None:
    """Where the page's own check lags behind, as after a checkpoint was replaced."""

    def without_support(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            del model["support"], model["picture"]
        route.fulfill(json=answer)

    opened.route("**/models", without_support)
    opened.reload()
    opened.locator("#model").select_option("learnt")
    expect(opened.locator("#range")).to_be_empty()
    choose(opened, [[], FOUR[:1], FOUR])
    opened.locator("#go").click()
    refusal = opened.locator("#objects-block").get_by_role("alert")
    expect(refusal).to_have_text("Picture 3: 4 labels; this model has learnt pictures of 1 to 3 objects.")
    expect(opened.locator("#picker-title")).to_have_text("Objects in picture 3")  # the empty first is not sent
    opened.locator("#picker").get_by_role("button", name=FOUR[0], exact=True).click()
    expect(refusal).to_be_empty()
    assert "422" in complaints.pop()


def test_a_refused_recipe_is_not_about_the_composed_pictures(opened: Page, complaints: list[str]) -> None:
    answer = {"detail": "recipe.labels.0: 5 labels; this model has learnt pictures of 1 to 3 objects", "entry": 0}
    opened.route("**/generate/png", lambda route: route.fulfill(status=422, json=answer))
    choose(opened, [FOUR[:1], FOUR[:2]])
    opened.locator("#again-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG"})
    refusal = opened.locator(".go").get_by_role("alert")
    expect(refusal).to_have_text("Picture 1: 5 labels; this model has learnt pictures of 1 to 3 objects.")
    expect(opened.locator("#picker-title")).to_have_text("Objects in picture 2")
    assert "422" in complaints.pop()


def drag(page: Page, label: str, x: float, y: float) -> None:
    """Drag an object to fractions of the frame's width and height."""
    box = page.locator("#places").bounding_box()
    assert box is not None
    place(page, label).hover()
    page.mouse.down()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
    page.mouse.up()


def test_objects_stay_where_the_model_has_seen_some(opened: Page) -> None:
    choose(opened, [["red cube", "blue sphere"]])
    opened.get_by_role("button", name="Choose", exact=True).click()
    frame = opened.locator("#places").bounding_box()
    assert frame is not None
    assert frame["width"] / frame["height"] == pytest.approx(4 / 3, abs=0.01)
    points = opened.locator("#places polygon").get_attribute("points")
    assert points == "20,25 80,25 90,70 10,70"
    hint = opened.locator("#places-hint")
    expect(hint).to_have_text("Drag the objects, or move them with the arrow keys.")
    drag(opened, "blue sphere", 0.3, 0.4)
    drag(opened, "red cube", 0.5, 0.95)
    expect(hint).to_have_text("This model has seen no objects outside the outlined area.")
    drag(opened, "blue sphere", 0.54, 0.68)
    expect(hint).to_have_text("This model has seen no two objects so close to each other.")
    place(opened, "red cube").focus()
    opened.keyboard.press("ArrowDown")
    expect(opened.get_by_role("status")).to_have_text(
        "red cube, 50 % from the left, 70 % from the top. This model has seen no objects outside the outlined area."
    )
    opened.keyboard.press("ArrowLeft")
    expect(hint).to_have_text("Drag the objects, or move them with the arrow keys.")
    assert violations(opened) == []
    cube, sphere = body_of(opened.locator("#command").text_content() or "")["layouts"][0]
    assert cube == {"x": 0.45, "y": 0.7}
    assert LEARNT.layout_problem([(one["x"], one["y"]) for one in (cube, sphere)]) is None


def test_places_outside_another_models_area_are_marked(opened: Page, server: httpx.Client) -> None:
    choose(opened, [["red cube"]])
    opened.get_by_role("button", name="Choose", exact=True).click()
    opened.locator("#model").select_option("corner")
    words = "red cube: This model has seen no objects outside the outlined area."
    expect(opened.locator("#places-hint")).to_have_text(words)
    opened.locator("#go").click()
    expect(opened.get_by_role("status")).to_have_text(f"Picture 1: {words}")
    assert server.get("/jobs").json()["jobs"] == []
    drag(opened, "red cube", 0.7, 0.4)
    expect(opened.locator("#strip [data-wrong]")).to_have_count(0)
    assert draw(opened, server)["layouts"] == [[{"x": 0.7, "y": 0.4}]]


GEOMETRY = """async ([model, trials]) => {
    const { Support } = await import("/static/support.js");
    const support = new Support(model);
    const point = ([x, y]) => ({ x, y });
    return trials.map(([to, others]) => ({
        problem: support.placeProblem(point(to), others.map(point)),
        clamped: support.clamp(point(to), others.map(point)),
        free: support.free(others.map(point)),
    }));
}"""


def test_the_geometry_agrees_with_the_services(opened: Page) -> None:
    """Against `shared.support`: what is possible stays, what is not is moved to where the service accepts it."""
    draws = random.Random(0)
    trials = [
        ((draws.random(), draws.random()), [(draws.uniform(0.2, 0.8), draws.uniform(0.3, 0.65))]) for _ in range(300)
    ]
    found = opened.evaluate(GEOMETRY, [{"support": LEARNT.model_dump(mode="json")}, trials])
    refused = 0
    for (to, others), one in zip(trials, found, strict=True):
        clamped, free = ((one[name]["x"], one[name]["y"]) for name in ("clamped", "free"))
        assert LEARNT.layout_problem([clamped, *others]) is None
        assert LEARNT.layout_problem([free, *others]) is None
        if one["problem"] is None:
            assert LEARNT.layout_problem([to, *others]) is None
            assert clamped == pytest.approx(to, abs=0.02)
        elif LEARNT.layout_problem([to, *others]) is not None:
            refused += 1
    assert 100 < refused < 250  # both kinds were tried


@pytest.mark.parametrize(("model", "pixels"), [("learnt", [16, 16]), ("wide", [32, 24])])
def test_pictures_are_shown_in_their_proportions(
    opened: Page, server: httpx.Client, model: str, pixels: list[int]
) -> None:
    """Pictures of 4:3, squeezed to squares or not: in cards, in the enlarged view, in the stages, in the gallery."""
    opened.locator("#model").select_option(model)
    choose(opened, [["red cube", "gray cube"], ["blue sphere", "cyan cube"]])
    opened.get_by_label("Stages").fill("3")
    job = draw(opened, server)
    assert (job["model"], job["trajectory"]) == (model, 3)
    opened.reload()  # the job is opened before the models are known
    expect(opened.locator("#job")).to_have_attribute("data-status", "finished")
    opened.locator(".frame").first.click()
    assert opened.locator(".large").evaluate("image => [image.naturalWidth, image.naturalHeight]") == pixels
    width, height = pixels  # of the pictures, two of which stand in the grid with borders of two pixels
    grid = (2 + 2 * (width + 2)) / (4 + height) * (4 / 3) / (width / height)
    for selector, ratio in ((".frame", 4 / 3), (".large", 4 / 3), (".way img", 4), ("#jobs img", grid)):
        box = opened.locator(selector).first.bounding_box()
        assert box is not None
        assert box["width"] / box["height"] == pytest.approx(ratio, abs=0.02), selector
    large = opened.locator(".large").bounding_box()
    assert large is not None
    assert large["height"] == pytest.approx(256, abs=1)  # small pictures are not enlarged further


def test_the_distance_from_its_place_stands_beside_a_label(opened: Page, server: httpx.Client) -> None:
    def with_distances(route: Route) -> None:
        answer: dict[str, Any] = route.fetch().json()
        answer["result"]["pictures"][0]["distances"] = [0.0123, None]
        answer["result"]["pictures"][1]["distances"] = None
        route.fulfill(json=answer)

    choose(opened, [["red cube", "blue sphere"], ["gray cube"]])
    draw(opened, server)
    opened.route(re.compile("/jobs/[0-9a-f]{32}$"), with_distances)
    opened.reload()
    lines = opened.locator(".card").first.locator(".object")
    expect(lines.first.locator(".distance")).to_have_text("1.2 % off")
    expect(lines.first).to_contain_text("red cube, 1.2 % of the width from its place")
    expect(opened.locator(".card .distance")).to_have_count(1)
    opened.locator(".frame").first.click()
    expect(opened.locator(".facts")).to_contain_text("Mean distance1.2 % of the width")
    assert violations(opened) == []
