"""What people do on the page: draw, watch, cancel, score a file, return later, and read errors."""

import datetime
import io
import json
import re
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Route, expect

from service.api.access.api_keys import hash_of
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import serving
from tests.service.api.answers import submitted
from tests.service.api.test_waits import announce
from tests_browser.test_access import violations

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube", "yellow sphere", "purple cylinder"]]
Compose = Callable[[list[list[str]]], None]


def shown_job(page: Page, client: httpx.Client) -> dict[str, Any]:
    """Return the job in the page's address."""
    page.wait_for_url(re.compile("#[0-9a-f]{32}$"))
    job: dict[str, Any] = client.get(f"/jobs/{page.url.partition('#')[2]}").json()
    return job


def draw(page: Page) -> None:
    page.get_by_role("button", name=re.compile("^Draw")).click()


def is_finished(page: Page) -> None:
    expect(page.locator("#job")).to_have_attribute("data-status", "finished")


def made(page: Page, client: httpx.Client, action: Callable[[], object]) -> dict[str, Any]:
    """Perform an action and return its job once the page shows it as finished."""
    before = page.url.partition("#")[2] or "none"
    action()
    page.wait_for_url(re.compile(f"(?!.*{before})#[0-9a-f]{{32}}$"))
    is_finished(page)
    return shown_job(page, client)


def drawn(page: Page, client: httpx.Client, **fields: str) -> dict[str, Any]:
    """Fill in some fields, press the button and return the finished job."""
    for label, value in fields.items():
        page.get_by_label(label).fill(value)
    return made(page, client, lambda: draw(page))


def test_pictures_are_composed_drawn_and_judged(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client
) -> None:
    compose(LISTS)
    job = drawn(opened, client, Seed="7", Steps="5")
    assert (job["labels"], job["seed"], job["options"]["steps"]) == (LISTS, 7, 5)
    cards = opened.locator(".card")
    expect(cards).to_have_count(3)
    for index, picture in enumerate(job["result"]["pictures"]):
        found = {label for label, p in picture["scores"].items() if p > 0.5}
        wanted = {label: "right" if label in found else "missing" for label in picture["labels"]}
        wanted |= dict.fromkeys(found - set(picture["labels"]), "extra")
        expect(cards.nth(index).locator(".object")).to_have_count(len(wanted))
        lines = cards.nth(index).locator(".object")
        shown = {
            lines.nth(i).locator(".object-name").inner_text(): lines.nth(i).get_attribute("data-verdict")
            for i in range(len(wanted))
        }
        assert shown == wanted
        image = cards.nth(index).locator("img")
        assert image.evaluate("image => image.complete && image.naturalWidth") == 16
        assert image.get_attribute("src", timeout=1000).startswith("blob:")  # type: ignore[union-attr]
    expect(opened.locator(".figures")).to_contain_text(f"{job['result']['accuracy']:.3f}")


def test_pictures_are_seen_while_they_are_sampled(opened: Page, compose: Compose, working: Runner) -> None:
    compose([["red cube"], ["blue sphere"]])
    opened.get_by_label("Steps").fill("1000")
    draw(opened)
    image = opened.locator('.card[data-state="sampling"] img').first
    expect(image).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    first = image.get_attribute("src")
    expect(image).not_to_have_attribute("src", first or "")
    part = opened.get_by_role("progressbar").evaluate("bar => bar.value / bar.max")
    assert 0 < part < 1
    opened.get_by_role("button", name="Cancel").click()
    expect(opened.locator("#job")).to_have_attribute("data-status", "cancelled")
    expect(opened.locator("#job")).to_contain_text("The job was cancelled.")


def test_an_enlarged_picture_goes_on_with_its_card(opened: Page, compose: Compose, working: Runner) -> None:
    """From preview to preview, to the finished picture with its verdict; the focus stays where it was."""
    held = list[Route]()
    opened.route("**/images/0.png", lambda route: held.append(route))
    compose(LISTS[:1])
    opened.get_by_label("Steps").fill("600")
    draw(opened)
    opened.locator('.card[data-state="sampling"] .frame').click()
    large = opened.locator(".large")
    first = large.get_attribute("src") or ""
    assert first.startswith("data:image/png")
    expect(large).not_to_have_attribute("src", first)
    dialog = opened.locator("#picture-dialog")
    dialog.get_by_role("button", name="Close").focus()
    is_finished(opened)
    held[0].continue_()
    expect(large).to_have_attribute("src", re.compile("^blob:"))
    expect(dialog.locator("[data-verdict]").first).to_be_visible()
    expect(dialog.get_by_role("button", name="Download")).to_be_visible()
    expect(dialog.get_by_role("button", name="Close")).to_be_focused()


def test_the_grid_is_downloaded(opened: Page, compose: Compose, working: Runner, client: httpx.Client) -> None:
    compose(LISTS)
    opened.get_by_label("Steps").fill("2")
    draw(opened)
    with opened.expect_download() as download:
        opened.get_by_role("button", name="Download grid").click()
    saved = Path(download.value.path()).read_bytes()
    job = shown_job(opened, client)
    assert saved == client.get(job["result"]["grid_url"]).content
    assert Image.open(io.BytesIO(saved)).format == "PNG"
    assert download.value.suggested_filename.endswith(".png")


