"""`antefix train` as a person meets it: what it says before, what it keeps, what it never destroys."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_base, tiny_model
from test_prefix_file import no_file_larger_than
from typer.testing import CliRunner

from antefix.cli import app
from antefix.cli.stopping import stop_after_step
from antefix.errors import AntefixError, TrainingError
from antefix.prefix import Prefix
from antefix.training.checkpoint import CHECKPOINT_FILE
from antefix.training.journal import LOG_FILE, PLOT_FILE, read_log
from antefix.training.loop import StepReport
from antefix.training.prepared import prepare_recipe
from antefix.training.recipe import load_recipe
from antefix.training.run import run_recipe

RECIPE = """
name = "menus"
base = "{base}"
dtype = "float32"
[config]
num_virtual_tokens = 2
[data]
train = "menus.csv"
dev = "dev.csv"
[training]
max_steps = 4
pairs_per_step = 2
evaluations = 1
checkpoint_seconds = 0
"""
CHECKPOINT = Path("runs/menus") / CHECKPOINT_FILE


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "gpt2", "bert"):
        base = tiny_base(name)
        base.model.save_pretrained(name)
        base.tokenizer.save_pretrained(name)
    tiny_model("llama", seed=1).save_pretrained("other")
    base.tokenizer.save_pretrained("other")
    Path("menus.toml").write_text(RECIPE.format(base="llama"))
    Path("menus.csv").write_text("dish,text\n" + "".join(f"{'soup' * n},It is {n}.\n" for n in range(1, 7)))
    Path("dev.csv").write_text(f"dish,text\nsoup,It is 1.\n{'pie ' * 30},It is pie.\n")


def train(*words: str) -> str:
    """What the command says, on stdout or as its error."""
    result = CliRunner().invoke(app, ["train", "menus.toml", *words])
    if isinstance(result.exception, AntefixError):
        return str(result.exception)
    assert result.exception is None, result.output
    return result.output


def stop_after(step: int, *words: str) -> None:
    """Train, and be asked to stop behind this step."""
    recipe = load_recipe(Path("menus.toml"), words)
    seen: list[StepReport] = []
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, prepare_recipe(recipe), seen.append, stop_requested=lambda: len(seen) + 1 == step)
    assert CHECKPOINT.is_file()


def test_a_dry_run_says_what_would_be_done_and_touches_nothing() -> None:
    facts = json.loads(CliRunner().invoke(app, ["train", "menus.toml", "--dry-run", "--json"]).stdout)
    assert (facts["steps"], facts["pairs"], facts["dev_pairs"], facts["going_on"]) == (4, 6, 2, False)
    assert not Path("runs").exists()
    assert not Path("bank").exists()
    stop_after(2)
    before = CHECKPOINT.read_bytes()
    assert "going on" not in train("--restart", "--dry-run")
    assert "going on from the checkpoint" in train("--dry-run")
    assert CHECKPOINT.read_bytes() == before


def test_the_next_command_reads_a_file_as_training_did() -> None:
    words = ("--overwrite", "data.format=plain", 'data.reader.table_columns=["dish"]')
    said = " ".join(CliRunner().invoke(app, ["train", "menus.toml", *words]).stderr.split())
    assert "next: antefix generate --prefix bank/menus --input FILE --output texts.jsonl" in said
    assert said.endswith("""--reader format=plain --reader 'table_columns=["dish"]'""")


def test_a_restart_drops_the_checkpoint_only_once_all_is_checked() -> None:
    stop_after(2)
    assert "no such file" in train("--restart", "data.train=none.csv")
    assert CHECKPOINT.is_file()
    assert "kept bank/menus" in train("--restart")
    assert [row["step"] for row in read_log(Path("runs/menus") / LOG_FILE)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "change",
    ["dtype=bfloat16", "data.max_target_tokens=4", "decoding.num_beams=2", "data.text.separator=' -> '", "base=gpt2"],
)
def test_a_checkpoint_of_anything_else_is_refused(change: str) -> None:
    stop_after(2)
    assert "holds an unfinished run of another recipe" in train(change)
    assert "kept bank/menus" in train(), "and is still good for its own"


def test_what_is_cut_is_said_for_both_sets_and_stands_in_the_card() -> None:
    said = train("data.max_source_tokens=12")
    assert "cut to the limit: 5 sources of the training set" in said
    assert "cut to the limit: 1 sources of the dev set" in said
    training = Prefix.load("bank/menus").card.training
    assert (training["truncated_sources"], training["truncated_dev_sources"], training["dtype"]) == (5, 1, "float32")


def test_rows_that_are_not_packed_are_said_once() -> None:
    assert train("training.packed=false").count("rows are not packed here") == 1
    assert Prefix.load("bank/menus").card.training["batch_form"] == "padded"


def test_an_encoder_is_refused() -> None:
    assert "the base 'bert' (BertForMaskedLM) writes no text" in train("base=bert")


@pytest.mark.parametrize("name", ["foo", "comet_ml"])
def test_a_tracker_that_is_not_there_is_refused(name: str) -> None:
    assert f"training.trackers: '{name}' is not installed here, or unknown" in train(f"training.trackers=['{name}']")


def test_a_no_file_larger_than_keeps_what_was_kept() -> None:
    with no_file_larger_than(2000):
        assert "the checkpoint of step 1 could not be written" in (said := train())
        assert "there is none yet" in said
    stop_after(2)
    with no_file_larger_than(2000):
        assert "the one before is kept: the same command goes on from it" in train()
    assert "kept bank/menus" in train()


def test_a_plot_that_cannot_be_written_comes_after_the_prefix() -> None:
    Path("runs/menus", PLOT_FILE).mkdir(parents=True)
    assert train().startswith(str(Path("runs/menus", PLOT_FILE)) + ": cannot be written (")
    assert Prefix.load("bank/menus").card.training["steps"] == 4
    assert not CHECKPOINT.exists()


def test_a_start_from_another_prefix_is_checked_and_told() -> None:
    train()
    start = ("name=more", "config.initial=prefix", "config.initial_prefix=bank/menus")
    assert "kept bank/more" in train(*start)
    assert Prefix.load("bank/more").card.parents == ("menus",)
    assert Prefix.load("bank/menus").card.parents == ()
    assert "this prefix was trained for the base 'llama'" in train(*start, "name=third", "base=other")
    assert "bank/menus has in_place positions, this recipe shifted: set config.positions = 'in_place'" in train(
        *start, "name=third", "config.positions=shifted"
    )


def test_dropout_changes_neither_the_form_of_rows_nor_a_resumed_run() -> None:
    words = ("config.dropout=0.5", "training.packed=true")
    assert "kept bank/menus" in train(*words)
    whole = Prefix.load("bank/menus")
    assert whole.card.training["batch_form"] == "packed"
    stop_after(2, *words, "name=again", "run=runs/menus")
    train(*words, "name=again", "run=runs/menus")
    again = Prefix.load("bank/again")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_a_base_without_packed_rows_refuses_them_when_asked() -> None:
    base = tiny_base("llama")
    base.model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    base.model.save_pretrained("llama")
    assert "packed = true, but this base's attention cannot take packed rows" in train("training.packed=true")
    assert "kept bank/menus" in train()
    assert Prefix.load("bank/menus").card.training["batch_form"] == "padded"


def test_a_kept_prefix_is_never_overwritten_unasked() -> None:
    train()
    kept = Prefix.load("bank/menus")
    assert "bank/menus exists: give the recipe another name, or say --overwrite" in train("training.max_steps=5")
    assert Prefix.load("bank/menus").card == kept.card
    train("training.max_steps=5", "--overwrite")
    assert Prefix.load("bank/menus").card.training["steps"] == 5


def test_errors_are_of_the_tree() -> None:
    result = CliRunner().invoke(app, ["train", "menus.toml", "training.trackers=['foo']"])
    assert isinstance(result.exception, TrainingError)


class Interrupting(io.RawIOBase):
    """A stream that is interrupted while it is written to, once."""

    def __init__(self) -> None:
        self.pending = True

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        if self.pending:
            self.pending = False
            signal.raise_signal(signal.SIGINT)
        return len(content)


def test_an_interrupt_while_progress_is_written_is_heeded(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A buffered stream refuses to be written to by who interrupted a write to it."""
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BufferedWriter(Interrupting()), write_through=True))
    with stop_after_step() as asked:
        print("step 1", file=sys.stderr, flush=True)
        assert asked()
    assert capfd.readouterr().err.startswith("stopping after this step; the same command goes on from here")
