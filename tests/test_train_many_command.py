"""`antefix train-many` as a person meets it: who gets a prefix, what is told of the others, and what survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from conftest import tiny_base
from typer.testing import CliRunner

from antefix.bank import Bank
from antefix.cli import app
from antefix.errors import AntefixError
from antefix.prefix import Prefix
from antefix.tensor_file import TENSORS_FILE
from antefix.training.many_ray import groups_of
from antefix.training.many_report import PLOT_FILE, REPORT_FILE

RECIPE = """
name = "menus"
base = "llama"
dtype = "float32"
[config]
num_virtual_tokens = 2
[data]
train = "replaced"
dev_fraction = 0.3
[training]
max_steps = 3
pairs_per_step = 2
evaluations = 1
checkpoint_seconds = 0
"""
CUSTOMERS = {"Fern & Co": 6, "Inn": 5, "Café Olé": 4, "Tiny": 2}


def write_orders(customers: dict[str, int]) -> None:
    rows = [f"{c},{'soup ' * n}from {c},It is {n}." for c, count in customers.items() for n in range(1, count + 1)]
    rows += [",soup from nobody,It is none."] * 3
    Path("orders.csv").write_text("customer,source,target\n" + "".join(f"{row}\n" for row in rows))


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base("llama")
    base.model.save_pretrained("llama")
    base.tokenizer.save_pretrained("llama")
    Path("menus.toml").write_text(RECIPE)
    write_orders(CUSTOMERS)


def run(*words: str) -> str:
    """What the command says, on stdout or as its error."""
    result = CliRunner().invoke(app, ["train-many", "orders.csv", "menus.toml", *words])
    if isinstance(result.exception, AntefixError):
        return str(result.exception)
    assert result.exception is None, result.output
    return result.output


def facts(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["train-many", "orders.csv", "menus.toml", "--json", *words])
    assert result.exception is None, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_who_failed_is_told_and_the_exit_code_says_it() -> None:
    words = ["--by", "customer", "--min-pairs", "3", "training.learning_rate=1e30", "training.schedule=constant"]
    result = CliRunner().invoke(app, ["train-many", "orders.csv", "menus.toml", *words])
    assert "0 trained, 0 unchanged, 3 failed" in " ".join(result.output.split())
    assert "menus.Inn failed: step " in result.output
    assert result.exit_code == 1


def test_every_customer_gets_a_prefix_and_who_did_not_is_told() -> None:
    said = " ".join(run("--by", "customer", "--min-pairs", "3").split())
    assert "3 users, 10 pairs to train on" in said
    assert "left out: 3 rows have nothing in 'customer'" in said
    assert "skipped: 1 users with fewer than 3 pairs, 2 in all (--min-pairs)" in said
    assert "3 trained, 0 unchanged, 0 failed, in bank; report and plot in runs/menus" in said
    assert list(Bank("bank")) == ["menus.Caf__e9__Ol__e9_", "menus.Fern___26__Co", "menus.Inn"]
    report = json.loads((Path("runs/menus") / REPORT_FILE).read_text())
    assert [row["pairs"] for row in report["rows"]] == [4, 3, 3]
    assert all(row["dev_loss"] > 0 and row["base_dev_loss"] > 0 for row in report["rows"])
    assert (Path("runs/menus") / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_given_again_it_trains_who_is_new_or_changed() -> None:
    assert facts("--by", "customer", "--min-pairs", "3")["trained"] == 3
    write_orders({**CUSTOMERS, "Inn": 6, "Tiny": 3})
    again = facts("--by", "customer", "--min-pairs", "3")
    assert {row["by"]["customer"]: row["outcome"] for row in again["rows"]} == {
        "Fern & Co": "unchanged", "Inn": "trained", "Café Olé": "unchanged", "Tiny": "trained",
    }  # fmt: skip
    assert "was trained by another recipe" in run("--by", "customer", "--min-pairs", "3", "training.max_steps=2")


def test_all_can_start_from_a_shared_one() -> None:
    found = facts("--by", "customer", "--min-pairs", "3", "--shared")
    assert found["trained"] == 3
    card = Prefix.load("bank/menus.Inn").card
    assert card.parents == ("menus",)
    assert card.config["initial_prefix"] == "bank/menus"
    before = (Path("bank/menus") / TENSORS_FILE).read_bytes()
    write_orders({**CUSTOMERS, "Inn": 6})
    assert facts("--by", "customer", "--min-pairs", "3", "--shared")["trained"] == 1, (
        "the shared one is not trained anew"
    )
    assert (Path("bank/menus") / TENSORS_FILE).read_bytes() == before
    words = ("--by", "customer", "--min-pairs", "3", "--shared", "method=lora", "config={}")
    assert "lora cannot start from a kept prefix" in run(*words)


def test_tables_are_put_into_groups_by_their_attributes() -> None:
    rows = [(n, p) for n in ("Inn", "Fern") for p in ("cheap", "dear") for _ in range(3)]
    Path("orders.csv").write_text(
        "mr,ref\n"
        + "".join(f'"name[{n}], priceRange[{p}], area[{k}]","{n} {k}"\n' for k, (n, p) in enumerate(rows))
        + '"name[Inn], area[1]","Inn"\n'
    )
    found = facts("--by", "name", "--by", "priceRange", "--min-pairs", "3", "--dry-run")
    assert [user["name"] for user in found["users"]] == [
        "menus.Inn.cheap", "menus.Inn.dear", "menus.Fern.cheap", "menus.Fern.dear",
    ]  # fmt: skip
    assert found["rows_without_value"] == {"priceRange": 1}
    found = facts("--by", "name", "--by", "priceRange", "--min-pairs", "1", "--keep-empty", "--dry-run")
    assert (len(found["users"]), found["users"][-1]["name"]) == (5, "menus.Inn.")
    assert found["rows_without_value"] == {}
    assert "no row has a column or attribute 'price' beside its text: did you mean 'priceRange'?" in run(
        "--by", "price"
    )


def test_nobody_gets_what_another_wrote_of_the_same_source() -> None:
    Path("orders.csv").write_text("who,source,target\n" + "A,soup,It is A.\nB,soup,It is B.\n" * 3)
    found = facts("--by", "who", "--min-pairs", "3", "--dry-run")
    assert [user["pairs"] for user in found["users"]] == [3, 3]


def test_what_is_wrong_is_said_in_a_line() -> None:
    assert run() == "say by which column or attribute: --by customer"
    assert "no row has a column or attribute 'custom' beside its text: did you mean 'customer'?" in run(
        "--by", "custom"
    )
    assert "nobody has 9 pairs, the most is 6: take --min-pairs 6 or fewer" in run(
        "--by", "customer", "--min-pairs", "9"
    )
    assert "--address is a Ray cluster's" in run("--by", "customer", "--address", "auto")
    Path("orders.csv").write_text("who,source,target\n,soup,It is.\n")
    assert run("--by", "who") == "orders.csv: 'who' is empty in every row"


def command(*words: str) -> Command:
    return Command("train-many", "orders.csv", "menus.toml", "--by", "customer", *words)


def until_kept(count: int, process: Command, seconds: float = 120) -> None:
    """Wait for so many prefixes in the bank."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(list(Path().glob("bank/menus.*/card.json"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert len(list(Path().glob("bank/menus.*/card.json"))) >= count, "the machine is too slow for this test"