def test_the_curl_line_draws_the_same(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client, tmp_path: Path
) -> None:
    compose(LISTS)
    grid = client.get(drawn(opened, client, Seed="11", Steps="3")["result"]["grid_url"]).content
    opened.get_by_text("The same with curl").click()
    opened.get_by_role("button", name="Copy as curl").click()
    copied = opened.evaluate("navigator.clipboard.readText()")
    for command in (copied, opened.locator("#command").inner_text()):
        subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, timeout=60)
        assert (tmp_path / "grid.png").read_bytes() == grid
        (tmp_path / "grid.png").unlink()


def test_a_picture_is_duplicated_and_removed(opened: Page, compose: Compose) -> None:
    compose([["red cube", "blue sphere"]])
    tiles = opened.locator("#strip .tile:not(.add)")
    for name, count in (("Duplicate the picture", 2), ("Remove the picture", 1), ("Remove the picture", 1)):
        opened.get_by_role("button", name=name, exact=True).click()
        expect(tiles).to_have_count(count)
    expect(opened.locator("#chosen")).to_have_text("Nothing chosen yet.")


def test_too_many_stages_are_refused_in_words(
    opened: Page, compose: Compose, alive: JobStore, complaints: list[str]
) -> None:
    compose([["red cube"]])
    for label, value in {"Steps": "2", "Stages": "4"}.items():
        opened.get_by_label(label).fill(value)
    draw(opened)
    expect(opened.locator("#refusal")).to_have_text("4 stages; 2 steps have 3, noise and picture included.")
    assert "422" in complaints.pop()


def test_times_are_said_in_whole_seconds_and_minutes(opened: Page) -> None:
    said = "import('./static/words.js').then(({ lasting }) => [1.44, 59.96, 119.7, 125].map(lasting))"
    assert opened.evaluate(said) == ["1.4 s", "1 min 0 s", "2 min 0 s", "2 min 5 s"]


