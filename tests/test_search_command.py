"""`antefix search` as a person meets it: what it tries and keeps, and that nothing is lost or done twice."""

from __future__ import annotations

import errno
import fcntl
import json
import random
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from conftest import tiny_base, tiny_model
from test_prefix_file import no_file_larger_than
from typer.testing import CliRunner

from antefix.cli import app
from antefix.errors import AntefixError, RecipeError, TrainingError
from antefix.prefix import Prefix
from antefix.training import prepared, run
from antefix.training.recipe import load_recipe
from antefix.training.search import SearchReport, search
from antefix.training.search_files import BEST_FILE, PLOT_FILE, RESULTS_FILE
from antefix.training.trials import JOURNAL_FILE

RECIPE = """
name = "menus"
base = "llama"
[config]
num_virtual_tokens = 2
[data]
train = "menus.csv"
dev = "dev.csv"
[training]
max_steps = 4
pairs_per_step = 2
evaluations = 2
[search]
trials = 4
[search.space]
"training.learning_rate" = {low = 1e-3, high = 1.0, log = true}
"config.num_virtual_tokens" = {low = 1, high = 3}
"""
FOLDER = Path("runs/menus/search")
JOURNAL, RESULTS, PLOT, BEST = (FOLDER / name for name in (JOURNAL_FILE, RESULTS_FILE, PLOT_FILE, BEST_FILE))
ONLY_RATES = "search.space={'training.learning_rate' = {choices = [%s]}}"


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base("llama")
    base.model.save_pretrained("llama")
    base.tokenizer.save_pretrained("llama")
    tiny_model("llama", seed=1).save_pretrained("other")
    base.tokenizer.save_pretrained("other")
    Path("menus.toml").write_text(RECIPE)
    Path("menus.csv").write_text("dish,text\n" + "".join(f"{'soup' * n},It is {n}.\n" for n in range(1, 7)))
    Path("dev.csv").write_text("dish,text\nsoup,It is 1.\npie,It is pie.\n")


def said(*words: str) -> str:
    """What the command says, on stdout or as its error."""
    result = CliRunner().invoke(app, ["search", "menus.toml", *words])
    if isinstance(result.exception, AntefixError):
        return str(result.exception)
    assert result.exception is None, result.output
    return result.output


