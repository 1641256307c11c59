"""The command itself, in a process of its own: one line and exit code 2 for whatever is written wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from commands import Command
from conftest import tiny_base

from antefix.cli import main

ANTEFIX = Path(sys.executable).with_name("antefix")


def antefix(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it."""
    return subprocess.run([ANTEFIX, *words], capture_output=True, text=True, check=False, cwd=folder)


def ended(*words: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    command = Command(*words, folder=folder)
    out, err = command.communicate(120)
    return command.wait(), out, err


def test_the_version_and_the_help() -> None:
    assert antefix("--version").stdout == version("antefix") + "\n"
    for words in ((), ("bank",)):
        found = antefix(*words)
        assert "Usage: antefix" in found.stdout + found.stderr
        assert found.returncode == 2
    assert antefix("bank", "list", "--help").returncode == 0


def test_methods_can_be_named() -> None:
    rows = json.loads(antefix("methods", "prefix_tuning+lora", "--json").stdout)
    assert [row["name"] for row in rows] == ["lora", "prefix_tuning"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'recipe'"),
        (["generate", "x", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["generate", "--nonsense"], "No such option"),
        (["train", "none.toml"], "none.toml: no such recipe; `antefix init FILE` writes a first one"),
        (["bank", "list", "--bank", "nowhere"], "there is no bank 'nowhere'"),
        (["eval", "--references", "none.csv", "--hypotheses", "none.txt"], "none.csv: no such file"),
        (["doctor", "no/such/folder"], "no folder or file 'no/such/folder'"),
        (["methods", "lorra"], "unknown method 'lorra': did you mean 'lora'?"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    code, out, err = ended(*words, folder=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("antefix: ")
    assert message in err
    assert err.count("\n") == 1, err


def test_a_mistake_is_one_line_from_a_shell_too(tmp_path: Path) -> None:
    found = antefix("train", "none.toml", folder=tmp_path)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)


@pytest.mark.skipif(os.name != "posix", reason="signals of a terminal")
def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.model.save_pretrained(tmp_path / "llama")
    base.tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "a.csv").write_text("name,text\n" + "".join(f"x{n},y\n" for n in range(5000)))
    words = ("generate", "--base", "llama", "-i", "a.csv", "-o", "a.txt", "--set", "num_beams=1")
    running = Command(*words, folder=tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "a.txt.partial").exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=30)[1]
    assert said.splitlines()[-1] == "antefix: interrupted"
    assert running.returncode == 130


def test_a_device_without_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*, standalone_mode: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("antefix.cli.app", full)
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("antefix: the device is out of memory: lower training.tokens_per_batch")
    assert said.count("\n") == 1