def test_a_test_file_is_scored(opened: Page, working: Runner, client: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / 'it\'s, "new"; 2.json'  # which the shell or curl's -F would take apart
    file.write_text(json.dumps(LISTS))
    opened.get_by_role("tab", name="Score a test file").click()
    opened.locator("#file").set_input_files(file)
    expect(opened.locator("#drop")).to_contain_text("3 label lists")
    opened.get_by_label("Repeats").fill("4")
    opened.get_by_label("Steps").fill("3")
    opened.get_by_role("button", name="Score", exact=True).click()
    is_finished(opened)
    job = shown_job(opened, client)
    assert (job["kind"], job["labels"], len(job["result"]["repeats"])) == ("score", LISTS, 4)
    expect(opened.locator(".figures")).to_contain_text(f"{job['result']['accuracy']['mean']:.3f}")
    expect(opened.locator(".figures")).to_contain_text(f"± {job['result']['accuracy']['std']:.3f}")
    expect(opened.locator(".card [data-verdict]").first).to_be_visible()
    opened.get_by_text("By label", exact=True).click()
    shown = opened.locator(".more").first
    for one in job["result"]["by_label"]:
        if one["found"] < one["asked"] or one["extra"]:
            row = shown.get_by_role("row", name=one["label"], exact=False).first
            expect(row).to_contain_text(f"{one['asked']}{one['found']}{one['asked'] - one['found']}{one['extra']}")
            for other, count in one["instead"].items():
                assert shown.locator("title", has_text=f"{one['label']} missing, {other} instead: {count}").count() == 1
    opened.get_by_text("The same with curl").click()
    done = subprocess.run(
        ["sh", "-c", opened.locator("#command").inner_text()], cwd=tmp_path, capture_output=True, check=True, timeout=60
    )
    assert json.loads(done.stdout)["labels"] == LISTS
    opened.get_by_text("Worst pictures", exact=True).click()
    worst = opened.locator(".more").last
    expect(worst.locator("[data-state=judged] img:not([hidden])")).to_have_count(len(job["result"]["worst"]))
    for card, one in zip(worst.locator(".card").all(), job["result"]["worst"], strict=True):
        expect(card.locator("[data-verdict=missing], [data-verdict=right]")).to_have_count(len(one["labels"]))


def drop(page: Page, name: str, content: str, *, hexadecimal: bool = False) -> None:
    """Drop a file on the page, as a file manager does."""
    page.evaluate(
        """([name, content, hexadecimal]) => {
            const dataTransfer = new DataTransfer();
            if (hexadecimal) content = Uint8Array.from(content.match(/../g), (pair) => parseInt(pair, 16));
            dataTransfer.items.add(new File([content], name));
            for (const type of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true}));
        }""",
        [name, content, hexadecimal],
    )


def test_a_file_is_dropped_anywhere(opened: Page) -> None:
    drop(opened, "mine.json", json.dumps(LISTS))
    expect(opened.get_by_role("tab", name="Score a test file")).to_have_attribute("aria-selected", "true")
    expect(opened.locator("#drop")).to_contain_text("mine.json")
    expect(opened.get_by_role("button", name="Score", exact=True)).to_be_enabled()
    for content, words in (("{", "not JSON"), ('{"a": 1}', "not a list of label lists")):
        drop(opened, "bad.json", content)
        expect(opened.locator("#drop")).to_contain_text(words)
        expect(opened.get_by_role("button", name="Score", exact=True)).to_be_disabled()


def test_a_folder_that_is_dropped_is_told_what_to_do(opened: Page, tmp_path: Path) -> None:
    """Such as one of pictures to score."""
    (tmp_path / "mine").mkdir()
    data = {"items": [], "files": [str(tmp_path / "mine")], "dragOperationsMask": 1}
    session = opened.context.new_cdp_session(opened)
    for event in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": event, "x": 700, "y": 400, "data": data})
    expect(opened.locator("#drop")).to_contain_text("Pictures to score come as a zip.")
    expect(opened.get_by_role("button", name="Score", exact=True)).to_be_disabled()


def zip_of(lists: list[list[str]], colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A zip with a picture for each label list."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as names:
        for i in range(len(lists)):
            png = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(png, "PNG")
            names.writestr(f"{i}.png", png.getvalue())
    return archive.getvalue()


def test_pictures_in_a_zip_are_scored(opened: Page, working: Runner, client: httpx.Client, tmp_path: Path) -> None:
    """A zip dropped with its test file is scored, nothing is sampled, and the curl line does the same."""
    (tmp_path / "test.json").write_text(json.dumps(LISTS))
    (tmp_path / "mine.zip").write_bytes(zip_of(LISTS))
    opened.get_by_role("tab", name="Score a test file").click()
    expect(opened.get_by_label("Steps")).to_be_visible()
    opened.locator("#file").set_input_files([tmp_path / "mine.zip", tmp_path / "test.json"])
    expect(opened.locator("#drop")).to_contain_text("3 label lists")
    expect(opened.locator("#zip")).to_contain_text("The pictures in mine.zip are scored; none are generated.")
    expect(opened.get_by_label("Steps")).to_be_hidden()  # it has no effect on uploaded pictures
    opened.get_by_role("button", name="Score these pictures").click()
    is_finished(opened)
    job = shown_job(opened, client)
    assert (job["kind"], job["labels"], job["options"]) == ("score", LISTS, None)
    expect(opened.locator(".figures")).to_contain_text(f"{job['result']['accuracy']['mean']:.3f}")
    image = opened.locator(".card img").last
    expect(image).to_be_visible()
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [16, 16]
    expect(opened.locator(".card").last.locator("[data-verdict]").first).to_be_visible()
    opened.get_by_text("The same with curl").click()
    command = opened.locator("#command").inner_text()
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["result"]["accuracy"] == job["result"]["accuracy"]
    opened.get_by_role("button", name="Remove the zip").click()
    expect(opened.get_by_role("button", name="Score", exact=True)).to_be_enabled()
    expect(opened.get_by_label("Steps")).to_be_visible()
    assert "pictures=@" not in opened.locator("#command").inner_text()


def test_a_zip_alone_waits_for_its_test_file(opened: Page) -> None:
    drop(opened, "mine.zip", zip_of(LISTS).hex(), hexadecimal=True)
    expect(opened.locator("#zip")).to_contain_text("mine.zip")
    expect(opened.locator("#drop")).to_contain_text("Now add the test file")
    expect(opened.get_by_role("button", name="Score these pictures")).to_be_disabled()
    drop(opened, "test.json", json.dumps(LISTS))
    expect(opened.get_by_role("button", name="Score these pictures")).to_be_enabled()


def test_a_zip_that_does_not_fit_is_refused_in_words(opened: Page, alive: JobStore, complaints: list[str]) -> None:
    drop(opened, "test.json", json.dumps(LISTS))
    drop(opened, "mine.zip", zip_of(LISTS[:2]).hex(), hexadecimal=True)
    opened.get_by_role("button", name="Score these pictures").click()
    expect(opened.get_by_role("alert")).to_contain_text("2.png")
    assert "422" in complaints.pop()


def test_a_file_with_an_unknown_label_is_refused_in_words(opened: Page, alive: JobStore, complaints: list[str]) -> None:
    drop(opened, "mine.json", '[["red cube"], ["red kube"]]')
    opened.get_by_role("button", name="Score", exact=True).click()
    expect(opened.get_by_role("alert")).to_contain_text('unknown label "red kube"; did you mean "red cube"?')
    assert "422" in complaints.pop()


def test_a_file_that_was_edited_after_it_was_chosen_is_to_be_chosen_again(
    opened: Page, working: Runner, client: httpx.Client, tmp_path: Path
) -> None:
    """Browsers do not send it. The service is not to blame."""
    (tmp_path / "test.json").write_text(json.dumps(LISTS))
    opened.get_by_role("tab", name="Score a test file").click()
    opened.locator("#file").set_input_files(tmp_path / "test.json")
    opened.get_by_label("Steps").fill("2")
    opened.get_by_label("Repeats").fill("1")
    score = opened.get_by_role("button", name="Score", exact=True)
    expect(score).to_be_enabled()
    (tmp_path / "test.json").write_text(json.dumps(LISTS[:1]))
    score.click()
    expect(opened.get_by_role("alert")).to_have_text("test.json has changed since it was chosen. Choose it again.")
    expect(opened.locator("#ready")).to_have_text("Ready")
    opened.locator("#file").set_input_files(tmp_path / "test.json")
    assert made(opened, client, score.click)["labels"] == LISTS[:1]


def test_a_button_that_copies_has_its_name_back_after_two_clicks(opened: Page) -> None:
    opened.clock.install()
    opened.get_by_text("The same with curl").click()
    button = opened.locator("#copy-command")
    for _ in range(2):
        button.click()
        expect(button).to_have_text("Copied")
    opened.clock.run_for(10_000)
    expect(button).to_have_text("Copy")


def test_history_address_and_reuse(opened: Page, compose: Compose, working: Runner, client: httpx.Client) -> None:
    ids = []
    for seed, lists in enumerate((LISTS[:1], LISTS)):
        compose(lists)
        ids.append(drawn(opened, client, Seed=str(seed), Steps="2")["id"])
    jobs = opened.locator("#jobs a")
    expect(jobs).to_have_count(2)
    expect(jobs.first).to_contain_text("3 pictures")
    expect(jobs.first.locator("img")).to_be_visible()
    jobs.last.click()
    expect(opened.locator(".card")).to_have_count(1)
    assert shown_job(opened, client)["id"] == ids[0]
    opened.go_back()
    expect(opened.locator(".card")).to_have_count(3)
    opened.reload()  # the address alone brings the job back
    expect(opened.locator(".card")).to_have_count(3)
    is_finished(opened)
    opened.get_by_role("button", name="Edit as new").click()
    expect(opened.locator("#strip .tile[aria-label^='Picture']")).to_have_count(3)
    expect(opened.get_by_label("Seed")).to_have_value("1")
    expect(opened.get_by_label("Steps")).to_have_value("2")
    expect(opened.locator("#go")).to_have_text("Draw 3 pictures")


def test_a_picture_of_a_request_is_made_again_from_its_job(
    page: Page, address: str, working: Runner, client: httpx.Client, tmp_path: Path
) -> None:
    """The position in its recipe decides its noise: with curl, and when edited as a new job."""
    whole = client.post("/generate", json={"labels": LISTS, "seed": 7, "steps": 3, "sampler": "euler"}).json()
    picture = client.get(whole["result"]["pictures"][2]["url"]).content
    job = client.post("/generate/png", files={"file": picture}).json()
    page.goto(f"{address}#{job['id']}")
    is_finished(page)
    page.get_by_role("button", name="Copy as curl").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    page.get_by_role("button", name="Edit as new").click()
    expect(page.locator("#kept")).to_contain_text("noise of its request's pictures from number 3 on")
    page.get_by_text("The same with curl").click()
    for command in (copied, page.locator("#command").inner_text()):
        subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, timeout=60)
        assert (tmp_path / "grid.png").read_bytes() == picture
        (tmp_path / "grid.png").unlink()
    again = drawn(page, client)
    assert client.get(again["result"]["grid_url"]).content == picture
    page.get_by_label("Seed").fill("")
    expect(page.locator("#kept")).to_be_hidden()
    assert drawn(page, client)["first"] == 0


def test_pictures_are_drawn_until_exact_and_say_that_they_were_selected(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client
) -> None:
    compose(LISTS)
    job = drawn(opened, client, Steps="2", Attempts="3")
    assert (job["options"]["until"], job["options"]["attempts"]) == ("exact", 3)
    kept = job["result"]["pictures"][0]["kept"]
    expect(opened.locator("#job .note")).to_contain_text("Selected")
    frame = opened.locator(".frame").first
    expect(frame).to_have_attribute("aria-label", re.compile(f"selected, attempt {kept}"))
    frame.click()
    expect(opened.locator("#picture-dialog .facts")).to_contain_text(f"attempt {kept} of 3")
    opened.keyboard.press("Escape")
    opened.get_by_label("Attempts").fill("")
    opened.get_by_role("button", name="Edit as new").click()
    expect(opened.get_by_label("Attempts")).to_have_value("3")
    assert not drawn(opened, client, Attempts="")["result"]["selected"]
    expect(opened.locator("#job .note")).to_have_count(0)


def test_a_queued_job_says_its_place_and_when_it_will_be_done(
    opened: Page, compose: Compose, alive: JobStore, client: httpx.Client
) -> None:
    announce(alive, client, 0.1)
    submitted(client, labels=LISTS)
    compose(LISTS[:2])
    draw(opened)
    expect(opened.locator("#job .meta")).to_contain_text("Queued, 2 pictures ahead")
    expect(opened.locator("#job .meta")).to_contain_text(re.compile(r"done at \d\d:\d\d:\d\d"))


def test_the_way_from_noise_is_shown_and_asked_for_again(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client
) -> None:
    compose(LISTS)
    job = drawn(opened, client, Steps="4", Stages="3")
    assert job["trajectory"] == 3
    opened.locator(".frame").nth(1).click()
    way = opened.locator(".way img")
    expect(way).to_be_visible()
    strip = Image.open(io.BytesIO(client.get(job["result"]["pictures"][1]["trajectory_url"]).content))
    assert way.evaluate("image => [image.naturalWidth, image.naturalHeight]") == list(strip.size)
    for key in ("ArrowRight", "ArrowLeft"):
        opened.keyboard.press(key)
    expect(way).to_be_visible()
    opened.keyboard.press("Escape")
    opened.get_by_label("Stages").fill("")
    opened.get_by_role("button", name="Edit as new").click()
    expect(opened.get_by_label("Stages")).to_have_value("3")
    assert drawn(opened, client, Stages="")["trajectory"] is None
    opened.locator(".frame").first.click()
    expect(opened.locator(".large")).to_be_visible()
    expect(way).to_have_count(0)


def test_a_png_is_made_again(page: Page, address: str, working: Runner, client: httpx.Client, tmp_path: Path) -> None:
    """A PNG dropped anywhere or chosen; its grid keeps its columns, also when edited as a new job."""
    body = {"labels": LISTS, "seed": 7, "steps": 3, "columns": 1}
    whole = client.post("/generate", json=body).json()
    grid = client.get(whole["result"]["grid_url"]).content
    page.goto(address)
    page.get_by_role("tab", name="Score a test file").click()
    dropped = made(page, client, lambda: drop(page, "grid.png", grid.hex(), hexadecimal=True))
    assert client.get(dropped["result"]["grid_url"]).content == grid
    page.get_by_role("button", name="Edit as new").click()
    expect(page.locator("#kept")).to_contain_text("1 column in the grid")
    assert client.get(drawn(page, client)["result"]["grid_url"]).content == grid
    (tmp_path / "picture.png").write_bytes(client.get(whole["result"]["pictures"][1]["url"]).content)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="From a PNG").click()
    again = made(page, client, lambda: chooser.value.set_files(tmp_path / "picture.png"))
    assert (again["labels"], again["first"]) == (LISTS[1:2], 1)


