"""`antefix eval`: a table for people, JSON for machines, one line for what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import SHARED, tiny_model
from test_prefix_file import tiny_prefix
from typer.testing import CliRunner

from antefix.cli import app
from antefix.errors import AntefixError, DataError, MetricError, PrefixFileError
from antefix.metrics import METRICS, load, score
from antefix.metrics.tokens_ptb import have_java
from antefix.prefix import Prefix

MENUS = "name,price,open,text\nFern,£4,yes,Fern costs £4.\nMill,£9,no,Mill Inn is £9.\nFern,£4,yes,For £4: Fern.\n"
TEXTS = ["Fern costs £4.", "Mill Inn asks 7 pounds."]
OTHER = ["Fern is at the Mill.", "Mill."]
REFERENCES = [["Fern costs £4.", "For £4: Fern."], ["Mill Inn is £9."]]
E2E = SHARED / "data" / "e2e_nlg" / "e2e-dataset.zip"
FILES = ("--references", "menus.csv", "--hypotheses", "texts.txt")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("menus.csv").write_text(MENUS, encoding="utf-8")
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    Path("other.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in OTHER), encoding="utf-8")
    return tmp_path


def run(*words: str) -> Result:
    """Raises what the command raises."""
    result = CliRunner().invoke(app, ["eval", *words])
    if isinstance(result.exception, AntefixError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def facts(*words: str) -> Any:
    return json.loads(run(*words, "--json").stdout)


def rows(output: str) -> dict[str, list[str]]:
    """Of a printed table: name -> cells."""
    found = [line.split() for line in output.splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in found if row}


def test_a_table_of_the_scores_asked_for() -> None:
    output = run(*FILES, "--metrics", "bleu, rouge_l_13a").stdout
    found = score(REFERENCES, TEXTS, ["bleu", "rouge_l_13a"])
    assert output.startswith("2 inputs, 3 references\n")
    assert rows(output) == {"score": [], **{name: [f"{value:.4f}"] for name, value in found.items()}}


def test_json_has_everything() -> None:
    found = facts(*FILES, "--metrics", "bleu,nist")
    assert found == {
        "references": "menus.csv",
        "inputs": 2,
        "reference_texts": 3,
        "hypotheses": "texts.txt",
        "scores": score(REFERENCES, TEXTS, ["bleu", "nist"]),
        "versions": {name: load(name).VERSION for name in ("bleu", "nist")},
        "left_out": [],
    }


def test_fields_are_counted_in_the_table_and_listed_in_json() -> None:
    output = run(*FILES, "--metrics", "bleu", "--fields").stdout
    assert "values left out   25.0 %" in output
    assert "values added      25.0 %" in output
    assert facts(*FILES, "--metrics", "bleu", "--fields")["fields"] == {
        "version": "fields.1",
        "checked": 4,
        "not_checkable": 2,
        "missing": 1,
        "missing_share": 0.25,
        "added": 1,
        "added_share": 0.25,
        "texts": [
            {"missing": [], "added": []},
            {"missing": [["price", "£9"]], "added": [["number", "7"]]},
        ],
    }


def test_two_files_are_compared() -> None:
    words = (*FILES, "--compare", "other.jsonl", "--metrics", "bleu,nist", "--resamples", "20", "--fields")
    found = facts(*words)
    other = found["compare"]
    assert other["hypotheses"] == "other.jsonl"
    assert other["scores"] == score(REFERENCES, OTHER, ["bleu", "nist"])
    assert other["fields"]["missing"] == 2
    bleu = other["differences"]["bleu"]
    assert bleu["difference"] == pytest.approx(found["scores"]["bleu"] - other["scores"]["bleu"])
    assert (bleu["resamples"], bleu["seed"], bleu["note"]) == (20, 0, "")
    assert other["version"] == "paired-bootstrap.1"
    output = run(*words).stdout
    assert "first: texts.txt\nsecond: other.jsonl\n" in output
    cells = [
        f"{bleu['difference']:+.4f}",
        f"{bleu['low']:+.4f}",
        "to",
        f"{bleu['high']:+.4f}",
        f"{bleu['p_value']:.4f}",
    ]
    assert rows(output)["bleu"][2:] == cells
    assert "values left out   25.0 %   50.0 %" in output
    assert "nist: every draw keeps the n-gram weights of the whole set" in output


def test_the_seed_of_the_draws_can_be_chosen() -> None:
    words = (*FILES, "--compare", "other.jsonl", "--metrics", "bleu", "--resamples", "7", "--seed")
    first, again, other = (facts(*words, seed)["compare"]["differences"]["bleu"] for seed in ("1", "1", "2"))
    assert first == again
    assert first["seed"] == 1
    assert {**other, "seed": 1} != first


class TestWithoutJava:
    @pytest.fixture(autouse=True)
    def no_java(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")

    def test_the_scores_that_need_none_are_given_and_one_line_says_so(self) -> None:
        result = run(*FILES)
        assert list(rows(result.stdout)) == ["score", "bleu", "nist"]
        assert result.stderr.splitlines() == ["left out, as they need Java and there is none: meteor, rouge_l, cider"]

    def test_json_says_what_is_left_out(self) -> None:
        found = facts(*FILES)
        assert list(found["scores"]) == ["bleu", "nist"]
        assert found["left_out"] == ["meteor", "rouge_l", "cider"]

    def test_a_score_asked_for_by_name_is_an_error(self) -> None:
        with pytest.raises(MetricError, match="rouge_l: needs Java, and no 'java' is on the PATH"):
            run(*FILES, "--metrics", "bleu,rouge_l")


@pytest.mark.slow
@pytest.mark.skipif(not have_java(), reason="no Java")
def test_all_five_scores_are_the_default() -> None:
    result = run(*FILES, "--compare", "other.jsonl", "--resamples", "10")
    assert list(rows(result.stdout))[1:6] == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert "meteor: differences of the means of the inputs' scores, not of the corpus figures" in result.stdout
    assert result.stderr == ""


@pytest.mark.skipif(not E2E.is_file(), reason="the E2E data is not here")
def test_a_split_inside_a_zip() -> None:
    Path("names.txt").write_text("Fern Hill is a pub.\n" * 630, encoding="utf-8")
    words = ("--hypotheses", "names.txt", "--metrics", "bleu", "--fields", "--references")
    found = facts(*words, str(E2E), "--split", "test")
    assert (found["inputs"], found["reference_texts"]) == (630, 4693)
    assert facts(*words, f"{E2E}::testset_w_refs.csv")["fields"] == found["fields"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metrics", "blue"), "unknown metric 'blue': did you mean 'bleu'"),
        (("--metrics", ","), "no metric is named"),
        (("--compare", "none.txt"), "none.txt: no such file"),
        (("--split", "test"), "no column 'split'"),
        (("--references", "texts.txt", "--fields"), "texts.txt: table values can only be checked against tables"),
        (("--hypotheses", "menus.csv"), "menus.csv: texts to be scored come one a line"),
        (("--references", "three.txt"), "texts.txt has 2 texts, three.txt has references for 3 inputs: one text"),
    ],
)
def test_what_cannot_be_done_is_one_line(words: tuple[str, ...], message: str) -> None:
    Path("three.txt").write_text("a\nb\nc\n", encoding="utf-8")
    with pytest.raises((DataError, MetricError)) as error:
        run(*FILES, "--metrics", "bleu", *words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_names_every_metric() -> None:
    output = " ".join(run("--help").stdout.replace("│", " ").split())
    assert ", ".join(METRICS) in output
    assert "Example" in output


def test_scores_are_recorded_on_the_card_of_the_prefix_that_wrote_the_texts(folder: Path) -> None:
    prefix = tiny_prefix(tiny_model("gpt2"), scores={"dev": [{"step": 1, "dev_loss": 2.0}]})
    prefix.save("menus")
    run(*FILES, "--metrics", "bleu", "--record", "menus")
    kept = Prefix.load("menus")
    assert kept.card.scores == {
        "dev": [{"step": 1, "dev_loss": 2.0}],
        "test": {
            "references": "menus.csv",
            "inputs": 2,
            "reference_texts": 3,
            "scores": score(REFERENCES, TEXTS, ["bleu"]),
            "versions": {"bleu": load("bleu").VERSION},
        },
    }
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in prefix.tensors.items())


def test_a_card_is_looked_for_before_anything_is_scored() -> None:
    with pytest.raises(PrefixFileError, match=r"nowhere/card\.json: no such file"):
        run(*FILES, "--record", "nowhere")
