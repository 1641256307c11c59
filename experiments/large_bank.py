"""A bank of 100,000 prefixes: how long it takes to open, to find one by name, to show a page, to follow a change.

    python experiments/large_bank.py [NUMBER [FOLDER]]

FOLDER keeps the bank for the next time.

Real prefixes of a tiny model (a few kilobytes), each with a card of its own (tags, notes, a version, a parent); their
equal tensor files are hard links. Every figure of an opened bank is a median after the first time, by the clock and in
the processor's time (the machine may be busy); opening is a fresh process each time, without the seconds of its
imports. Writes `results/large_bank.json`; a few minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from antefix import atomic
from antefix.bank import Bank, Query
from antefix.bank.index import INDEX_FOLDER
from antefix.prefix import CARD_FILE, BaseRecord, Card, Prefix
from antefix.tensor_file import TENSORS_FILE

from units import ROOT, commit, made_with  # isort: skip

RESULT = ROOT / "results" / "large_bank.json"
REPEATS = 11
LINKS = 50_000
"""How many names one file gets: some file systems allow no more than 65,000."""
LAYERS, HEADS, SLOTS, WIDTH = 3, 2, 4, 8
TOWNS = ("Malvern", "Ludlow", "Ledbury", "Bewdley", "Tenbury", "Clun", "Leominster")
OPENING = """
import sys, time
from antefix.bank import Bank, Query
began = time.perf_counter()
bank = Bank(sys.argv[1])
page = bank.page()
print(time.perf_counter() - began, page.total)
"""


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as scratch:
        bank = Bank(Path(sys.argv[2] if len(sys.argv) > 2 else scratch) / "bank")
        if not bank.folder.exists():
            fill(bank, count)
        shutil.rmtree(bank.folder / INDEX_FOLDER, ignore_errors=True)
        began = time.perf_counter()
        bank.refresh(say)
        figures: dict[str, Any] = {"s, index made for the first time": time.perf_counter() - began}
        time.sleep(2.5)  # a folder that changed a moment ago is compared again
        bank.page()
        opened = [opening(bank) for _ in range(5)]
        assert all(total == count for _, total in opened)
        figures["s, opened in a fresh process: a page with the index at hand"] = statistics.median(s for s, _ in opened)
        for what, ask in (questions(bank, count) | changes(bank)).items():
            wall, processor = medians(ask, 1 if what in changes(bank) else REPEATS)
            figures |= {f"ms, {what}": 1e3 * wall, f"ms of the processor, {what}": 1e3 * processor}
        index_bytes = sum(f.stat().st_size for f in (bank.folder / INDEX_FOLDER).iterdir())
    found = {
        "prefixes": count, "figures": figures, "index_bytes": index_bytes, "commit": commit(), "made_with": made_with(),
    }  # fmt: skip
    if count == 100_000:
        atomic.write_bytes(RESULT, f"{json.dumps(found, indent=1)}\n".encode())
    print(json.dumps(figures, indent=1))


def say(done: int, total: int) -> None:
    if done % 5_000 == 0:
        print(f"{done:,} of {total:,} cards", file=sys.stderr, flush=True)


def fill(bank: Bank, count: int) -> None:
    """Prefixes `customer-00000` and on; every tenth is a second version of the one before, all have one parent."""
    torch.manual_seed(0)
    tensors = {
        f"layers.{layer}.self.{part}": torch.randn(HEADS, SLOTS, WIDTH)
        for layer in range(LAYERS)
        for part in ("key", "value")
    }
    base = BaseRecord(name="tiny", fingerprint="0" * 16)
    card = Card(method="prefix_tuning", config={"num_virtual_tokens": SLOTS}, positions="in_place", base=base)
    first = bank.add("everyone", Prefix(tensors, card))
    text = json.loads((first / CARD_FILE).read_text())
    for number in range(count - 1):
        second = number % 10 == 9
        folder = bank.folder / (f"customer-{number - 1:05}.v2" if second else f"customer-{number:05}")
        folder.mkdir()
        if number % LINKS == 0:
            source = folder / TENSORS_FILE
            source.write_bytes((first / TENSORS_FILE).read_bytes())
        else:
            os.link(source, folder / TENSORS_FILE)
        own = {
            "parents": ["everyone"], "tags": ["customer", TOWNS[number % len(TOWNS)].lower()],
            "notes": f"Menus of customer {number}, an inn in {TOWNS[number % len(TOWNS)]}; trained in the night's run.",
        }  # fmt: skip
        (folder / CARD_FILE).write_text(json.dumps({**text, **own}))


def questions(bank: Bank, count: int) -> dict[str, Callable[[], Any]]:
    """What an opened bank is asked, and how."""
    middle = f"customer-{count // 20 * 10 + 1:05}"
    pages = {
        "a page: the first 50 by name": Query(),
        "a page: the last 50 by name": Query(offset=count - 50),
        "a page: by the time of change, newest first": Query(sort="changed", descending=True),
        "a page: one tag of seven": Query(tags=("ludlow",)),
        "a page: two tags, by size": Query(tags=("ludlow", "customer"), sort="size", descending=True),
        "a page: method and base, from the middle": Query(method="prefix_tuning", base="tiny", offset=count // 2),
        "a page: text in name and notes": Query(text="inn Bewdley"),
        "a page: text that nothing holds": Query(text="nowhere"),
        "a page: latest versions alone": Query(latest=True),
        "a page: latest versions, one tag, text, from the middle": Query(
            latest=True, tags=("clun",), text="night", offset=count // 20
        ),
    }
    asked: dict[str, Callable[[], Any]] = {
        "find by name: the card": lambda: bank.card(middle),
        "find by name: the prefix with its tensors": lambda: bank[middle],
        "a name that is not there": lambda: middle + "x" in bank,
        "the latest version of a name": lambda: bank.latest("customer-00008"),
    }
    for what, query in pages.items():
        asked[what] = lambda query=query: bank.page(query)  # type: ignore[misc]
    return asked


def changes(bank: Bank) -> dict[str, Callable[[], Any]]:
    """What has to look at every prefix's folder, or every file."""

    def after_a_change() -> None:
        os.utime(bank.folder)
        bank.page()

    return {
        "a page after the folder changed": after_a_change,
        "every file compared (refresh)": bank.refresh,
        "the whole list (entries)": bank.entries,
    }


def opening(bank: Bank) -> tuple[float, int]:
    words = [sys.executable, "-c", OPENING, str(bank.folder)]
    seconds, total = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(total)


def medians(ask: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds by the clock, and of the processor's time, which other processes do not lengthen much."""
    if repeats > 1:
        ask()
    clocks, processors = [], []
    for _ in range(repeats):
        began, before = time.perf_counter(), time.process_time()
        ask()
        clocks.append(time.perf_counter() - began)
        processors.append(time.process_time() - before)
    return statistics.median(clocks), statistics.median(processors)


if __name__ == "__main__":
    main()