def test_a_png_of_somebody_else_is_refused_in_words(opened: Page, alive: JobStore, complaints: list[str]) -> None:
    png = io.BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    drop(opened, "holiday.png", png.getvalue().hex(), hexadecimal=True)
    expect(opened.get_by_role("alert")).to_contain_text("recipe")
    assert "422" in complaints.pop()


def test_what_no_field_shows_is_kept_and_told(page: Page, address: str, working: Runner, client: httpx.Client) -> None:
    options = {"sampler": "ddim", "eta": 0.8, "spacing": "trailing", "guidance_interval": [0.2, 0.8], "clip_x0": True}
    job = client.post("/generate", json={"labels": LISTS, "seed": 7, "steps": 3, **options}).json()
    page.goto(f"{address}#{job['id']}")
    is_finished(page)
    page.get_by_role("button", name="Edit as new").click()
    kept = page.locator("#kept-words")
    for words in ("eta 0.8", "spacing trailing", "guidance from 0.2 to 0.8 of T", "x0 clipped"):
        expect(kept).to_contain_text(words)
    assert (again := drawn(page, client))["options"] == job["options"]
    assert client.get(again["result"]["grid_url"]).content == client.get(job["result"]["grid_url"]).content
    page.get_by_label("Sampler").select_option("euler")
    expect(kept).not_to_contain_text("eta")
    assert drawn(page, client)["options"] == {**job["options"], "sampler": "euler", "eta": 0.0}
    page.get_by_role("tab", name="Score a test file").click()
    expect(kept).to_be_hidden()
    page.get_by_role("tab", name="Draw pictures").click()
    page.get_by_role("button", name="Drop the options kept from the job").click()
    expect(kept).to_be_hidden()
    plain = drawn(page, client)["options"]
    assert (plain["spacing"], plain["guidance_interval"], plain["clip_x0"]) == ("uniform", [0.0, 1.0], False)


