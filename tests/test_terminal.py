"""On a terminal a text appears while it is written and a bar shows how far long work is; elsewhere lines do."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_model, word_tokenizer
from rich.console import Console
from test_prefix_file import tiny_prefix

from antefix import Decoding
from antefix.attach import attached
from antefix.base import Base, load_base
from antefix.cli.progress import LiveLine, clock
from antefix.generation import generate
from antefix.prefix import Prefix

pty = pytest.importorskip("pty", reason="no terminals of this kind here")

SOURCE = "w3 w4 w5"
WRITING = {"max_new_tokens": 60, "no_repeat_ngram_size": 1}


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def terminal() -> Iterator[tuple[int, list[bytes]]]:
    """The end of a terminal that a program writes to (closed when the block ends), and what was read at the other."""
    other_end, end = pty.openpty()
    reads: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(other_end, 65536):
                reads.append(chunk)
        except OSError:  # Linux says so when the last writer is gone
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield end, reads
    finally:
        os.close(end)
        reader.join()
        os.close(other_end)


def screen_after(written: bytes) -> list[str]:
    """The lines a terminal shows in the end; of its language only what a bar needs."""
    lines, row, column = [""], 0, 0
    for count, letter, char in re.findall(r"\x1b\[\??([\d;]*)([A-Za-z])|([\s\S])", written.decode()):
        if letter == "A":
            row -= int(count or 1)
        elif letter == "K":
            lines[row] = ""
        elif char == "\r":
            column = 0
        elif char == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif char:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def on_terminal(*words: str) -> tuple[int, list[bytes]]:
    """The exit code of `antefix WORDS` with a terminal on all sides, and what it wrote, read by read."""
    with terminal() as (end, reads):
        code = subprocess.run(
            [sys.executable, "-c", "from antefix.cli import main; main()", *words],
            stdin=end, stdout=end, stderr=end, check=False, timeout=120,
        ).returncode  # fmt: skip
    return code, reads


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes words, and a prefix for it."""
    folder, model = tmp_path_factory.mktemp("shop"), tiny_model("llama")
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_prefix(model, decoding=WRITING).save(folder / "menus")
    return folder


@pytest.fixture(scope="module")
def base(shop: Path) -> Base:
    return load_base(shop / "base")


class TestGenerate:
    def test_a_text_appears_while_it_is_written(self, shop: Path, base: Base) -> None:
        code, reads = on_terminal("generate", SOURCE, "-p", str(shop / "menus"), "--base", str(shop / "base"))
        with attached(base.model, Prefix.load(shop / "menus")):
            [text] = generate(base, [SOURCE])
        assert len(text.split()) > 30
        assert b"".join(reads).decode() == f"{text}\r\n", "nothing else is on the terminal"
        assert code == 0
        assert len(reads) > 5, "all at once"

    def test_beams_appear_when_they_are_done(self, shop: Path, base: Base) -> None:
        """Which beam wins is known at the end."""
        choices = {**WRITING, "num_beams": 2}
        words = [word for key, value in choices.items() for word in ("--set", f"{key}={value}")]
        code, reads = on_terminal("generate", SOURCE, "--base", str(shop / "base"), *words)
        [text] = generate(base, [SOURCE], decoding=Decoding(**choices))
        assert b"".join(reads).decode() == f"{text}\r\n"
        assert code == 0

    def test_nobody_waits_for_a_source_to_be_typed(self, shop: Path) -> None:
        code, reads = on_terminal("generate", "--base", str(shop / "base"))
        assert screen_after(b"".join(reads))[-1].startswith("antefix: no source: give one as an argument")
        assert code == 2

    def test_a_bar_for_the_sources_of_a_file(self, shop: Path, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text("".join(f'{{"source": "w{n} w9"}}\n' for n in range(5)), encoding="utf-8")
        output = tmp_path / "out.txt"
        code, reads = on_terminal(
            "generate", "-p", str(shop / "menus"), "--base", str(shop / "base"), "-i", str(tmp_path / "in.jsonl"),
            "-o", str(output), "--batch-size", "1",
        )  # fmt: skip
        assert code == 0
        assert len(output.read_text(encoding="utf-8").splitlines()) == 5
        assert b"5/5" in b"".join(reads)
        assert "".join(screen_after(b"".join(reads))) == f"5 texts in {output}", "the bar is gone in the end"


class TestLiveLine:
    def test_on_a_terminal_a_bar_and_the_lines_that_stay(self) -> None:
        with (
            terminal() as (end, reads),
            open(os.dup(end), "w") as file,
            LiveLine(Console(file=file), 5, "text") as line,
        ):
            line.show(2, "0:03 left", always=True)
            line.show(4, "0:01 left")
        written = b"".join(reads)
        assert b"4/5" in written
        assert b"0:01 left" in written
        assert screen_after(written) == ["text 2/5  0:03 left"]

    def test_an_interrupt_takes_the_bar_away(self) -> None:
        with (
            terminal() as (end, reads),
            open(os.dup(end), "w") as file,
            suppress(KeyboardInterrupt),
            LiveLine(Console(file=file), 5, "text") as line,
        ):
            line.show(1, "0:03 left")
            raise KeyboardInterrupt
        assert b"1/5" in b"".join(reads)
        assert screen_after(b"".join(reads)) == []

    def test_elsewhere_a_line_every_half_minute_and_at_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr("antefix.cli.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
        out = io.StringIO()
        with LiveLine(Console(file=out), 9, "text") as line:
            for done, seconds in enumerate((1, 29.9, 31, 60.9, 61.1, 62, 62.1, 80, 90), start=1):
                clock.now = 100.0 + seconds
                line.show(done, f"after {seconds}", always=done == 6)
        assert out.getvalue().splitlines() == [
            "text 3/9  after 31", "text 5/9  after 61.1", "text 6/9  after 62", "text 9/9  after 90",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3599, "59:59"), (7384, "2:03:04")]
)
def test_seconds_as_on_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
