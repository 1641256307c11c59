"""The pictures of the server's page, of a running server whose bank has a prefix for each domain of the demo's tables.

    jq -c 'select(.split == "train") | del(.split)' src/antefix/demo/tables.jsonl > demo.jsonl
    antefix init demo.jsonl
    antefix train-many demo.jsonl demo.toml --by domain
    antefix serve --base smollm2-135m --bank bank
    python docs/take_page_pictures.py http://127.0.0.1:8000 docs/images

Needs Playwright and a Chromium (`chromium` on the path).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

TABLE = {"route": "Old Tramway Walk", "region": "the Brennick Valley", "terrain": "level gravel", "length": "6.8 km"}
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 800}
PATIENCE_MS = 120_000
PICTURES: dict[str, tuple[Any, ...]] = {
    "page-wide-light": ("light", WIDE, "routes"),
    "page-compare-dark": ("dark", WIDE, "routes", "plants"),
    "page-phone-light": ("light", PHONE, "routes"),
}
"""Colours, size, and the domains whose prefixes write."""


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    address, folder = sys.argv[1], Path(sys.argv[2])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (scheme, size, *domains) in PICTURES.items():
            page = browser.new_context(color_scheme=scheme, viewport=size).new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.goto(address)
            page.get_by_label("Compare two side by side").set_checked(len(domains) == 2)
            ask(page, *domains)
            page.screenshot(path=folder / f"{name}.png", full_page=True)
        browser.close()


def ask(page: Any, *domains: str) -> None:
    """Each of these prefixes for a text from the table; returns when all are written."""
    for place, domain in enumerate(domains):
        chooser = page.locator(".chooser").nth(place)
        chooser.locator(".list label", has_text=domain).click()
        chooser.locator(".card dd", has_text="prefix_tuning").first.wait_for()
    while page.locator(".field").count() < len(TABLE):
        page.get_by_role("button", name="Add a field").click()
    for place, (field, value) in enumerate(TABLE.items()):
        page.locator(".field").nth(place).fill(field)
        page.locator(".value").nth(place).fill(value)
    page.get_by_role("button", name="Write").click()
    for place in range(len(domains)):
        page.locator(".figures").nth(place).filter(has_text="written").wait_for()


if __name__ == "__main__":
    main()
