"""A server as users start it: `antefix serve` in a process of its own, over a tiny random model and a bank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import heed_interrupts, tiny_base
from test_prefix_file import tiny_prefix

from antefix.bank import Bank
from antefix.base import Base

ANTEFIX = Path(sys.executable).with_name("antefix")
BASE = "tiny-llama"
CARDS: dict[str, dict[str, Any]] = {
    "menus": {
        "tags": ("food", "tables"),
        "text_format": {"linearise": "table"},
        "decoding": {"max_new_tokens": 24},
        "notes": "Sentences about places to eat.",
        "training": {"data": "menus.csv", "pairs": 120},
    },
    "sport": {"tags": ("sport",), "text_format": {"separator": " => "}},
    "talk": {"tags": ("chat",), "text_format": {"chat": True, "instruction": "Be short. "}},
    "facts": {"text_format": {"linearise": "triples"}, "decoding": {"num_beams": 5, "max_new_tokens": 9}},
    "bare-card": {},
}


@dataclass(frozen=True)
class Served:
    """A running server, and what it was started with."""

    address: str
    folder: Path
    process: subprocess.Popen[str]

    @property
    def bank(self) -> Bank:
        return Bank(self.folder / "bank")

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, **more)

    def log(self) -> list[dict[str, Any]]:
        """The lines of JSON so far."""
        lines = (self.folder / "log").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def base_of_server() -> Base:
    """The base that is served, in this process."""
    return tiny_base("llama")


def make_files(folder: Path) -> None:
    """A base's folder and a bank."""
    base = base_of_server()
    base.model.save_pretrained(folder / BASE)
    base.tokenizer.save_pretrained(folder / BASE)
    for slots, (name, card) in enumerate(CARDS.items(), 2):
        tiny_prefix(base.model, slots, **card).save(folder / "bank" / name)


@contextmanager
def serving(folder: Path, *options: str, environment: Sequence[tuple[str, str]] = ()) -> Iterator[Served]:
    """Start the server over the files of a folder; stop it in the end, as Ctrl-C does."""
    command = [ANTEFIX, "serve", "--base", BASE, "--bank", "bank", "--port", "0", "--json", "--device", "cpu"]
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", "--threads", "1", *options],
            cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=heed_interrupts,
            env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        said = ""
        while not said.rstrip().endswith("}"):
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"the server did not start: {(folder / 'log').read_text()[-3000:]}")
            said += line
        yield Served(json.loads(said)["address"], folder, process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
