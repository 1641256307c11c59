"""`antefix demo` from end to end, a tiny base in the embedded one's place: what it prints, keeps, and does not redo."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import Command
from conftest import tiny_model, word_tokenizer
from typer.testing import CliRunner

from antefix import embedded
from antefix.attach import attached
from antefix.base import load_base
from antefix.cli import app
from antefix.demo import tables
from antefix.generation import generate
from antefix.prefix import Prefix

KEPT = Path("demo", "bank", "demo")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and a base that `embedded.fetch` finds."""
    monkeypatch.chdir(tmp_path)
    place = embedded.home() / "bases" / embedded.NAME
    tiny_model("llama").save_pretrained(place)
    word_tokenizer(text for example in tables("train") for text in example.targets).save_pretrained(place)


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, ["demo", *words])
    assert result.exit_code == 0, result.output
    return result


def measured(result: Result) -> dict[str, Any]:
    """Of the result, what a run that has nothing left to do must say again."""
    found = json.loads(result.stdout)
    return {key: found[key] for key in ("test_tables", "before", "after", "prefix_bytes", "texts")}


def written() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path("demo").rglob("*") if path.is_file()}


def test_a_demo_from_end_to_end_and_once_more() -> None:
    first = run("--json")
    found = measured(first)
    assert found["test_tables"] == len(tables("test"))
    assert found["before"].keys() == found["after"].keys()
    assert all(0 < score < 1 for when in ("before", "after") for score in found[when].values())

    prefix = Prefix.load(KEPT)
    assert prefix.num_bytes == found["prefix_bytes"]
    dev = [row["dev_loss"] for row in prefix.card.scores["dev"]]
    assert min(dev) < 0.9 * dev[0], "it learns"
    base, source = load_base(embedded.NAME), tables("test")[:1]
    with attached(base.model, prefix):
        assert generate(base, source) == [found["texts"][0]["after"]], "the prefix wrote it"

    before = written()
    assert measured(run("--json")) == found
    shown = run().stdout
    assert written() == before, "nothing is done again"
    assert f"{found['test_tables']} test tables" in shown
    for label, scores in (("bare base", found["before"]), ("with the prefix", found["after"])):
        [row] = [line.split("│") for line in shown.splitlines() if line.startswith("│") and label in line]
        assert [cell.strip() for cell in row[2:-1]] == [f"{100 * score:.1f}" for score in scores.values()]
    assert str(KEPT) in shown


def interrupted() -> list[str]:
    """The lines of a demo that was interrupted in its training: up to the first step it spoke of."""
    process = Command("demo")
    while process.poll() is None and not re.search("^step ", process.errors_so_far(), re.MULTILINE):
        time.sleep(0.005)
    lines = process.errors_so_far().splitlines(keepends=True)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode in (0, 130), rest
    return lines if process.returncode else []


def test_an_interrupted_demo_goes_on() -> None:
    for _ in range(5):  # on a busy machine it may be over before the signal is there
        if lines := interrupted():
            break
        shutil.rmtree("demo")
    else:
        pytest.fail("five times a demo was over before it could be interrupted")
    assert not KEPT.exists()
    texts = "writing {} test texts, bare base\n".format(len(tables("test")))
    assert texts in lines
    result = run("--json")
    assert texts not in result.stderr, "measured before the interruption"
    steps = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("step ")]
    assert steps
    told = [line.split()[1] for line in lines if line.startswith("step ")]
    assert not set(told) & set(steps), "trained before the interruption"
    assert measured(result)["prefix_bytes"] == Prefix.load(KEPT).num_bytes