def test_older_jobs_come_page_by_page(page: Page, address: str, client: httpx.Client, alive: JobStore) -> None:
    for _ in range(15):
        client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).raise_for_status()
    page.goto(address)
    expect(page.locator("#jobs a")).to_have_count(12)
    page.get_by_role("button", name="Older jobs").click()
    expect(page.locator("#jobs a")).to_have_count(15)
    expect(page.get_by_role("button", name="Older jobs")).to_be_hidden()


def test_the_gallery_stays_where_it_is_while_jobs_end(
    page: Page, address: str, client: httpx.Client, alive: JobStore
) -> None:
    """It keeps the older jobs that were asked for, and the focus, also that of the job that ends."""
    ids = [
        client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()["id"]
        for _ in range(14)
    ]
    page.goto(address)
    page.get_by_role("button", name="Older jobs").click()
    jobs = page.locator("#jobs a")
    expect(jobs).to_have_count(14)
    for ending, focused in ((ids[-1], ids[0]), (ids[-2], ids[-2])):
        page.locator(f"a[data-job='{ending}']").click()
        expect(page.locator("#job")).to_contain_text("Waiting for a worker")
        page.locator(f"a[data-job='{focused}']").focus()
        client.post(f"/jobs/{ending}/cancel").raise_for_status()
        expect(page.locator(f"a[data-job='{ending}'] .status")).to_have_text("cancelled")
        expect(page.locator(f"a[data-job='{focused}']")).to_be_focused()
        expect(jobs).to_have_count(14)


