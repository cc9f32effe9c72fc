"""Accessibility: axe finds nothing; the page works by keyboard, on a phone, in dark and light, with any vocabulary."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.checkpoint import publish
from shared.registry import promote
from tests.conftest import serving

Compose = Callable[[list[list[str]]], None]


def violations(page: Page) -> list[str]:
    """Return all of axe's findings as lines."""
    report: dict[str, Any] = Axe().run(page).response
    return [
        f"{found['id']}: {node['html'][:120]} {node['any'][0]['message'] if node['any'] else ''}"
        for found in report["violations"]
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing(
    opened: Page, compose: Compose, working: Runner, tmp_path: Path, theme: str, width: int
) -> None:
    opened.emulate_media(color_scheme=theme, reduced_motion="reduce")  # type: ignore[arg-type]
    opened.set_viewport_size({"width": width, "height": 800})
    assert violations(opened) == []
    compose([["red cube", "gray sphere"], ["blue cylinder"]])
    opened.get_by_label("Steps").fill("2")
    opened.get_by_label("Stages").fill("3")
    opened.get_by_role("button", name=re.compile("^Draw")).click()
    expect(opened.locator(".card [data-verdict]").first).to_be_visible()
    opened.get_by_text("The same with curl").click()
    assert violations(opened) == []
    opened.get_by_role("button", name=re.compile("^Delete: ")).click()  # not for good yet
    expect(opened.get_by_role("button", name=re.compile("^Delete for good: "))).to_be_visible()
    assert violations(opened) == []
    opened.locator(".frame").first.click()
    expect(opened.locator(".way img")).to_be_visible()
    assert violations(opened) == []
    opened.keyboard.press("Escape")
    (tmp_path / "test.json").write_text('[["red cube"]]')
    opened.get_by_role("tab", name="Score a test file").click()
    opened.locator("#file").set_input_files(tmp_path / "test.json")
    assert violations(opened) == []
    opened.get_by_role("button", name="Key", exact=True).click()
    assert violations(opened) == []


def test_a_keyboard_is_enough(opened: Page, working: Runner) -> None:
    """Choose, add a picture, draw, enlarge and continue without a click."""
    opened.locator("#strip [aria-current]").focus()
    for _ in range(10):
        opened.keyboard.press("Tab")
        if opened.evaluate("document.activeElement.dataset.label"):
            break
    assert opened.evaluate("document.activeElement.dataset.label") == "gray cube"
    for key in ("ArrowRight", "ArrowDown", "Space"):  # red cube, red sphere, choose
        opened.keyboard.press(key)
    expect(opened.get_by_role("button", name="red sphere", exact=True)).to_have_attribute("aria-pressed", "true")
    opened.get_by_role("button", name="Add a picture").focus()
    opened.keyboard.press("Enter")
    opened.keyboard.press("End")
    opened.keyboard.press("Space")
    expect(opened.locator("#strip [aria-current]")).to_have_attribute("aria-label", re.compile("^Picture 2: "))
    opened.get_by_label("Steps").fill("2")
    opened.keyboard.press("Control+Enter")
    expect(opened.get_by_role("status")).to_contain_text("2 pictures, finished.")
    first = opened.get_by_role("button", name=re.compile("^Picture 1: red sphere.*Enlarge$"))
    expect(first).to_be_enabled()  # its picture has arrived
    first.focus()
    opened.keyboard.press("Enter")
    dialog = opened.locator("#picture-dialog")
    expect(dialog).to_have_attribute("aria-label", re.compile("^Picture 1"))
    opened.keyboard.press("ArrowRight")
    expect(dialog).to_have_attribute("aria-label", re.compile("^Picture 2"))
    opened.keyboard.press("ArrowLeft")
    expect(dialog).to_have_attribute("aria-label", re.compile("^Picture 1"))
    opened.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    opened.locator("#strip [aria-current]").focus()
    opened.keyboard.press("Delete")
    expect(opened.locator("#strip .tile[aria-label^='Picture']")).to_have_count(1)


def test_the_skip_link_leads_to_the_pictures_and_keeps_them(opened: Page, compose: Compose, working: Runner) -> None:
    compose([["red cube"]])
    opened.get_by_label("Steps").fill("2")
    opened.keyboard.press("Control+Enter")
    expect(opened.locator("#job")).to_have_attribute("data-status", "finished")
    job = opened.url
    opened.get_by_role("link", name="Skip to the pictures").focus()
    opened.keyboard.press("Enter")
    expect(opened.locator("#canvas")).to_be_focused()
    expect(opened.locator(".card")).to_have_count(1)
    assert opened.url == job


def test_a_phone_shows_it_all_without_scrolling_sideways(opened: Page, compose: Compose, working: Runner) -> None:
    opened.set_viewport_size({"width": 360, "height": 740})
    compose([["red cube"], ["blue sphere", "yellow cube", "cyan cylinder"]])
    opened.get_by_label("Steps").fill("2")
    opened.get_by_role("button", name=re.compile("^Draw")).click()
    expect(opened.locator(".card [data-verdict]").first).to_be_visible()
    expect(opened.locator(".job-head")).to_be_in_viewport()  # the page scrolled to the result
    assert opened.evaluate("document.documentElement.scrollWidth") == 360
    for box in [choice.bounding_box() for choice in opened.locator("#picker .choice").all()]:
        assert box is not None
        assert min(box["width"], box["height"]) >= 24  # WCAG 2.2, 2.5.8


@pytest.mark.parametrize(("width", "height"), [(1280, 500), (360, 740)])
def test_a_job_that_is_opened_comes_into_sight(
    page: Page, address: str, working: Runner, client: httpx.Client, width: int, height: int
) -> None:
    """From the gallery, which is below the pictures, and by its address, on a phone below the composer."""
    page.set_viewport_size({"width": width, "height": height})
    for count in (9, 1):
        client.post("/generate", json={"labels": [["red cube"]] * count, "steps": 1}).raise_for_status()
    page.goto(address)
    for job, count in (("9 pictures", 9), ("1 picture", 1)):
        page.get_by_role("link", name=re.compile(f"^{job}")).click()
        expect(page.locator(".card [data-verdict]").first).to_be_visible()
        expect(page.locator(".card")).to_have_count(count)
        expect(page.locator(".job-head")).to_be_in_viewport()
    page.goto("about:blank")
    page.goto(f"{address}#{client.get('/jobs').json()['jobs'][1]['id']}")
    expect(page.locator(".card")).to_have_count(9)
    expect(page.locator(".job-head")).to_be_in_viewport()


def test_a_phone_shows_the_whole_reason_why_the_service_is_not_ready(opened: Page) -> None:
    """Below the name and the buttons, within the head."""
    opened.set_viewport_size({"width": 360, "height": 740})
    ready = opened.locator("#ready")
    expect(ready).to_contain_text("No worker is running")
    head, nav, words = (opened.locator(one).bounding_box() for one in (".top", ".top nav", "#ready"))
    assert head is not None
    assert nav is not None
    assert words is not None
    assert nav["y"] + nav["height"] <= words["y"]
    assert words["y"] + words["height"] <= head["y"] + head["height"]
    assert ready.evaluate("words => words.scrollWidth <= words.clientWidth")


def test_a_screen_reader_hears_whether_the_service_is_ready_once(opened: Page, alive: JobStore) -> None:
    ready = opened.locator("#ready")
    expect(ready).to_have_attribute("aria-live", "polite")
    look = "document.dispatchEvent(new Event('visibilitychange'))"
    opened.evaluate(look)
    expect(ready).to_have_text("Ready")
    opened.evaluate(
        "news = []; new MutationObserver(() => news.push(document.querySelector('#ready').textContent))"
        ".observe(document.querySelector('#ready'), { childList: true })"
    )
    for _ in range(2):
        with opened.expect_response("**/readyz"):
            opened.evaluate(look)
    alive.connection.flushall()
    opened.evaluate(look)
    expect(ready).to_contain_text("No worker")
    assert [words.partition(" is")[0] for words in opened.evaluate("news")] == ["No worker"]


def test_the_button_to_draw_is_in_sight_on_a_low_screen(opened: Page, compose: Compose) -> None:
    """A laptop's 768 pixels, less what the browser takes; a field that has the focus is not below the button."""
    opened.set_viewport_size({"width": 1366, "height": 560})
    compose([["red cube"]])
    button = opened.locator("#go")
    expect(button).to_be_in_viewport(ratio=1)
    opened.locator("#model").focus()
    field, over = opened.locator("#model").bounding_box(), button.bounding_box()
    assert field is not None
    assert over is not None
    assert field["y"] + field["height"] <= over["y"]


def test_the_button_to_draw_keeps_the_focus(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client
) -> None:
    """The same key draws once more."""
    compose([["red cube"]])
    opened.get_by_label("Steps").fill("2")
    opened.locator("#go").focus()
    for count in (1, 2):
        opened.keyboard.press("Enter")
        expect(opened.locator("#jobs a")).to_have_count(count)
        expect(opened.locator("#go")).to_be_focused()
    assert len(client.get("/jobs").json()["jobs"]) == 2


def test_a_keyboard_scrolls_the_way_from_noise(opened: Page, compose: Compose, working: Runner) -> None:
    """Arrow keys in a strip wider than the screen do not go to the next picture."""
    opened.set_viewport_size({"width": 360, "height": 800})
    compose([["red cube"], ["blue sphere"]])
    opened.get_by_label("Steps").fill("12")
    opened.get_by_label("Stages").fill("12")
    opened.get_by_role("button", name=re.compile("^Draw")).click()
    expect(opened.locator(".card [data-verdict]").nth(1)).to_be_visible()
    opened.locator(".frame").first.click()
    expect(opened.locator(".way img")).to_be_visible()
    way = opened.locator(".way")
    way.focus()
    opened.keyboard.press("ArrowRight")
    expect(opened.locator("#picture-dialog h2")).to_have_text("Picture 1 of 2")
    way.evaluate(
        "way => way.scrollLeft || new Promise((done) => way.addEventListener('scroll', () => done(), { once: true }))"
    )


def test_dark_and_light_follow_the_system_until_one_is_chosen(opened: Page) -> None:
    def background() -> str:
        colour: str = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    opened.emulate_media(color_scheme="light")
    light = background()
    opened.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    opened.get_by_role("button", name="Dark mode").click()
    assert background() == light
    opened.reload()
    assert background() == light


def test_a_browser_that_keeps_nothing_shows_the_page(page: Page, address: str, client: httpx.Client) -> None:
    """With all cookies blocked, reading `localStorage` raises."""
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('', 'SecurityError'); }})"
    )
    page.goto(address)
    page.get_by_role("button", name="red cube", exact=True).click()
    expect(page.locator("#go")).to_have_text("Draw 1 picture")
    page.get_by_role("button", name="Key", exact=True).click()
    page.get_by_role("dialog").get_by_label("Key").fill("lg_secret")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(page.get_by_role("button", name="Key set")).to_be_visible()
    page.get_by_role("button", name="Dark mode").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, storage: Path) -> Path:
    """A storage with models of other vocabularies: animals with sizes, digits, and a hundred numbered things."""
    from tests.toy_checkpoint import NETWORK

    folder = tmp_path_factory.mktemp("foreign")
    vocabularies = {
        "animals": tuple(f"{size} {animal}" for animal in ("cat", "dog") for size in ("tiny", "small", "big")),
        "digits": ("zero", "one", "two", "three", "four"),
        "things": tuple(f"thing-{number}" for number in range(100)),
    }
    import torch

    for name, vocabulary in vocabularies.items():
        config = {
            "network": NETWORK.model_copy(update={"num_labels": len(vocabulary)}).model_dump(mode="json"),
            "schedule": "cosine",
            "timesteps": 1000,
            "prediction": "v",
        }
        state = {"weight": torch.zeros(1)}
        publish(folder, name, state, kind="denoiser", vocabulary=vocabulary, config=config, training={})
    promote(folder, "animals")
    return folder


