"""`python -m tests_browser.screenshots [FOLDER]`: takes docs/page-*.png, with the promoted checkpoint."""

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from service.local.demo import LABELS, free_port
from service.local.supervisor import Supervisor
from tests_browser.conftest import browser_on_path, choose

DOCS = Path(__file__).parents[1] / "docs"
SEED = 7  # as in `make demo`
DESKTOP = {"width": 1280, "height": 860}
PLACED = ["red cube", "blue sphere", "gray cylinder", "cyan cube", "yellow sphere"]
PHONE = {"width": 390, "height": 844}


def save(taken: bytes, file: Path) -> None:
    Image.open(io.BytesIO(taken)).convert("RGB").save(file, optimize=True)


def look_up(page: Page) -> None:
    """Scroll the page and its parts to the top, with the pointer where it highlights nothing."""
    page.locator("h1").hover()
    page.evaluate("document.querySelectorAll('*').forEach(part => { part.scrollTop = 0 })")


def take(address: str, folder: Path) -> None:
    """Finished in light mode, half-way in dark mode, on a phone, and the frame in which objects are placed."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=browser_on_path(), args=arguments)
        desktop: dict[str, Any] = {"viewport": DESKTOP, "device_scale_factor": 1}
        page = browser.new_page(**desktop, color_scheme="light")
        page.goto(address)
        choose(page, LABELS)
        page.get_by_label("Seed").fill(str(SEED))
        page.locator("#go").click()
        page.locator(".figures").wait_for()
        expect(page.locator(".card img[hidden], #jobs img[hidden]")).to_have_count(0)
        look_up(page)
        save(page.screenshot(), folder / "page-light.png")
        drawn = page.url

        page.emulate_media(color_scheme="dark")
        page.locator("#model").select_option("iclevr-320x240")  # in steps, to see one half-way
        page.get_by_label("Steps").fill("100")
        page.locator("#go").click()
        page.locator("#job[data-status=running]").wait_for()  # until then the progress shown is the last job's
        while page.locator(".progress").evaluate("bar => bar.value / bar.max") < 0.4:
            page.wait_for_timeout(50)
        look_up(page)
        save(page.screenshot(), folder / "page-dark.png")

        page.emulate_media(color_scheme="light")
        page.locator("#model").select_option("iclevr-320x240-1step")
        choose(page, [PLACED])
        page.get_by_role("button", name="Choose", exact=True).click()
        save(page.locator("#places-block").screenshot(), folder / "page-places.png")

        phone = browser.new_page(viewport=PHONE, device_scale_factor=1, color_scheme="light", is_mobile=True)  # type: ignore[arg-type]
        phone.goto(drawn)
        phone.locator(".figures").wait_for()
        phone.locator(".job-head").evaluate("head => scrollBy(0, head.getBoundingClientRect().top - 24)")
        phone.wait_for_timeout(300)
        save(phone.screenshot(), folder / "page-phone.png")
        browser.close()


def main(folder: Path = DOCS) -> None:
    with tempfile.TemporaryDirectory(prefix="labelgrid-") as state:
        supervisor = Supervisor(port=free_port(), state=Path(state), redis_url=None)

        def on_ready(address: str) -> None:
            try:
                take(address, folder)
            finally:
                supervisor.stopping = True

        supervisor.run(on_ready)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
