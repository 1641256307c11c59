"""Several processes on one bank: nothing is lost, and nobody gets an error but those that are promised."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_model
from test_prefix_file import tiny_prefix

from antefix.bank import Bank, Query
from antefix.errors import BankError
from antefix.prefix import Prefix

SECONDS = 4.0
WORKERS = 4
SHARED = tuple(f"shared-{n}" for n in range(4))


def work(folder: Path, number: int, until: float) -> None:
    """Prints the names that it owns in the end."""
    bank, order = Bank(folder), random.Random(number)
    prefix = bank["first"]
    own: list[str] = []
    made = 0
    while time.time() < until:
        act = order.choice(["add", "add", "rename", "remove", "page", "read", "shared", "overwrite", "refresh"])
        if act == "add":
            own.append(f"own-{number}-{made}")
            made += 1
            bank.add(own[-1], prefix)
        elif act == "rename" and own:
            old = own.pop(order.randrange(len(own)))
            own.append(f"own-{number}-{made}")
            made += 1
            bank.rename(old, own[-1])
        elif act == "remove" and len(own) > 3:
            bank.remove(own.pop(order.randrange(len(own))))
        elif act == "page":
            page = bank.page(Query(text=f"own-{number}-", limit=None))
            assert {e.name for e in page.entries} == set(own), "a process sees what it did"
            assert all(e.problem is None for e in page.entries)
        elif act == "read" and own:
            assert bank[order.choice(own)].card.method == "prefix_tuning"
        elif act == "refresh":
            bank.refresh()
        elif act == "overwrite":  # one prefix for all, which is there all the time
            tags = (f"{number}",)
            Prefix(prefix.tensors, prefix.card.model_copy(update={"tags": tags})).save(folder / "first", overwrite=True)
            bank["first"]
        else:  # names that all of them want
            name, other = order.sample(SHARED, 2)
            with contextlib.suppress(BankError):  # taken, or not there: that is promised
                match order.randrange(5):
                    case 0:
                        bank.add(name, prefix)
                    case 1:
                        bank.remove(name)
                    case 2:
                        bank.rename(name, other)
                    case 3:
                        assert bank[name].card.config["num_virtual_tokens"] == 2
                    case _:
                        bank.card(name)
    print(" ".join(own))


def test_processes_share_a_bank(tmp_path: Path) -> None:
    bank = Bank(tmp_path / "bank")
    bank.add("first", tiny_prefix(tiny_model("llama"), 2))
    code = (
        "import sys, time; from pathlib import Path; from test_bank_processes import work; sys.stdin.readline(); "
        "work(Path(sys.argv[1]), int(sys.argv[2]), time.time() + float(sys.argv[3]))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(bank.folder), str(number), str(SECONDS)], cwd=Path(__file__).parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(WORKERS)
    ]  # fmt: skip
    for worker in workers:  # all of them have imported what they need by the time that they can read this
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, "\n".join(errors for _, errors in said)
    owned = {name for names, _ in said for name in names.split()}
    there = set(bank)
    assert owned, "nobody did anything"
    assert owned <= there
    assert there - owned <= {"first", *SHARED}
    assert {e.name for e in bank.page(Query(limit=None)).entries} == there == {e.name for e in bank.entries()}
    assert all(problem is None for _, problem in bank.verify())
    assert [p.name for p in bank.folder.iterdir() if p.name.startswith(".")] == [".index"]


def test_a_prefix_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, model = Bank(tmp_path / "bank"), tiny_model("llama")
    bank.add("menus", tiny_prefix(model, 2))
    newer = tiny_prefix(model, 3)
    load = Prefix.load
    changes: list[Callable[[], object]] = [lambda: newer.save(bank.folder / "menus", overwrite=True)]

    def replaced_after_its_card(folder: Path) -> Prefix:
        if changes:
            card, change = folder / "card.json", changes.pop(0)
            old = card.read_bytes()
            change()
            if card.exists():  # the old card beside the new tensors: what a reader in between would see
                new = card.read_bytes()
                card.write_bytes(old)
                try:
                    return load(folder)
                finally:
                    card.write_bytes(new)
        return load(folder)

    monkeypatch.setattr(Prefix, "load", replaced_after_its_card)
    assert bank["menus"].card.config["num_virtual_tokens"] == 3
    changes.append(lambda: bank.remove("menus"))
    with pytest.raises(BankError, match="no prefix 'menus' in the bank"):
        bank["menus"]
