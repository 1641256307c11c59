"""Several processes on one bank: nothing is lost, and nobody gets an error but those that are promised."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import processes
from conftest import tiny_model
from test_prefix_file import tiny_prefix

from antefix.bank import Bank, Query
from antefix.errors import BankError
from antefix.prefix import Prefix

SECONDS = 4.0
WORKERS = 4
SHARED = tuple(f"shared-{n}" for n in range(4))


def work(folder: Path, number: int, begin: Any, own_file: Path) -> None:
    """Writes the names that it owns in the end to a file."""
    begin.wait()
    until = time.time() + SECONDS
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
    own_file.write_text(" ".join(own))


def test_processes_share_a_bank(tmp_path: Path) -> None:
    bank = Bank(tmp_path / "bank")
    bank.add("first", tiny_prefix(tiny_model("llama"), 2))
    begin = processes().Barrier(WORKERS)
    files = [tmp_path / f"own-{number}" for number in range(WORKERS)]
    workers = [
        processes().Process(target=work, args=(bank.folder, number, begin, file)) for number, file in enumerate(files)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0] * WORKERS, "what went wrong stands above"
    owned = {name for file in files for name in file.read_text().split()}
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
