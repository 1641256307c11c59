"""Several processes train as one does: the same losses, the same prefix, one log, one voice, one end.

Two of them are started by Accelerate's own launcher, on the processor. This file is also what they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SEALED, tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import encoded, pairs_of
from typer.testing import CliRunner

from antefix import processes
from antefix.cli import app, main
from antefix.data import Example
from antefix.data.plan import all_units, microbatches, steps
from antefix.errors import AntefixError, OtherProcessError, TrainingError
from antefix.training.checkpoint import CHECKPOINT_FILE
from antefix.training.journal import LOG_FILE, PLOT_FILE, read_log
from antefix.training.loop import StepReport
from antefix.training.prepared import Prepared, prepare
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import run

PATIENCE_SECONDS = 120
"""For a launch, which takes a tenth of it: processes that wait for each other fail a test and do not stop it."""

RUNS: dict[str, dict[str, Any]] = {
    "token mean": {"loss_reduction": "token_mean"},
    "example sum": {"loss_reduction": "example_sum"},
    "all of a step in one pass": {"tokens_per_batch": 4000},
    "a single row a step": {"tokens_per_batch": 4000, "pairs_per_step": 3, "targets_per_row": 3},
    "a single pair a step": {"pairs_per_step": 1},
    "padded rows": {"packed": False},
    "dropout, a pass a pair": {"tokens_per_batch": 1, "dropout": 0.3},
    "patience, texts choose": {"learning_rate": 0.05, "evaluations": 10, "patience": 1, "dev_metric": "bleu"},
    "one text chooses": {"max_steps": 2, "evaluations": 1, "dev_metric": "bleu", "dev_metric_sources": 1},
}
"""Changes to the recipe of `ready`, under each of which two processes must do what one does."""


def ready(*, dropout: float = 0.0, **training: Any) -> Prepared:
    """Ten steps with three evaluations on targets of very unlike lengths, in several passes a step."""
    usual = {"max_steps": 10, "pairs_per_step": 5, "targets_per_row": 2, "tokens_per_batch": 40, "evaluations": 3}
    examples = [
        Example(source=f"inn {n}", targets=("a" * (3 * n + 1), "b" * (17 - 3 * n), f"Inn {n}.")) for n in range(6)
    ]
    return prepare(
        tiny_base("llama"),
        examples,
        examples[:3],
        method="prefix_tuning",
        config={"num_virtual_tokens": 3, "initial_text": "say it", "dropout": dropout},
        text_format=None,
        decoding=None,
        training=TrainingRecipe.model_validate(usual | training),
        data_name="inns",
    )


def trained(prepared: Prepared, folder: Path | None = None, **arguments: Any) -> dict[str, Any]:
    """What a run did in this process. Only the main one is told losses."""
    told: list[StepReport] = []
    seeds: list[int] = []

    def note_pass(*_: object) -> None:
        if torch.is_grad_enabled():
            seeds.append(torch.initial_seed())

    prepared.base.model.register_forward_hook(note_pass)
    prefix = run(prepared, folder, told.append, **arguments)
    return {
        "losses": [report.loss for report in told],
        "seeds of passes": seeds,
        "tensors": prefix.tensors,
        "dev": prefix.card.scores["dev"],
        "steps": prefix.card.training["steps"],
        "kept step": prefix.card.training["kept_step"],
    }


def failed(act: Callable[[], object]) -> dict[str, str]:
    try:
        act()
    except (AntefixError, KeyboardInterrupt) as error:
        return {type(error).__name__: str(error)}
    return {}


def stopped_by_the_other(folder: Path) -> dict[str, Any]:
    """Only the second process is asked to stop, after four steps; then both are started again."""
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return not processes.is_main() and len(asked) == 4

    end = failed(lambda: run(ready(), folder, stop_requested=stop))
    return {"end": end, "asked": len(asked)} | trained(ready(), folder)


def watched_by_one_that_fails() -> dict[str, str]:
    def watch(report: StepReport) -> None:
        if report.step == 2:
            raise TrainingError("the disk is full")

    return failed(lambda: run(ready(), watch=watch))


def failing_with_its_share() -> dict[str, str]:
    """The second process's share of the sources is too long for their texts; the first one's is not."""
    prepared = ready(dev_metric="bleu", evaluations=1, max_steps=1)
    long = dataclasses.replace(prepared.dev_examples[1], source="inn " * 120)
    return failed(lambda: run(dataclasses.replace(prepared, dev_examples=[prepared.dev_examples[0], long])))


def started_elsewhere() -> dict[str, Any]:
    """The second process draws other first values."""
    prepared = ready()
    if not processes.is_main():
        with torch.no_grad():
            for parameter in prepared.module.parameters():
                parameter.add_(1.0)
    return trained(prepared)


def at_odds() -> dict[str, str]:
    prepared = ready()
    return failed(lambda: run(prepared if processes.is_main() else dataclasses.replace(prepared, learning_rate=0.5)))


def said_by(*words: str) -> dict[str, Any]:
    """What the command says in this process, and its exit code."""
    said = io.StringIO()
    sys.argv = ["antefix", *words]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        main()
    return {"said": said.getvalue(), "code": end.value.code}


def in_each_process(folder: Path) -> None:
    """What every process does that the launcher starts with this file."""
    done: dict[str, Any] = {"bank is taken": said_by("train", "inns.toml", "name=taken")}
    done["dry run"] = said_by("train", "inns.toml", "--dry-run", "--json")
    done["a loss that is no number"] = said_by("train", "inns.toml", "name=mad", "training.learning_rate=1e38")
    done |= {name: trained(ready(**changes)) for name, changes in RUNS.items()}
    done["stopped by the other"] = stopped_by_the_other(folder / "stopped")
    done["watched by one that fails"] = watched_by_one_that_fails()
    done["failing with its share"] = failing_with_its_share()
    done["started elsewhere"] = started_elsewhere()
    done["at odds"] = at_odds()
    done["joined"] = [processes.rejoined(processes.shared(range(count))) for count in range(6)]
    torch.save(done, folder / f"{os.environ['RANK']}.pt")


RECIPE = """
name = "inns"
base = "base"
dtype = "float32"
[config]
num_virtual_tokens = 4
[data]
train = "inns.jsonl"
[training]
max_steps = 60
pairs_per_step = 4
evaluations = 6
checkpoint_seconds = 3600
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    base = tiny_base("llama")
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    rows = [{"table": [["name", f"Inn {n}"]], "targets": [f"Inn {n} asks {n}.", "I" * n]} for n in range(1, 31)]
    (folder / "inns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "inns.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "bank" / "taken").mkdir(parents=True)
    return folder