MANY = {f"C{n}": 4 for n in range(30)}


def test_kill_9_costs_only_those_in_the_middle() -> None:
    write_orders(MANY)
    words = ("--min-pairs", "3", "--at-work", "1")
    process = command(*words)
    until_kept(3, process)
    process.kill()
    process.communicate()
    kept = {name: (Path("bank") / name / "card.json").stat().st_mtime_ns for name in Bank("bank")}
    assert 3 <= len(kept) < 30
    assert facts("--by", "customer", *words)["unchanged"] == len(kept)
    assert len(Bank("bank")) == 30
    assert all((Path("bank") / name / "card.json").stat().st_mtime_ns == moment for name, moment in kept.items())


def test_ctrl_c_saves_all_and_tells_what_is_there() -> None:
    write_orders(MANY)
    process = command("--min-pairs", "3", "--at-work", "1")
    until_kept(2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    report = json.loads((Path("runs/menus") / REPORT_FILE).read_text())
    assert report["trained"] == len(Bank("bank"))
    assert report["waiting"] == 30 - report["trained"] > 0


def test_groups_are_even_and_hold_everybody() -> None:
    users: list[Any] = list(range(200))
    groups = groups_of(users, 2)
    assert [one for group in groups for one in group] == users
    assert {len(group) for group in groups} == {25}
    assert [len(group) for group in groups_of(users[:3], 2)] == [1, 1, 1]
    assert groups_of([], 2) == []


@pytest.mark.slow
def test_two_ray_workers_one_of_them_killed() -> None:
    pytest.importorskip("ray")
    write_orders({f"C{n}": 4 for n in range(10)})
    process = command("--min-pairs", "3", "--workers", "2", "--json", "training.max_steps=10")
    until_kept(2, process, 600)
    os.kill(_workers(process.pid)[0], signal.SIGKILL)
    printed, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    report = json.loads(printed)
    assert (report["trained"], report["failed"]) == (10, 0)
    assert len(Bank("bank")) == 10


@pytest.mark.slow
def test_ctrl_c_with_ray_and_going_on_in_a_cluster_that_runs() -> None:
    pytest.importorskip("ray")
    write_orders({f"C{n}": 4 for n in range(10)})
    words = ("--min-pairs", "3", "--workers", "2", "training.max_steps=10")
    process = command(*words)
    until_kept(2, process, 600)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    kept = {name: (Path("bank") / name / "card.json").stat().st_mtime_ns for name in Bank("bank")}
    assert 2 <= len(kept) < 10

    ray = Path(sys.executable).with_name("ray")
    subprocess.run(
        [ray, "start", "--head", "--port", "0", "--num-cpus", "2", "--include-dashboard", "false"], check=True
    )
    try:
        assert facts("--by", "customer", *words, "--address", "auto")["unchanged"] == len(kept)
    finally:
        subprocess.run([ray, "stop", "--force"], check=True)
    assert len(Bank("bank")) == 10
    assert all((Path("bank") / name / "card.json").stat().st_mtime_ns == moment for name, moment in kept.items())


def _workers(pid: int) -> list[int]:
    """The processes of Ray's workers that train, below this one."""
    import psutil

    below = psutil.Process(pid).children(recursive=True)
    return [one.pid for one in below if any("ray::Worker" in word for word in one.cmdline())]