def test_a_gallery_says_when_its_jobs_were_created(
    page: Page, address: str, client: httpx.Client, alive: JobStore
) -> None:
    """By the clock, which stays true while the page is open; jobs may be kept for longer than a week."""
    today = datetime.datetime.now().astimezone().replace(hour=9, minute=7)
    days = [datetime.datetime(2026, 1, 5, 14, 3).astimezone().isoformat(), today.isoformat()]

    def of_other_days(route: Route) -> None:
        answer = route.fetch().json()
        for job, day in zip(answer["jobs"], days, strict=True):
            job["created_at"] = day
        route.fulfill(json=answer)

    for _ in range(2):
        client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).raise_for_status()
    page.route("**/jobs?*", of_other_days)
    page.goto(address)
    expect(page.locator("#jobs .meta span:first-child")).to_have_text(
        [re.compile("^Jan 5, 0?2:03.PM$"), re.compile("^0?9:07.AM$")]
    )


def test_a_picture_that_is_no_longer_shown_is_given_back(
    page: Page, address: str, working: Runner, client: httpx.Client
) -> None:
    """A page that is open for days would keep every picture that it ever showed."""
    page.add_init_script(
        """const {createObjectURL, revokeObjectURL} = URL;
        window.kept = new Set();
        URL.createObjectURL = (blob) => { const url = createObjectURL(blob); kept.add(url); return url; };
        URL.revokeObjectURL = (url) => { revokeObjectURL(url); kept.delete(url); };"""
    )
    for _ in range(3):
        client.post("/generate", json={"labels": LISTS, "steps": 1}).raise_for_status()
    page.goto(address)
    expect(page.locator("#jobs img:not([hidden])")).to_have_count(3)
    page.locator("#jobs a").first.click()
    expect(page.locator(".card img:not([hidden])")).to_have_count(3)
    assert page.evaluate("kept.size") == 6
    page.goto(f"{address}#")
    expect(page.locator(".empty")).to_be_visible()
    assert page.evaluate("kept.size") == 3


def test_a_job_that_is_over_or_never_was_is_told_in_words(page: Page, address: str, complaints: list[str]) -> None:
    page.goto(f"{address}#{'0' * 32}")
    expect(page.locator("#job")).to_contain_text("There is no job")
    assert "404" in complaints.pop()


def test_without_a_worker_or_a_service_it_says_so(
    opened: Page, compose: Compose, client: httpx.Client, complaints: list[str]
) -> None:
    expect(opened.locator("#ready")).to_contain_text("No worker is running")
    compose([["red cube"]])
    draw(opened)
    expect(opened.get_by_role("alert")).to_contain_text("No worker is running; nothing was queued. Try again in 10 s.")
    opened.context.set_offline(True)
    draw(opened)
    expect(opened.get_by_role("alert")).to_contain_text("The service does not answer.")
    opened.context.set_offline(False)
    assert all("503" in one or "ERR_INTERNET_DISCONNECTED" in one for one in complaints)
    complaints.clear()


def test_an_answer_that_was_lost_is_asked_for_again_and_makes_one_job(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client, complaints: list[str]
) -> None:
    """The request arrives but its answer is lost: the retry has the same Idempotency-Key."""
    keys = []

    def lose_the_first(route: Any) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) == 1:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    opened.route("**/generate", lose_the_first)
    compose([["red cube"]])
    opened.get_by_label("Steps").fill("2")
    draw(opened)
    is_finished(opened)
    assert keys == [keys[0]] * 2
    assert len(client.get("/jobs").json()["jobs"]) == 1
    complaints.clear()


def test_events_go_on_after_the_line_broke(
    opened: Page, compose: Compose, working: Runner, complaints: list[str]
) -> None:
    """The first stream breaks after one event; the page reconnects and resumes."""
    asked: list[str | None] = []

    def cut_the_first(route: Any) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) == 1:
            body = 'event: status\ndata: {"status": "running"}\nid: 0-1\n\n'
            route.fulfill(status=200, content_type="text/event-stream", body=body)
        else:
            route.continue_()

    opened.route("**/events", cut_the_first)
    compose([["red cube"], ["gray cube"]])
    opened.get_by_label("Steps").fill("2")
    draw(opened)
    is_finished(opened)
    assert asked[:2] == [None, "0-1"]
    expect(opened.locator(".card [data-verdict]").first).to_be_visible()


def test_an_api_key_is_asked_for_kept_and_sent(
    context: BrowserContext, page: Page, settings: Settings, working: Runner, complaints: list[str]
) -> None:
    with serving(settings.model_copy(update={"api_keys": f"ann:{hash_of('lg_secret')}"})) as client:
        page.goto(str(client.base_url))
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        assert all("401" in one for one in complaints)
        expect(dialog.get_by_role("alert")).to_have_text("This service requires an API key.")
        dialog.get_by_label("Key").fill("lg_sekret")
        dialog.get_by_role("button", name="Save").click()
        expect(dialog.get_by_role("alert")).to_have_text("The API key was not accepted.")
        assert violations(page) == []
        assert all("401" in one for one in complaints)
        complaints.clear()
        dialog.get_by_label("Key").fill("lg_secret")
        dialog.get_by_role("button", name="Save").click()
        expect(page.locator("#refusal")).to_be_empty()
        page.get_by_role("button", name="red cube", exact=True).click()
        page.get_by_label("Steps").fill("2")
        draw(page)
        is_finished(page)
        expect(page.locator(".card img")).to_be_visible()
        assert "$LABELGRID_API_KEY" in page.locator("#command").text_content(timeout=1000)  # type: ignore[operator]
        assert "lg_secret" not in page.content()
        page.reload()
        is_finished(page)
        expect(page.locator("#jobs a")).to_have_count(1)
        page.goto("about:blank")


