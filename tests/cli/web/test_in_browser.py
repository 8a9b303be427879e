"""The page as somebody sees it: headless Chromium drops a photo, waits, chooses a step, and downloads the LoRA.

``HDB_SCREENSHOTS`` names a folder that screenshots of a longer fit are written to, such as ``docs`` for README's.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
STEPS = 20 if "HDB_SCREENSHOTS" in os.environ else 2
WAIT_MS = 300_000


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def screenshots(tmp_path):
    folder = Path(os.environ.get("HDB_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shoot(page, file: Path, largest_bytes: int = 400_000) -> None:
    """Write a screenshot of the whole page, in few colours, so that a README can carry it."""
    page.wait_for_timeout(700)  # for what fades in
    page.screenshot(path=file, full_page=True)
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(128)
    small.save(file, optimize=True)
    assert file.stat().st_size < largest_bytes


def fill_in(page, photo: Path, steps: int) -> None:
    page.get_by_label("I make LoRAs only of myself").check()
    page.locator("#photos input[type=file]").set_input_files(photo)
    page.get_by_role("button", name="More settings").click()
    page.locator("#crop input").uncheck()
    page.locator("#crops img").first.wait_for(timeout=WAIT_MS)
    page.get_by_text("no face found").first.wait_for(state="hidden", timeout=WAIT_MS)
    page.get_by_label("Steps", exact=True).first.fill(str(steps))
    page.get_by_label("Sampling steps of the pictures").fill("4")
    page.locator("#prompts textarea").fill("a sks face\na pencil drawing of a sks face")
    page.get_by_role("button", name="More settings").click()


def overflows(page) -> int:
    """How many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_a_dropped_photo_becomes_a_lora_that_is_chosen_and_downloaded(browser, page, portrait, tmp_path, screenshots):
    errors = []
    tab = browser.new_page(viewport=DESKTOP, accept_downloads=True)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    fetched = []
    tab.on("request", lambda request: fetched.append(request.url))
    tab.goto(page[1])
    fill_in(tab, portrait, steps=STEPS)
    dropped = time.monotonic()
    tab.get_by_role("button", name="Start").first.click()
    tab.locator("#picture img").first.wait_for(timeout=WAIT_MS)
    tab.get_by_text("lora:me:1>").wait_for(timeout=WAIT_MS)  # the last step, at which the slider is put
    tab.locator("#files a[download]").first.wait_for(timeout=WAIT_MS)
    with tab.expect_download() as download:
        tab.locator("#files a[download]").first.click()
    print(f"from Start to download: {time.monotonic() - dropped:.1f} s")
    lora = tmp_path / download.value.suggested_filename
    download.value.save_as(lora)
    assert lora.name == "me.safetensors"
    with safe_open(lora, "pt") as file:
        assert file.keys()
    shoot(tab, screenshots / "ui.png")
    assert overflows(tab) <= 0
    assert tab.get_by_test_id("toast-body").count() == 0  # nothing went wrong on the way
    before = tab.locator("#picture img").first.get_attribute("src")
    tab.locator("#step input[type=number]").fill("1")
    tab.locator("#step input[type=number]").press("Tab")
    tab.wait_for_function("old => document.querySelector('#picture img').src !== old", arg=before, timeout=WAIT_MS)
    tab.get_by_text(f"lora:me-{STEPS // 4 or 1:06}").wait_for(timeout=WAIT_MS)
    assert errors == []
    assert [url for url in fetched if not url.startswith((page[1], "blob:", "data:"))] == []
    tab.close()


def test_a_page_that_was_closed_finds_its_fit_again_on_a_phone(browser, page, portrait, screenshots):
    context = browser.new_context(viewport=PHONE, device_scale_factor=1)
    tab = context.new_page()
    tab.goto(page[1])
    fill_in(tab, portrait, steps=2)
    tab.get_by_role("button", name="Start").first.click()
    tab.locator("#status [data-state]").wait_for(timeout=WAIT_MS)
    tab.close()  # in the middle
    tab = context.new_page()
    tab.goto(page[1])
    tab.locator("#picture img").first.wait_for(timeout=WAIT_MS)
    assert "done" in tab.locator("#status").inner_text()
    shoot(tab, screenshots / "ui-phone.png")
    assert overflows(tab) <= 0
    context.close()


def test_a_mistake_is_told_on_the_page(browser, page):
    tab = browser.new_page(viewport=DESKTOP)
    tab.goto(page[1])
    tab.get_by_role("button", name="Start").first.click()
    tab.get_by_text("tick the box at the top").first.wait_for(timeout=WAIT_MS)
    tab.close()