def launch(workplace: Path, *words: str | Path) -> subprocess.Popen[str]:
    """Two processes of these words, on the processor also where there is more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.Popen(
        [*launcher, "--main_process_port", str(port), *words],
        cwd=workplace, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(launcher: subprocess.Popen[str], *, well: bool = True) -> tuple[str, str]:
    """What the processes said on stdout and stderr. The launcher ends them where they hang."""
    try:
        said = launcher.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # not killed: it would leave its processes behind
        pytest.fail(f"no end in {PATIENCE_SECONDS} seconds: {launcher.communicate()}")
    assert (launcher.returncode == 0) == well, said
    return said


@pytest.fixture(scope="module")
def both(workplace: Path) -> list[dict[str, Any]]:
    """What `in_each_process` did, in each."""
    finished(launch(workplace, Path(__file__), workplace))
    return [torch.load(workplace / f"{rank}.pt") for rank in (0, 1)]


def assert_equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0.0, "atol": 0.0}))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(both: list[dict[str, Any]], name: str) -> None:
    one, main_process, other = trained(ready(**RUNS[name])), both[0][name], both[1][name]
    assert main_process["losses"] == pytest.approx(one["losses"], rel=1e-6, abs=1e-5)
    assert other["losses"] == [], "one is watched"
    assert_equal_tensors(main_process["tensors"], other["tensors"])
    assert_equal_tensors(main_process["tensors"], one["tensors"], rtol=1e-4, atol=1e-5)
    assert main_process["dev"] == other["dev"]
    assert len(main_process["dev"]) == len(one["dev"])
    for found, wanted in zip(main_process["dev"], one["dev"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for what in ("steps", "kept step"):
        assert main_process[what] == other[what] == one[what]


def test_what_is_compared_is_what_it_says(both: list[dict[str, Any]]) -> None:
    """Ten steps; unlike numbers of target tokens; early ends that are early; passes that are shared."""
    prepared, unlike = ready(), 0
    plan = steps(prepared.train_set, pairs_per_step=5, targets_per_row=2, seed=0)
    for units in (next(plan) for _ in range(10)):
        made = microbatches(prepared.train_set, units, 40, packed=True, multiple_of=2)
        targets = [
            sum(len(prepared.train_set.examples[n].targets[t]) for batch in made[rank::2] for n, t in pairs_of(batch))
            for rank in (0, 1)
        ]
        unlike += targets[0] != targets[1]
    assert unlike >= 8
    assert both[0]["token mean"]["steps"] == 10
    assert both[0]["patience, texts choose"]["steps"] < 10

    def passes(name: str) -> list[int]:
        return [len(process[name]["seeds of passes"]) for process in both]

    assert min(passes("token mean")) + 1 >= max(passes("token mean")) > 10
    for name in ("all of a step in one pass", "a single row a step"):
        assert passes(name) == [10, 10]
    assert passes("a single pair a step") == [10, 0]


def test_every_pass_draws_for_itself_and_what_it_would_draw_in_one_process(both: list[dict[str, Any]]) -> None:
    name = "dropout, a pass a pair"
    drawn = [seed for process in both for seed in process[name]["seeds of passes"]]
    assert len(set(drawn)) == len(drawn) == 50
    assert set(drawn) == set(trained(ready(**RUNS[name]))["seeds of passes"])


def test_shares_are_joined_in_order(both: list[dict[str, Any]]) -> None:
    for process in both:
        assert process["joined"] == [list(range(count)) for count in range(6)]


def test_a_stop_asked_of_one_process_stops_all_and_loses_no_bit(both: list[dict[str, Any]]) -> None:
    for process in both:
        assert process["stopped by the other"]["end"] == {"KeyboardInterrupt": ""}
        assert process["stopped by the other"]["asked"] == 4
        assert_equal_tensors(process["stopped by the other"]["tensors"], process["token mean"]["tensors"])
    assert both[0]["stopped by the other"]["losses"] == both[0]["token mean"]["losses"][4:]


def test_an_error_of_one_process_ends_all_and_is_said_once(both: list[dict[str, Any]]) -> None:
    elsewhere = {OtherProcessError.__name__: "process 0 ended with an error, and says which"}
    assert [process["watched by one that fails"] for process in both] == [
        {"TrainingError": "the disk is full"},
        elsewhere,
    ]
    assert [list(process["failing with its share"]) for process in both] == [["OtherProcessError"], ["GenerationError"]]
    assert both[1]["at odds"] == elsewhere
    assert (
        "the processes see other data, another base or another checkpoint each" in both[0]["at odds"]["TrainingError"]
    )


def test_first_values_are_those_of_the_main_process(both: list[dict[str, Any]]) -> None:
    for process in both:
        assert_equal_tensors(process["started elsewhere"]["tensors"], process["token mean"]["tensors"])


def test_the_command_has_one_voice(both: list[dict[str, Any]]) -> None:
    assert both[0]["bank is taken"] == {
        "said": "antefix: bank/taken exists: give the recipe another name, or say --overwrite to train it anew\n",
        "code": 2,
    }
    assert both[1]["bank is taken"] == {"said": "", "code": 2}
    assert "60 steps of 4 pairs" in both[0]["dry run"]["said"]
    assert both[1]["dry run"] == {"said": "", "code": 0}
    assert "the loss is nan; lower learning_rate" in both[0]["a loss that is no number"]["said"]
    assert both[1]["a loss that is no number"] == {"said": "", "code": 2}


def wait_for_steps(launcher: subprocess.Popen[str], log: Path, count: int) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while len(read_log(log)) < count and launcher.poll() is None and time.monotonic() < until:
        time.sleep(0.002)


@pytest.mark.skipif(os.name != "posix", reason="signals of a terminal")
def test_the_command_interrupted_and_resumed_leaves_what_one_process_leaves(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = workplace / "runs/inns" / LOG_FILE
    launcher = launch(workplace, "-m", "antefix", "train", "inns.toml")
    wait_for_steps(launcher, log, 5)
    launcher.send_signal(signal.SIGINT)  # as a terminal does: the launcher's processes are in sessions of their own
    _, errors = finished(launcher, well=False)
    assert 5 <= len(read_log(log)) < 60
    assert (log.parent / CHECKPOINT_FILE).is_file()
    said = Counter(errors.splitlines())
    assert said["stopping after this step; the same command goes on from here (Ctrl-C again: stop at once)"] == 1
    assert said["antefix: interrupted"] == 1

    printed, errors = finished(launch(workplace, "-m", "antefix", "train", "inns.toml", "--json"))
    assert errors.count("going on from the checkpoint in runs/inns") == 1
    assert json.loads(printed)["steps"] == 60
    monkeypatch.chdir(workplace)
    CliRunner().invoke(app, ["train", "inns.toml", "run=runs/one", "bank=bank_of_one"], catch_exceptions=False)
    assert_alike(Path("runs/inns"), Path("runs/one"), Path("bank/inns"), Path("bank_of_one/inns"))


def assert_alike(run_of_two: Path, run_of_one: Path, prefix_of_two: Path, prefix_of_one: Path) -> None:
    from antefix.prefix import Prefix

    for folder in (run_of_two, run_of_one):
        assert {path.name for path in folder.iterdir()} == {LOG_FILE, PLOT_FILE}
    logs = [read_log(folder / LOG_FILE) for folder in (run_of_two, run_of_one)]
    assert [row["step"] for row in logs[0]] == list(range(1, 61))
    for row, wanted in zip(*logs, strict=True):
        assert {k: v for k, v in row.items() if k != "pairs_per_second"} == pytest.approx(
            {k: v for k, v in wanted.items() if k != "pairs_per_second"}, rel=1e-4
        )
    two, one = Prefix.load(prefix_of_two), Prefix.load(prefix_of_one)
    assert_equal_tensors(two.tensors, one.tensors, rtol=1e-3, atol=1e-4)
    assert two.card.training | {"seconds": 0.0} == one.card.training | {"seconds": 0.0}
    assert {path.name for path in prefix_of_two.parent.iterdir()} == {"inns", "taken"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple)),
             min_size=1, max_size=8),
    st.integers(1, 90), st.integers(1, 4), st.sampled_from(["packed", "padded", "encoder_decoder"]), st.integers(2, 4),
)  # fmt: skip
def test_every_process_gets_as_many_passes_where_there_are_pairs_enough(
    rows: Sequence[tuple[int, tuple[int, ...]]], budget: int, targets_per_row: int, form: str, num_processes: int
) -> None:
    data = encoded(*rows, for_encoder=form == "encoder_decoder")
    units = all_units(data, targets_per_row)
    alone, made = (
        microbatches(data, units, budget, packed=form == "packed", multiple_of=n) for n in (1, num_processes)
    )
    assert Counter(p for batch in made for p in pairs_of(batch)) == Counter(pairs_of(units))
    assert len(made) % num_processes == 0 or all(len(batch) == 1 for batch in made)
    assert min(num_processes, len(pairs_of(units))) <= len(made) < len(alone) + 2 * num_processes


@pytest.mark.parametrize(
    ("environment", "found", "wanted"),
    [
        ({}, None, False),
        ({"LOCAL_RANK": "1"}, None, True),
        ({"LOCAL_RANK": "1"}, torch.device("mps"), True),
        ({"LOCAL_RANK": "1"}, torch.device("cuda"), False),
        ({"LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "true"}, torch.device("cuda"), True),
    ],
)
def test_processes_without_accelerators_meet_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: torch.device | None, wanted: bool
) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: found)
    assert processes.on_processor() is wanted


if __name__ == "__main__":
    shutil.rmtree(SEALED)  # this process has the home of the test that started it
    in_each_process(Path(sys.argv[1]))
