"""A file whose rows name their prefixes: every row gets what its prefix alone would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_base
from typer.testing import CliRunner

from antefix import bulk
from antefix.bank import Bank
from antefix.base import Base
from antefix.bulk import Writer, rounds
from antefix.cli import app
from antefix.data import Example
from antefix.data.linearise import TextFormat
from antefix.decoding import Decoding
from antefix.errors import AntefixError
from antefix.tasks import TextTask
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import train

SHORT = TrainingRecipe(max_steps=3, pairs_per_step=2, evaluations=0, learning_rate=0.5)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "menus": ("prefix_tuning", {"num_virtual_tokens": 3}),
    "sport": ("prefix_tuning", {"num_virtual_tokens": 2}),
    "loans": ("lora", {"rank": 2}),
}
ROWS = [("menus", "soup"), ("", "soup"), ("sport", "a long story"), ("loans", "soup"), ("menus", "pie"),
        ("sport", "soup"), ("", "pie pie"), ("menus", "a longer one than others")]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """A bank of three prefixes, of two methods, and a file whose rows name them."""
    monkeypatch.chdir(tmp_path)
    made = tiny_base("llama")
    made.model.save_pretrained("llama")
    made.tokenizer.save_pretrained("llama")
    base = Base(made.model, made.tokenizer, "llama")
    for name, (method, config) in METHODS.items():
        examples = [Example(source=f"{name} {n}", targets=(f"{name * n}!",)) for n in range(1, 4)]
        train(
            base, examples, dev=(), method=method, training=SHORT, decoding=Decoding(max_new_tokens=6), **config
        ).save(f"bank/{name}")
    Path("rows.csv").write_text("prefix,source\n" + "".join(f"{name},{source}\n" for name, source in ROWS))
    return base


def generate(*words: str) -> str:
    """What the command says, on stdout or as its error."""
    result = CliRunner().invoke(app, ["generate", *words])
    if isinstance(result.exception, AntefixError):
        return str(result.exception)
    assert result.exception is None, result.output
    return result.output


def texts(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


BULK = ("--prefix-column", "prefix", "-i", "rows.csv", "--set", "max_new_tokens=6", "--dtype", "float32")


def test_every_row_gets_what_its_prefix_alone_writes(base: Base) -> None:
    generate(*BULK, "-o", "mixed.jsonl")
    mixed = texts("mixed.jsonl")
    rows = [json.loads(line) for line in Path("mixed.jsonl").read_text().splitlines()]
    assert [row["prefix"] for row in rows] == [prefix or None for prefix, _ in ROWS]
    for name in ("", *METHODS):
        of_prefix = [n for n, (prefix, _) in enumerate(ROWS) if prefix == name]
        Path("some.csv").write_text("source\n" + "".join(f"{ROWS[n][1]}\n" for n in of_prefix))
        words = ["--base", "llama"] if not name else ["-p", f"bank/{name}"]
        generate(*words, "-i", "some.csv", "-o", f"alone{name}.jsonl", *BULK[4:])
        assert [mixed[n] for n in of_prefix] == texts(f"alone{name}.jsonl")
    assert len(set(mixed)) > 4, "prefixes write unlike texts"


def test_few_are_in_memory_at_once_and_the_texts_are_the_same(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(*BULK, "-o", "all.jsonl")
    monkeypatch.setattr(bulk, "rounds", lambda writers, sources, _: rounds(writers, sources, 1))
    loaded: list[str] = []
    get = Bank.__getitem__

    def noted(self: Bank, name: str) -> Any:
        loaded.append(name)
        return get(self, name)

    monkeypatch.setattr(Bank, "__getitem__", noted)
    generate(*BULK, "-o", "few.jsonl")
    assert sorted(loaded) == sorted(METHODS), "each once"
    assert texts("few.jsonl") == texts("all.jsonl")


def test_an_interrupted_command_goes_on(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(*BULK, "-o", "whole.jsonl")
    answer_all, made = bulk.answer_all, []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        for answer in answer_all(*args, **kwargs):
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append(answer)
            yield answer

    monkeypatch.setattr("antefix.cli.bulk.answer_all", stopped)
    result = CliRunner().invoke(app, ["generate", *BULK, "-o", "cut.jsonl", "--batch-size", "2"])
    assert result.exit_code != 0
    assert not Path("cut.jsonl").exists()
    monkeypatch.setattr("antefix.cli.bulk.answer_all", answer_all)
    assert "8 texts in cut.jsonl" in generate(*BULK, "-o", "cut.jsonl")
    assert texts("cut.jsonl") == texts("whole.jsonl")


def test_what_is_wrong_is_said_in_a_line(base: Base) -> None:
    assert "give --input, and no --prefix" in generate(*BULK, "-p", "bank/menus", "-o", "x.jsonl")
    assert "no row has a column 'prefx': did you mean 'prefix'?" in generate(
        "--prefix-column", "prefx", "-i", "rows.csv", "-o", "x.jsonl"
    )
    Path("rows.csv").write_text("prefix,source\nmenus,soup\nmenu,soup\n")
    assert "rows.csv, line 3: no prefix 'menu' in the bank 'bank': did you mean 'menus'?" in generate(
        *BULK, "-o", "x.jsonl"
    )
    Path("rows.csv").write_text("prefix,source\n,soup\n")
    assert "say which bare base (--base)" in generate(*BULK, "-o", "x.jsonl")


def writer(name: str | None, num_bytes: int, **changes: Any) -> Writer:
    return Writer(
        name=name, task=TextTask(), text_format=TextFormat(), decoding=Decoding(**changes), num_bytes=num_bytes
    )  # fmt: skip


def test_rounds_hold_at_most_so_many_bytes_and_one_kind_each() -> None:
    named = {name: writer(name, 40) for name in "abcd"} | {"beams": writer("beams", 1, num_beams=5)}
    names = ["a", "b", "c", "d", "beams", "a"]
    sources = [Example(source="x" * n) for n in (5, 50, 7, 60, 5, 5)]
    found = rounds([named[n] for n in names], sources, 100)
    assert [[w.name for w in one.writers] for one in found] in ([["d", "b"], ["c", "a"], ["beams"]],
                                                                [["beams"], ["d", "b"], ["c", "a"]])  # fmt: skip
    assert sorted(row for one in found for row in one.rows) == list(range(6))
    assert [one.rows for one in found if one.writers[0].name == "c"] == [[2, 0, 5]]
    alone = rounds([named[n] for n in names], sources, 1)
    assert all(len(one.writers) == 1 for one in alone)