@pytest.fixture
def foreign_page(page: Page, settings: Settings, foreign: Path, client: httpx.Client) -> Iterator[Page]:
    with serving(settings.model_copy(update={"storage": foreign})) as other:
        page.goto(str(other.base_url))
        yield page
        page.goto("about:blank")


def test_another_vocabulary_is_picked_by_its_own_names(foreign_page: Page, complaints: list[str]) -> None:
    page = foreign_page
    expect(page.get_by_role("group", name="cat", exact=True).get_by_role("button")).to_have_text(
        ["tiny", "small", "big"]
    )
    page.get_by_role("button", name="big dog").click()
    expect(page.locator("#chosen")).to_have_text("big dog")
    page.get_by_label("Model").select_option("digits")
    expect(page.locator("#picker button")).to_have_text(["zero", "one", "two", "three", "four"])
    expect(page.locator("#chosen")).to_have_text("Nothing chosen yet.")  # labels that this model does not know are gone
    page.get_by_role("button", name="two", exact=True).click()
    assert '"labels":[["two"]],"model":"digits"' in (page.locator("#command").text_content() or "")
    page.get_by_label("Model").select_option("things")
    page.get_by_label("Find a label").fill("thing-42")
    expect(page.locator("#picker button:visible")).to_have_text(["thing-42"])
    assert violations(page) == []
    complaints.clear()  # 503: this API has no worker