@pytest.mark.parametrize(("leave", "kept"), [("Enter", "lg_secret"), ("Escape", None), ("Cancel", None)])
def test_enter_saves_the_api_key(opened: Page, leave: str, kept: str | None) -> None:
    opened.get_by_role("button", name="Key", exact=True).click()
    dialog = opened.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key").fill("lg_secret")
    if leave == "Cancel":
        dialog.get_by_role("button", name="Cancel").click()
    else:
        opened.keyboard.press(leave)
    expect(dialog).to_be_hidden()
    opened.wait_for_function("kept => localStorage.getItem('labelgrid.key') === kept", arg=kept)


def test_an_api_key_that_cannot_be_sent_is_not_blamed_on_the_connection(opened: Page, alive: JobStore) -> None:
    """As one that was copied with an invisible character; no request can have it in a header."""
    opened.get_by_role("button", name="Key", exact=True).click()
    dialog = opened.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key").fill("lg_\u200bsecret")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_have_text(
        "The API key has a character that cannot be sent. Copy the key again."
    )
    dialog.get_by_label("Key").fill("")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_be_hidden()
    expect(opened.locator("#ready")).to_have_text("Ready")
    expect(opened.locator("#refusal")).to_be_empty()


def test_a_job_is_followed_from_its_address_while_it_runs(
    page: Page, address: str, working: Runner, client: httpx.Client
) -> None:
    body = {"labels": LISTS, "steps": 600}
    job = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()
    page.goto(f"{address}#{job['id']}")
    expect(page.locator(".card")).to_have_count(3)
    expect(page.locator(".card").first).to_contain_text("red cube")
    is_finished(page)


@pytest.mark.parametrize("status", ["failed"])
def test_a_failed_job_says_why(page: Page, address: str, client: httpx.Client, alive: JobStore, status: str) -> None:
    answer = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()
    page.goto(f"{address}#{answer['id']}")
    expect(page.locator("#job")).to_contain_text("Waiting for a worker")
    time.sleep(0.1)
    alive.fail(answer["id"], "the checkpoint is gone")
    expect(page.locator("#job")).to_contain_text("The job failed: the checkpoint is gone")


def test_the_gallery_shows_grids_but_not_those_of_large_jobs(
    page: Page, address: str, working: Runner, client: httpx.Client
) -> None:
    """The first picture stands for a large job: neither its grid nor its other pictures are read."""
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url.removeprefix(address)))
    bodies = [{"labels": LISTS[:1] * n, "columns": 4, "steps": 1} for n in (1, 6, 17)]
    large, small, single = reversed([client.post("/generate", json=body).json()["id"] for body in bodies])
    page.goto(address)
    sizes = {large: [16, 16], small: [2 + 4 * 18, 2 + 2 * 18], single: [16, 16]}
    for job, size in sizes.items():
        thumbnail = page.locator(f"a[data-job='{job}'] img")
        expect(thumbnail).to_be_visible()
        assert thumbnail.evaluate("image => [image.naturalWidth, image.naturalHeight]") == size
        box = thumbnail.bounding_box()
        assert box is not None
        assert box["width"] / box["height"] == pytest.approx(size[0] / size[1], abs=0.05)
        assert box["height"] <= 100
    read = {path for path in asked if path.endswith(".png")}
    assert read == {f"/jobs/{large}/images/0.png", f"/jobs/{small}/grid.png", f"/jobs/{single}/grid.png"}


def test_all_pictures_are_downloaded_as_a_zip(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client
) -> None:
    compose(LISTS)
    job = drawn(opened, client, Steps="2")
    content = client.get(f"/jobs/{job['id']}/pictures.zip").raise_for_status().content
    for name in ("Download zip", re.compile("^Zip: 3 pictures")):
        with opened.expect_download() as download:
            opened.get_by_role("button", name=name).click()
        assert download.value.suggested_filename == f"labelgrid-{job['id'][:8]}.zip"
        assert Path(download.value.path()).read_bytes() == content


def test_a_job_that_is_gone_leaves_the_gallery(
    page: Page, address: str, client: httpx.Client, alive: JobStore, complaints: list[str]
) -> None:
    """Another tab deleted it, or the answer was lost."""
    job = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()["id"]
    client.post(f"/jobs/{job}/cancel").raise_for_status()
    page.goto(address)
    expect(page.locator("#jobs a")).to_have_count(1)
    client.delete(f"/jobs/{job}").raise_for_status()
    page.get_by_role("button", name=re.compile("^Delete: ")).click()
    page.get_by_role("button", name=re.compile("^Delete for good: ")).click()
    expect(page.locator("#jobs a")).to_have_count(0)
    expect(page.locator("#refusal")).to_be_empty()
    complaints.clear()


