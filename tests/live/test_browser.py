"""The page in a headless Chromium, where there is one.

B2TXT_CHROMIUM names its program, or it is on PATH. The extra `browser` drives it.
"""

import os
import queue
import shutil

import pytest
from live_speech import FINAL, PROGRESS

from b2txt_jax.live.events import Began, Chosen
from b2txt_jax.live.outputs.page import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("B2TXT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_sentence_is_shown_and_confirmed_with_the_keyboard_alone():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
    chosen, toggled = queue.Queue(), queue.Queue()
    page = Page("127.0.0.1", 0, None, chosen.put, lambda: toggled.put(True))
    errors = []
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--no-zygote", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        view = browser.new_page()
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("requestfailed", lambda request: errors.append(request.url))
        view.goto(page.url)
        page.show(Began("s-1", "a trial"))
        page.show(PROGRESS)
        view.wait_for_selector("#sentence.partial:has-text('the')")
        assert "2 dropped" in view.inner_text("#status")
        page.show(FINAL)
        view.wait_for_selector("#sentence .word:has-text('cat')")
        assert view.inner_text("[role=status]") == "the cat"  # what a screen reader says
        view.keyboard.press("2")
        assert chosen.get(timeout=120) == Chosen("s-1", "a cat", True)
        page.show(Chosen("s-1", "a cat", True))
        view.wait_for_selector("#earlier li:has-text('a cat (corrected)')")
        view.keyboard.press("Space")
        assert toggled.get(timeout=120)
        unnamed = view.query_selector_all(
            "button:empty, input:not(:is(label + input)), img:not([alt])"
        )
        assert not unnamed
        browser.close()
    page.close()
    assert errors == []
