"""The page in a real browser: every way through it, with the keyboard too, on a phone's width and in the dark."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served

playwright_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
SHOTS = os.environ.get("ANTEFIX_SCREENSHOTS")
"""A folder that pictures are written to; none are without it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Any]:
    """Opens the page and holds that nothing went wrong in it, and that it asked nobody but its server."""
    contexts, troubles = [], []

    def opened(**how: Any) -> Any:
        context = browser.new_context(**how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.on("request", lambda r: None if r.url.startswith((served.address, "data:")) else troubles.append(r.url))
        page.goto(served.address)
        page.wait_for_selector(".list input")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def choose(page: Any, name: str, chooser: int = 0) -> None:
    page.locator(".chooser").nth(chooser).locator(".list label", has_text=name).click()
    page.locator(".chooser").nth(chooser).locator(".card dd", has_text="prefix_tuning").first.wait_for()


def written(page: Any, place: int = 0) -> str:
    page.locator(".figures").nth(place).filter(has_text="written").wait_for()
    found: str = page.locator(".written").nth(place).inner_text()
    return found


def picture(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_a_table_becomes_a_text(open_page: Any, served: Served) -> None:
    page = open_page()
    choose(page, "menus")
    assert "Sentences about places to eat." in page.locator(".card").first.inner_text()
    assert page.locator("input[value=table]").is_checked(), "the prefix reads tables, so a table is asked for"
    page.get_by_label("Field 1", exact=True).fill("name")
    page.get_by_label("Value of name").fill("Fern Hill")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Write").click()
    shown = written(page)
    with served.client() as client:
        asked = {"model": "menus", "table": {"name": "Fern Hill"}, "temperature": 0}
        said = client.post("/v1/tables", json=asked).json()["choices"][0]["text"]
    assert shown.split() == said.split()
    assert "2 slots" in page.locator(".figures").inner_text()
    page.locator(".card dd", has_text="yes").wait_for()  # it is in memory now, and the card says so


def test_two_side_by_side_on_one_text(open_page: Any) -> None:
    page = open_page()
    choose(page, "sport")
    page.get_by_label("Compare two side by side").check()
    choose(page, "talk", chooser=1)
    page.locator("#text").fill("Who won?")
    page.get_by_label("Most tokens").fill("8")
    page.get_by_label("Temperature").fill("0")
    page.locator("#text").press("Control+Enter")
    first, second = written(page, 0), written(page, 1)
    assert first != second
    assert page.locator("#outputs h3").all_inner_texts() == ["sport", "talk"]
    page.get_by_label("Compare two side by side").uncheck()
    assert page.locator("#outputs h3").all_inner_texts() == ["sport"]


def test_a_text_stands_under_the_name_of_who_wrote_it(open_page: Any) -> None:
    page = open_page()
    choose(page, "sport")
    page.locator("#text").fill("Who won?")
    page.get_by_label("Most tokens").fill("8")
    page.locator("#write").click()
    written(page)
    choose(page, "talk")
    page.locator(".card dd", has_text="conversations").wait_for()
    assert page.locator("#outputs h3").all_inner_texts() == ["sport"]
    page.locator("#write").click()
    page.locator("#outputs h3", has_text="talk").wait_for()


def test_an_answer_that_comes_late_changes_nothing(open_page: Any) -> None:
    page = open_page()
    held: list[Any] = []
    page.route(re.compile("/v1/models/.*sport"), lambda route: held.append(route))
    page.locator(".list label", has_text="sport").first.click()
    choose(page, "menus")
    page.locator("#outputs h3", has_text="menus").wait_for()
    with page.expect_response(re.compile("/v1/models/.*sport")):
        held[0].continue_()
    page.wait_for_timeout(100)
    assert page.locator("#outputs h3").all_inner_texts() == ["menus"]
    assert "Sentences about places to eat." in page.locator(".card").first.inner_text()


def test_a_model_that_cannot_be_looked_at_leaves_none_chosen(browser: Any, served: Served) -> None:
    page = browser.new_page()  # its console rightly shows the refusal, so it is not held to silence
    page.goto(served.address)
    page.wait_for_selector(".list input")
    choose(page, "menus")
    page.route(
        re.compile("/v1/models/.*sport"),
        lambda route: route.fulfill(status=404, json={"error": {"message": "it is gone"}}),
    )
    page.locator(".list label", has_text="sport").first.click()
    page.locator(".card dd", has_text="it is gone").first.wait_for()
    assert "menus" not in page.locator("#curl").text_content()
    assert page.locator("#outputs h3").all_inner_texts() == [""]
    page.close()


def test_the_list_is_searched_and_tags_narrow_it(open_page: Any) -> None:
    page = open_page()
    names = page.locator(".chooser").first.locator(".list span")
    page.get_by_label("Search names and tags").first.fill("food")
    names.filter(has_text="tiny-llama").wait_for(state="detached")
    assert names.all_inner_texts() == ["menus"]
    page.get_by_label("Search names and tags").first.fill("")
    page.get_by_role("button", name="sport").first.click()
    names.filter(has_text="menus").wait_for(state="detached")
    assert names.all_inner_texts() == ["sport"]
    page.get_by_label("Search names and tags").first.fill("nothing of the kind")
    page.get_by_text("Nothing of that name or tag.").wait_for()


def test_the_keyboard_is_enough(open_page: Any) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the input"
    page.locator(".list input").first.focus()
    page.keyboard.press("ArrowDown")
    page.locator("#outputs h3", has_text="bare-card").wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", page.evaluate("document.activeElement.outerHTML")
    page.keyboard.type("Hello")
    page.get_by_label("Most tokens").fill("4")
    page.locator("#write").focus()
    page.keyboard.press("Enter")
    assert written(page)


def test_every_input_and_button_has_a_name(open_page: Any) -> None:
    page = open_page()
    choose(page, "menus")
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, textarea, button')].filter(e => e.checkVisibility()
           && !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()).map(e => e.outerHTML)"""
    )
    assert nameless == []


def test_the_command_that_is_copied_says_the_same(open_page: Any, served: Served) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    choose(page, "sport")
    page.locator("#text").fill("It's \"five\" o'clock")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Copy curl").click()
    page.get_by_text("copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"curl {served.address}/v1/tables")
    assert "It'\\''s \\\"five\\\" o'\\''clock" in copied
    assert '"seed":3' in copied


def test_what_is_refused_is_shown_and_a_text_can_be_stopped(open_page: Any, browser: Any, served: Served) -> None:
    page = browser.new_page()  # its console rightly shows the refusal, so it is not held to silence
    page.goto(served.address)
    page.wait_for_selector(".list input")
    choose(page, "facts")
    page.locator("#text").fill("no triple at all")
    page.get_by_role("button", name="Write").click()
    page.locator(".written.bad").wait_for()
    assert "is no list of triples" in page.locator(".written").inner_text()
    choose(page, "sport")
    page.get_by_label("Most tokens").fill("400")
    page.get_by_role("button", name="Write").click()
    page.get_by_role("button", name="Stop").click()
    page.locator(".figures", has_text="stopped").wait_for()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "width"), [("wide", 1280), ("phone", 360)])
def test_it_fits_and_can_be_read(open_page: Any, scheme: str, name: str, width: int) -> None:
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    choose(page, "menus")
    page.locator(".field").first.fill("name")
    page.locator(".value").first.fill("Fern Hill")
    page.get_by_role("button", name="Write").click()
    written(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, (
        "nothing is cut off, nothing scrolls sideways"
    )
    for selector in ("body", ".list small", "#write", "dt", ".figures"):
        assert contrast(page, selector) >= 4.5, selector
    picture(page, f"page-{name}-{scheme}")


def contrast(page: Any, selector: str) -> float:
    """WCAG's ratio between an element's ink and what stands behind it."""
    ratio: float = page.evaluate(
        """(selector) => {
          const element = document.querySelector(selector);
          const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
          let behind = element;
          const ground = (e) => numbers(getComputedStyle(e).backgroundColor);
          while ((ground(behind)[3] ?? 1) === 0) behind = behind.parentElement;
          const both = [light(numbers(getComputedStyle(element).color)), light(ground(behind))].sort((a, b) => b - a);
          return (both[0] + 0.05) / (both[1] + 0.05);
        }""",
        selector,
    )
    return ratio