def found(*words: str) -> dict[str, Any]:
    """What it prints for a machine."""
    result = CliRunner().invoke(app, ["search", "menus.toml", "--json", *words])
    assert result.exception is None, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def tried(results: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The trials in the order in which they were done, without their times."""
    keys = ("number", "values", "state", "score", "kept_step")
    return [tuple(trial[key] for key in keys) for trial in sorted(results["trials"], key=lambda t: t["number"])]


def steps_of(*words: str, stop_at: int | None = None) -> list[tuple[int, int]]:
    """(trial, step) of every step that a search takes; asked to stop in the stop_at-th of them."""
    seen: list[tuple[int, int]] = []

    def note(report: SearchReport) -> None:
        if report.step is not None:
            seen.append((report.trial, report.step.step))

    recipe = load_recipe(Path("menus.toml"), words)
    if stop_at is None:
        search(recipe, watch=note)
    else:
        with pytest.raises(KeyboardInterrupt):
            search(recipe, watch=note, stop_requested=lambda: len(seen) + 1 >= stop_at)
    return seen


def test_a_search_says_keeps_and_draws_what_it_found() -> None:
    output = said()
    assert "the best values are in runs/menus/search/best.toml" in output
    assert "trial 4/4" in output
    results = json.loads(RESULTS.read_text())
    scores = [trial["score"] for trial in results["trials"]]
    assert scores == sorted(scores), "a loss: the least is the best"
    assert len(scores) == 4
    assert results["best"] == results["trials"][0]
    assert results["metric"] == "dev_loss"
    for trial in results["trials"]:
        assert 1e-3 <= trial["values"]["training.learning_rate"] <= 1
        assert trial["values"]["config.num_virtual_tokens"] in (1, 2, 3)
        assert f"{trial['score']:.4f}" in output
    assert len({trial["values"]["training.learning_rate"] for trial in results["trials"]}) == 4
    assert PLOT.stat().st_size > 5000
    assert not Path("bank").exists(), "a trial keeps no prefix"


def test_the_best_recipe_trains_as_it_is_and_comes_to_the_same_score() -> None:
    best = found("data.text.separator=' \"->\" '", "search.trials=3")["best"]
    recipe = load_recipe(BEST)
    assert recipe.training.learning_rate == best["values"]["training.learning_rate"]
    assert recipe.data.text == {"separator": ' "->" '}
    assert "search" not in tomllib.loads(BEST.read_text())
    result = CliRunner().invoke(app, ["train", str(BEST)])
    assert result.exception is None, result.output
    card = Prefix.load("bank/menus").card
    assert card.config["num_virtual_tokens"] == best["values"]["config.num_virtual_tokens"]
    kept = {row["step"]: row["dev_loss"] for row in card.scores["dev"]}
    assert kept[card.training["kept_step"]] == best["score"]


def test_trials_that_are_done_are_not_done_again_and_more_go_on() -> None:
    first = found("--trials", "2")
    assert steps_of("search.trials=2") == []
    assert {trial for trial, _ in steps_of("search.trials=4")} == {3, 4}
    more = found("--trials", "1")
    assert tried(more)[:2] == tried(first), "fewer than there are: what there is"
    assert said("--anew", "--trials", "4").count("trial 4/4") == 1
    assert tried(json.loads(RESULTS.read_text())) == tried(more), "the seed says what is drawn"


def test_a_trial_that_was_cut_off_is_done_again_with_the_same_values() -> None:
    whole = found("run=whole")
    assert steps_of(stop_at=6) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]
    with JOURNAL.open("ab") as file:
        file.write(b'{"op_code": 6, "worker')  # what a kill leaves of a line
    Path(f"{JOURNAL}.lock").symlink_to(JOURNAL_FILE)  # and of Optuna's lock, which would be waited for
    started = time.monotonic()
    assert steps_of()[0] == (2, 1)
    assert time.monotonic() - started < 20
    assert tried(found()) == tried(whole)


def test_a_trial_killed_between_its_result_and_its_end_has_ended() -> None:
    whole = found("--trials", "8", "run=whole")
    found("--trials", "6")
    lines = JOURNAL.read_text().splitlines(keepends=True)
    assert '"result"' in lines[-2]
    JOURNAL.write_text("".join(lines[:-1]))
    assert steps_of("search.trials=6") == []
    assert tried(found("--trials", "8")) == tried(whole), "what is drawn later knows of it"


def started_search(*words: str) -> Command:
    return Command("search", "menus.toml", "--json", *words)


def killed_after(process: Command, trials: int, wait_seconds: float) -> int:
    deadline = time.monotonic() + 120
    while process.poll() is None and (not JOURNAL.exists() or JOURNAL.read_text().count('"result"') < trials):
        assert time.monotonic() < deadline, f"no {trials} trials in two minutes"
        time.sleep(0.001)
    time.sleep(wait_seconds)
    process.kill()
    process.communicate()
    return process.returncode


def test_kill_9_in_the_middle_loses_no_trial() -> None:
    words = ("training.max_steps=20", "training.evaluations=5", "search.prune=true", "--trials", "6")
    whole = found(*words, "run=whole")
    seed = time.time_ns()
    print(f"moments of random.Random({seed})")  # pytest shows it where the test fails
    moments = random.Random(seed)
    codes = [killed_after(started_search(*words), trials, moments.uniform(0, 0.3)) for trials in (1, 4)]
    assert codes[0] == -signal.SIGKILL
    process = started_search(*words)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert tried(json.loads(output)) == tried(whole)
    assert "trial 1/6" not in errors, "what was done is not done again"


def test_ctrl_c_ends_after_the_step() -> None:
    process = started_search("training.max_steps=100000", "training.evaluations=1")
    try:
        while not JOURNAL.exists() or '"op_code":5' not in JOURNAL.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopping after this step; the same command does this trial again" in errors


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("search.space={'training.learning_rate' = {low = 1e-3, high = 2.0, log = true}}", "space"),
        ("search.seed=1", "space"),
        ("base=other", "base"),
        ("data.max_target_tokens=4", "data"),
        ("training.max_steps=5", "settings"),
        ("search.prune=true", "settings"),
    ],
)
def test_trials_of_anything_else_are_refused_unless_they_are_dropped(change: str, what: str) -> None:
    found("--trials", "1")
    before = JOURNAL.read_bytes()
    assert said(change) == (
        f"runs/menus/search holds a search with other {what}: give this recipe another `run` folder, or drop that "
        "search with --anew"
    )
    assert JOURNAL.read_bytes() == before
    assert "no such file" in said("--anew", "data.train=none.csv")
    assert JOURNAL.read_bytes() == before, "nothing is dropped before all is checked"
    assert [trial[0] for trial in tried(found(change, "--anew", "--trials", "1"))] == [1]


def test_a_changed_data_file_is_other_data() -> None:
    found("--trials", "1")
    with Path("menus.csv").open("a") as file:
        file.write("pie,It is new.\n")
    assert "holds a search with other data" in said()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rat={low=1,high=2}", r"search.space: unknown key 'training.learning_rat': did you mean"),
        ("trainin.epochs={low=1,high=2}", r"search.space: unknown key 'trainin': did you mean 'training'\?"),
        ("config.num_virtual={low=1,high=2}", r"unknown key 'config.num_virtual': did you mean 'num_virtual_tokens'\?"),
        ("data.text.separater={choices=['a']}", r"search.space: data.text format: unknown key 'separater'"),
        ("training.learning_rate={low=-1,high=2}", r"search.space: 'training.learning_rate' is -1: .*greater than 0"),
        ("config.initial={choices=['text','word']}", r"search.space: 'config.initial' is \"word\": .*'text'"),
        ("training.epochs.x={low=1,high=2}", r"search.space: .*'training.epochs"),
        ("training.epochs={low=2,high=1}", r"'search.space.training.epochs' is .*: low, 2, must be below high, 1"),
        ("training.epochs={low=0.0,high=1,log=true}", r"'search.space.training.epochs' .*with log, low must be above"),
        ("training.epochs={low=1}", r"'search.space.training.epochs' is .*: give low and high, or choices"),
        ("training.epochs={choices=[]}", r"'search.space.training.epochs' is .*one or more different values"),
        ("training.epochs={choices=[1,1.0]}", r"'search.space.training.epochs' is .*one or more different values"),
        ("training.epochs={choices=[1],low=1}", r"'search.space.training.epochs' is .*`choices` stand alone"),
        ("training.epochs={low='a',high=1}", r"'search.space.training.epochs.low' is \"a\": a bound is a number"),
        ("training.epochs={choices=[[1]]}", r"'search.space.training.epochs.choices' is \[\[1\]\]: a search takes"),
        ("training.epochs={lo=1,high=2}", r"unknown key 'search.space.training.epochs.lo': did you mean 'low'\?"),
        ("training.epochs=3", r"unknown key 'search.space.training.epochs': Known: choices, high, log, low"),
        ("training.seed={low=1,high=3}", r"search.space: 'training.seed' cannot be searched: it draws the dev set"),
        ("name={choices=['a','b']}", r"'name' cannot be searched: keys to search are base, dtype, method, config.\*"),
        ("base={choices=['llama','other']}", r"'base' cannot be searched: a dev loss counts a base's own tokens"),
        ("decoding.num_beams={low=1,high=3}", r"'decoding.num_beams' cannot be searched: it changes no dev loss"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(Path("menus.toml"), [f"search.space.{change}"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("menus.toml: ")


def test_a_mistake_ends_the_command_with_2() -> None:
    process = started_search("search.trails=3")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors == "antefix: menus.toml: unknown key 'search.trails': did you mean 'trials'? Known: " + (
        "prune, seed, space, trials\n"
    )


def test_ranges_on_the_command_line_go_before_those_of_the_file() -> None:
    words = ["search.space.training.learning_rate={choices=[0.5]}", "search.space.training.epochs={low=0.5,high=1}"]
    space = load_recipe(Path("menus.toml"), words).search.space
    assert space["training.learning_rate"].choices == (0.5,)
    assert (space["training.epochs"].low, space["training.epochs"].high) == (0.5, 1)
    assert (space["config.num_virtual_tokens"].low, space["config.num_virtual_tokens"].high) == (1, 3)


def test_without_a_space_the_learning_rate_is_searched() -> None:
    Path("menus.toml").write_text(RECIPE.partition("[search.space]")[0])
    results = found("--trials", "3")
    (key, values), *others = results["space"].items()
    assert not others
    assert (key, values) == ("training.learning_rate", {"low": 5e-3, "high": 0.5, "log": True})


def test_a_trial_without_a_finite_loss_has_failed_and_the_search_goes_on() -> None:
    words = (ONLY_RATES % "1e30, 0.02", "--trials", "5")
    output = said(*words)
    assert "its gradient is no number; lower learning_rate (now 1e+30)" in output
    results = json.loads(RESULTS.read_text())
    assert {trial["state"] for trial in results["trials"]} == {"done", "failed"}
    assert results["best"]["values"] == {"training.learning_rate": 0.02}
    assert results["trials"][-1]["state"] == "failed"
    assert results["trials"][-1]["score"] is None
    assert tried(found(*words)) == tried(results), "a failed trial is not done again"


def test_where_every_trial_failed_there_is_no_best_recipe() -> None:
    words = (ONLY_RATES % "1e30", "--trials", "2")
    for _ in range(2):
        assert said(*words).startswith(
            "none of 2 trials has a score; trial 1 of training.learning_rate = 1e+30: step 2: its gradient is no number"
        )
    assert json.loads(RESULTS.read_text())["best"] is None
    assert not BEST.exists()


def test_the_same_values_are_trained_once() -> None:
    words = (ONLY_RATES % "0.01, 0.02", "search.trials=6")
    assert len(steps_of(*words)) == 2 * 4
    results = found(*words)
    assert sum(trial["same_as"] is None for trial in results["trials"]) == 2
    scores = {(trial["values"]["training.learning_rate"], trial["score"]) for trial in results["trials"]}
    assert len(scores) == 2
    assert "as trial" in said(*words)


def test_a_hopeless_trial_is_pruned_when_asked() -> None:
    words = ("training.max_steps=12", "training.evaluations=6", "search.trials=12")
    assert len(steps_of(*words, "run=whole")) == 12 * 12
    seen = steps_of(*words, "search.prune=true")
    assert len(seen) < 12 * 12
    results = found(*words, "search.prune=true")
    pruned = {trial["number"]: trial for trial in results["trials"] if trial["state"] == "pruned"}
    assert pruned
    for number in pruned:
        assert 4 <= max(step for trial, step in seen if trial == number) < 12
    assert results["best"]["state"] == "done"
    assert all(trial["score"] >= results["best"]["score"] for trial in pruned.values())
    assert "pruned" in said(*words, "search.prune=true")


def test_bleu_is_maximised(monkeypatch: pytest.MonkeyPatch) -> None:
    scores: Iterator[float] = iter([0.2, 0.1, 0.7, 0.3, 0.4, 0.5])
    monkeypatch.setattr(run, "_score_of", lambda prepared: lambda: {"dev_bleu": next(scores)})
    results = found("training.dev_metric=bleu", "--trials", "3")
    assert results["metric"] == "dev_bleu"
    assert [(trial["number"], trial["score"]) for trial in results["trials"]] == [(2, 0.7), (3, 0.5), (1, 0.2)]
    assert results["best"] == results["trials"][0]


def test_base_and_data_are_loaded_once_where_no_trial_changes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    for name in ("load_base", "read"):
        real = getattr(prepared, name)
        monkeypatch.setattr(
            prepared, name, lambda *a, _real=real, _name=name, **k: (loads.append(_name), _real(*a, **k))[1]
        )
    found()
    assert loads == ["read", "read", "load_base"]
    loads.clear()
    dtypes = "search.space={'dtype' = {choices = ['float32', 'bfloat16']}}"
    results = found(dtypes, "run=dtypes", "--trials", "6")
    assert {trial["values"]["dtype"] for trial in results["trials"]} == {"float32", "bfloat16"}
    trained = [t for t in sorted(results["trials"], key=lambda t: t["number"]) if t["same_as"] is None]
    changes = sum(a != b for a, b in pairwise(["float32", *(t["values"]["dtype"] for t in trained)]))
    assert (loads.count("read"), loads.count("load_base")) == (2, 1 + changes)


def test_a_search_needs_dev_scores() -> None:
    assert "training.evaluations is 0, and a search needs dev scores" in said("training.evaluations=0")
    assert not FOLDER.exists()


def test_a_search_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert said() == "a search runs in one process: start it without a launcher"
    assert not FOLDER.exists()


def test_two_searches_in_one_folder_are_refused() -> None:
    found("--trials", "1")
    with JOURNAL.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "runs/menus/search: another process is searching here" in said("--anew")
    assert len(tried(found("--trials", "1"))) == 1


def test_a_journal_of_something_else_is_refused() -> None:
    FOLDER.mkdir(parents=True)
    JOURNAL.write_text("no journal\nat all\n")
    assert "trials.jsonl: not a readable journal of trials (JSONDecodeError: " in said()
    assert len(found("--anew", "--trials", "1")["trials"]) == 1


def test_a_full_disk_is_one_line_and_no_trial_is_lost() -> None:
    found("--trials", "2")
    with no_file_larger_than(JOURNAL.stat().st_size + 10):
        assert said().startswith("runs/menus/search/trials.jsonl: cannot be written (File too large); the trials that")
    assert len(found("--trials", "3")["trials"]) == 3


def test_a_score_that_cannot_be_kept_ends_the_search_and_fails_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("optuna.trial.Trial.report", full)
        assert "trials.jsonl: cannot be written (No space left on device)" in said("search.prune=true")
    assert tried(found("search.prune=true")) == tried(found("search.prune=true", "run=whole"))


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = CliRunner().invoke(app, ["search", "menus.toml"])
    assert isinstance(result.exception, TrainingError)
    assert str(result.exception) == "a search needs Optuna: pip install 'antefix[search]'"