def test_the_gallery_goes_on_to_older_jobs_when_all_on_show_are_deleted(
    page: Page, address: str, client: httpx.Client, alive: JobStore
) -> None:
    for _ in range(13):
        job = client.post("/generate", json={"labels": LISTS}, headers={"prefer": "respond-async"}).json()["id"]
        client.post(f"/jobs/{job}/cancel").raise_for_status()
    page.goto(address)
    jobs = page.locator("#jobs a")
    expect(jobs).to_have_count(12)
    for left in range(11, 0, -1):
        for name in ("^Delete: ", "^Delete for good: "):
            page.get_by_role("button", name=re.compile(name)).first.click()
        expect(jobs).to_have_count(left)
    newer = jobs.get_attribute("data-job")
    for name in ("^Delete: ", "^Delete for good: "):
        page.get_by_role("button", name=re.compile(name)).click()
    expect(page.locator(f"[data-job='{newer}']")).to_have_count(0)
    expect(jobs).to_have_count(1)
    expect(page.get_by_role("button", name="Older jobs")).to_be_hidden()
    expect(page.locator("#canvas")).to_be_focused()


def test_the_gallery_keeps_more_jobs_than_the_service_gives_at_once(
    page: Page, address: str, client: httpx.Client, alive: JobStore
) -> None:
    for _ in range(104):
        client.post("/generate", json={"labels": LISTS[:1]}, headers={"prefer": "respond-async"}).raise_for_status()
    page.goto(address)
    jobs = page.locator("#jobs a")
    for count in range(12, 97, 12):
        expect(jobs).to_have_count(count)
        page.get_by_role("button", name="Older jobs").click()
    expect(jobs).to_have_count(104)
    with page.expect_response(re.compile("/jobs[?].*cursor=")):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # they are read again: they are open
    expect(jobs).to_have_count(104)
    expect(page.get_by_role("button", name="Older jobs")).to_be_hidden()


def test_a_job_is_deleted_from_the_gallery_by_keyboard(
    opened: Page, compose: Compose, working: Runner, client: httpx.Client, complaints: list[str]
) -> None:
    ids = []
    for lists in (LISTS[:1], LISTS):
        compose(lists)
        ids.append(drawn(opened, client, Steps="2")["id"])
    expect(opened.locator("#jobs a")).to_have_count(2)
    delete = opened.get_by_role("button", name=re.compile("^Delete: 3 pictures"))
    delete.focus()
    opened.keyboard.press("Enter")
    sure = opened.get_by_role("button", name=re.compile("^Delete for good: 3 pictures"))
    expect(sure).to_be_focused()
    opened.keyboard.press("Tab")  # leaving takes it back
    expect(sure).to_have_count(0)
    assert client.get(f"/jobs/{ids[1]}").status_code == 200
    delete.focus()
    opened.keyboard.press("Enter")
    opened.keyboard.press("Enter")
    expect(opened.locator("#jobs a")).to_have_count(1)
    assert client.get(f"/jobs/{ids[1]}").status_code == 404
    expect(opened.locator("#jobs a")).to_be_focused()
    expect(opened.locator(".empty")).to_be_visible()  # the page showed the job that is gone
    assert opened.evaluate("location.hash") == ""
    assert client.get(f"/jobs/{ids[0]}").status_code == 200


def test_a_cancelled_job_shows_the_pictures_it_has_and_asks_for_no_others(
    page: Page, address: str, working: Runner, client: httpx.Client
) -> None:
    """Also when it is opened later. The page hears which pictures there are, so nothing that it asks for is missing."""
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url.removeprefix(address)))
    body = {"labels": LISTS[:1] * 20, "steps": 200}  # a worker samples eight at a time
    job = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()
    path = f"/jobs/{job['id']}"
    page.goto(f"{address}#{job['id']}")
    expect(page.locator(".card[data-state=made]").first).to_be_visible()
    client.post(f"{path}/cancel").raise_for_status()
    for _ in range(2):
        expect(page.locator("#job")).to_contain_text("The job was cancelled.")
        done = client.get(path).json()["progress"]["done"]
        assert 0 < done < 20
        expect(page.locator(".card[data-state=made] img")).to_have_count(done)
        expect(page.locator(".card[data-state=abandoned]")).to_have_count(20 - done)
        expect(page.get_by_role("button", name=re.compile("^Picture .*, not finished. Enlarge$"))).to_have_count(
            20 - done
        )
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
        read = [one for one in asked if one.startswith(f"{path}/images/")]
        assert len(read) == len(set(read)) == done
        asked.clear()
        page.reload()


def test_a_picture_is_read_once(opened: Page, compose: Compose, working: Runner, client: httpx.Client) -> None:
    """Also one that is still on its way when the job ends."""
    held = list[Route]()
    opened.route("**/images/0.png", lambda route: held.append(route))
    compose(LISTS[:1])
    drawn(opened, client, Steps="2")
    expect(opened.get_by_role("status")).to_contain_text("1 picture, finished.")
    assert len(held) == 1
    held[0].continue_()
    expect(opened.locator(".card [data-verdict]").first).to_be_visible()
    assert len(held) == 1
