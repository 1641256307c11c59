"""`antefix compare`: equal budgets, resumable runs, a table that says who is better."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_base
from test_prefix_file import tiny_prefix
from test_triples import graph_files
from typer.testing import CliRunner

from antefix.cli import app
from antefix.data import Example
from antefix.errors import CommandError, TrainingError
from antefix.training import compare
from antefix.training.recipe import Recipe

RECIPE = """
name = "{name}"
base = "base"
dtype = "float32"
method = "{method}"
task = "classification"
config = {config}
[data]
train = "animals.csv"
dev = "animals.csv"
reader = {{source_column = "text", target_column = "label"}}
[training]
max_steps = {steps}
pairs_per_step = 12
evaluations = 1
learning_rate = 0.03
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = tiny_base("llama")
    base.model.save_pretrained("base")
    base.tokenizer.save_pretrained("base")
    rows = [f"{noise} {kind},{label}" for kind, label in (("cat", "pet"), ("elk", "wild")) for noise in "abcdef"]
    Path("animals.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    recipe("prefix", "p_tuning_v2", "{num_virtual_tokens = 4, initial_scale = 0.5}")
    recipe("scales", "ia3", "{}")
    return tmp_path


def recipe(name: str, method: str, config: str, steps: int = 30) -> None:
    Path(f"{name}.toml").write_text(RECIPE.format(name=name, method=method, config=config, steps=steps))


WORDS = ("compare", "prefix.toml", "scales.toml", "--test", "animals.csv", "--out", "out", "--seeds", "0,1")


def told(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_recipes_are_compared_and_what_is_done_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    train = compare.run

    def watched(prepared: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(prepared.method)
        if len(asked) == 7:  # two probes of each recipe, and two runs, are over
            raise KeyboardInterrupt
        return train(prepared, *arguments, **options)

    monkeypatch.setattr(compare, "run", watched)
    assert told(*WORDS).exit_code != 0
    assert {p.name for p in Path("out").iterdir() if (p / "texts.jsonl").exists()} == {"prefix-0", "scales-0"}
    said = told(*WORDS, "--json")
    assert said.exit_code == 0, said.output
    assert len(asked) == 7 + 4 + 2, "probes, and the runs that were missing"
    found = json.loads(said.stdout)
    assert found["metrics"] == ["accuracy"]
    first, second = found["rows"]
    assert {first["name"], second["name"]} == {"prefix", "scales"}
    assert all(len(row["scores"]["accuracy"]) == 2 for row in found["rows"])
    assert first["minus_the_best"] == {}
    assert second["minus_the_best"]["0"]["difference"] <= 0
    assert {row["name"]: row["kept"] for row in found["rows"]}["scales"] == 3 * (2 * 20 + 56) + 2 * 48 + 2
    assert Path("out/comparison.png").stat().st_size > 1000
    asked.clear()
    table = told(*WORDS)
    assert "prefix" in table.output
    assert "minus the best" in table.output
    assert asked == []


def test_a_text_with_another_kind_of_line_end_is_one_text(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\x85four", "five"]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    assert compare._texts(tmp_path / "texts.jsonl") == texts


def test_a_launcher_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (WORDS, ("cartridge", "prefix.toml", "--output", "bank/made")):
        assert "runs in one process: start it without a launcher" in str(told(*words).exception)


def test_runs_of_another_recipe_or_test_set_are_not_taken(folder: Path) -> None:
    words = ("compare", "prefix.toml", "--out", "out", "--seeds", "0", "--test")
    assert told(*words, "animals.csv").exit_code == 0
    other = Path("animals.csv").read_text(encoding="utf-8").replace("a cat", "z cat")
    Path("others.csv").write_text(other, encoding="utf-8")
    refusal = "holds a run of another recipe, other data or another test set: give another --out, or remove it"
    assert refusal in str(told(*words, "others.csv").exception)
    recipe("prefix", "p_tuning_v2", "{num_virtual_tokens = 5}")
    assert refusal in str(told(*words, "animals.csv").exception)
    recipe("prefix", "p_tuning_v2", "{num_virtual_tokens = 4, initial_scale = 0.5}")
    Path("animals.csv").write_text(other, encoding="utf-8")
    assert refusal in str(told(*words, "others.csv").exception), "it was trained on other rows"


def test_answers_to_other_choices_are_not_taken(folder: Path) -> None:
    written = RECIPE.format(name="scales", method="ia3", config="{}", steps=2).replace("classification", "ranking")
    Path("scales.toml").write_text(written.replace("animals.csv", "animals.jsonl").replace(
        'reader = {source_column = "text", target_column = "label"}', ""), encoding="utf-8")  # fmt: skip
    rows = [{"source": s, "choices": ["pet", "wild"], "target": t} for s, t in (("cat", "pet"), ("elk", "wild"))]

    def write(some: list[dict[str, Any]]) -> None:
        Path("animals.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some), encoding="utf-8")

    words = ("compare", "scales.toml", "--out", "out", "--seeds", "0", "--test", "test.jsonl")
    write(rows)
    Path("animals.jsonl").rename("test.jsonl")
    write(rows)
    assert told(*words).exit_code == 0
    rows[0]["choices"] = ["pet", "tame"]
    write(rows)
    Path("animals.jsonl").rename("test.jsonl")
    rows[0]["choices"] = ["pet", "wild"]
    write(rows)
    assert "holds a run of another recipe, other data or another test set" in str(told(*words).exception)


def test_half_of_the_triples_to_tell_apart_are_false(folder: Path) -> None:
    graph_files(folder / "graph")
    data = {"train": "graph/train.tsv", "dev": "graph/test.tsv"}
    made = Recipe.model_validate({"name": "lora", "method": "lora", "task": "triples", "data": data})
    plan = compare.plan_of([made], [0], "graph/train.tsv", None, folder / "out")
    told_apart = [e.targets for e in plan.test]
    assert told_apart.count(("false",)) == told_apart.count(("true",)) > 1
    more = made.model_copy(update={"name": "more", "training": made.training.model_copy(update={"negatives": 9})})
    with pytest.raises(TrainingError, match=r"differ in their data \(training.negatives\): make them equal"):
        compare.plan_of([made, more], [0], "graph/train.tsv", None, folder / "out")


def test_a_search_is_as_long_as_its_candidates(folder: Path) -> None:
    """Its budget is theirs, and what it takes is told from one generation."""
    reader = {"source_column": "text", "target_column": "label"}
    given: dict[str, Any] = {
        "task": "classification", "words": {"pet": "a", "wild": "b"}, "method": "bbt", "base": "base",
        "config": {"num_virtual_tokens": 2, "dimensions": 3},
        "data": {"train": "animals.csv", "dev": "animals.csv", "reader": reader},
    }  # fmt: skip
    short, long = (
        Recipe.model_validate({"name": f"bbt{n}", "training": {"black_box": {"candidates": n}}, **given})
        for n in (40, 4000)
    )
    with pytest.raises(TrainingError, match="differ in their budget"):
        compare.plan_of([short, long], [0], "animals.csv", None, folder / "out")
    base = tiny_base("llama")
    few, many = (
        compare.expected_seconds(compare.plan_of([r], [0], "animals.csv", None, folder / "out"), lambda recipe: base)
        for r in (short, long)
    )
    assert many > 5 * few


def test_the_fewest_edits_are_the_best(folder: Path) -> None:
    plan = compare.ComparisonPlan(
        recipes=tuple(map(_recipe, ("far", "near"))), seeds=(0,), metrics=("ter",), folder=folder,
        test=[Example(source="x", targets=("one two three",))], data={"near": "", "far": ""},
    )  # fmt: skip
    prefix = tiny_prefix(tiny_base("llama").model)
    prefix = replace(prefix, card=prefix.card.model_copy(update={"training": {"seconds": 1, "trained": 1}}))
    for name, text in (("far", "four five six"), ("near", "one two four")):
        prefix.save(folder / f"{name}-0" / compare.PREFIX_FOLDER)
        (folder / f"{name}-0" / compare.TEXTS_FILE).write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    best, other = compare.table(plan)
    assert (best.name, other.name) == ("near", "far")
    assert best.mean("ter") < other.mean("ter")


def _recipe(name: str) -> Recipe:
    return Recipe.model_validate({"name": name, "data": {"train": "none"}})


def test_what_cannot_be_compared_is_told(folder: Path) -> None:
    said = told(*WORDS, "--metrics", "blue")
    assert "unknown metric 'blue': did you mean 'bleu'?" in str(said.exception)
    assert not Path("out").exists(), "before anything is trained"
    recipe("longer", "ia3", "{}", steps=31)
    said = told("compare", "prefix.toml", "longer.toml", "--test", "animals.csv", "--out", "out")
    assert isinstance(said.exception, TrainingError)
    assert "'prefix' and 'longer' differ in their budget (" in str(said.exception)
    Path("fewer.toml").write_text(Path("prefix.toml").read_text().replace('name = "prefix"', 'name = "fewer"'))
    Path("fewer.toml").write_text(Path("fewer.toml").read_text().replace("[data]", "[data]\npairs = 4"))
    said = told("compare", "prefix.toml", "fewer.toml", "--test", "animals.csv", "--out", "out")
    assert "'prefix' and 'fewer' differ in their data (data.pairs): make them equal" in str(said.exception)
    said = told("compare", "prefix.toml", "prefix.toml", "--test", "animals.csv", "--out", "out")
    assert "two of the recipes have the same name" in str(said.exception)
    said = told(*WORDS[:-1], "one")
    assert isinstance(said.exception, CommandError)
    assert str(said.exception) == "--seeds one: whole numbers, separated by commas"
