"""A bank: prefixes by name, a list that follows the files, and commands that say what they did."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_base, tiny_model
from test_prefix_file import tiny_prefix
from timing import at_best
from typer.testing import CliRunner

import antefix
from antefix import prefix as prefix_module
from antefix.bank import Bank
from antefix.bank.index import INDEX_FILE, INDEX_FOLDER
from antefix.cli import app
from antefix.errors import AntefixError, BankError, CommandError, PrefixFileError
from antefix.prefix import Prefix

NOT_NAMES = [
    "",
    ".",
    "..",
    "../menus",
    "a/b",
    "/etc",
    "a\\b",
    ".hidden",
    "a b",
    "a\n",
    "ä",
    "x" * 101,
    "~",
    "-a",
    "a\x00",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kept prefixes; tests work on copies."""
    folder, model = tmp_path_factory.mktemp("made") / "bank", tiny_model("llama")
    for slots, name in ((4, "menus"), (3, "sport"), (2, "news")):
        tiny_prefix(model, slots, tags=("test", name), scores={"dev": [{"bleu": 1.0}, {"bleu": 2.5}]}).save(
            folder / name
        )
    return folder


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Bank:
    return Bank(shutil.copytree(made, tmp_path / "bank"))


def break_card(bank: Bank, name: str) -> None:
    (bank.folder / name / "card.json").write_text("{", encoding="utf-8")


def problems(bank: Bank) -> dict[str, str | None]:
    return {entry.name: entry.problem for entry in bank.entries()}


# ---- names and prefixes


def test_it_is_like_a_mapping(bank: Bank) -> None:
    assert antefix.Bank is Bank
    assert (list(bank), len(bank)) == (["menus", "news", "sport"], 3)
    assert "menus" in bank
    assert "menu" not in bank
    assert 5 not in bank
    prefix = bank["menus"]
    assert prefix.card.tags == ("test", "menus")
    assert all(torch.equal(t, Prefix.load(bank.folder / "menus").tensors[n]) for n, t in prefix.tensors.items())
    assert bank.card("sport").config["num_virtual_tokens"] == 3


def test_a_name_that_is_not_there(bank: Bank) -> None:
    with pytest.raises(BankError) as refusal:
        bank["menu"]
    assert str(refusal.value) == (
        f"no prefix 'menu' in the bank '{bank.folder}': did you mean 'menus'? Known: menus, news, sport"
    )
    for ask in (bank.card, bank.remove, lambda name: bank.rename(name, "new"), lambda name: list(bank.verify([name]))):
        with pytest.raises(BankError, match="no prefix 'gone' in the bank"):
            ask("gone")


@pytest.mark.parametrize("name", NOT_NAMES)
def test_a_name_cannot_leave_the_bank(bank: Bank, name: str) -> None:
    prefix = bank["menus"]
    shutil.copytree(bank.folder / "menus", bank.folder.parent / "menus")  # what `../menus` would reach
    assert name not in bank
    for do in (
        bank.__getitem__, bank.card, bank.remove, bank.path, lambda n: bank.add(n, prefix),
        lambda n: bank.rename(n, "new"), lambda n: bank.rename("menus", n), lambda n: list(bank.verify([n])),
    ):  # fmt: skip
        with pytest.raises(BankError, match="cannot be a prefix's name: letters, digits") as refusal:
            do(name)
        assert str(refusal.value).isprintable()
    assert sorted(p.name for p in bank.folder.parent.iterdir()) == ["bank", "menus"]
    assert len(bank) == 3


def test_no_bank(tmp_path: Path) -> None:
    bank = Bank(tmp_path / "gone")
    for ask in (list, len, Bank.entries, lambda b: b["menus"], lambda b: list(b.verify())):
        with pytest.raises(BankError, match=r"there is no bank '.*gone': train a prefix into it"):
            ask(bank)
    assert "menus" not in bank
    assert not bank.folder.exists(), "asking makes no folder"
    (tmp_path / "file").touch()
    with pytest.raises(BankError, match=r"file' is no bank: Not a directory"):
        list(Bank(tmp_path / "file"))


def test_add(bank: Bank, tmp_path: Path) -> None:
    prefix = bank["menus"]
    new = Bank(tmp_path / "new" / "bank")
    assert new.add("menus", prefix) == new.folder / "menus"
    with pytest.raises(BankError, match=r"'menus' is taken in the bank .*: choose another name, or remove it first"):
        new.add("menus", bank["news"])
    assert new["menus"].card == prefix.card


def test_what_is_no_prefix_is_none_of_its_business(bank: Bank) -> None:
    (bank.folder / "notes.txt").write_text("mine")
    (bank.folder / "empty").mkdir()
    shutil.copytree(bank.folder / "menus", bank.folder / ".menus-scratch")
    assert list(bank) == [e.name for e in bank.entries()] == ["menus", "news", "sport"]
    assert "empty" not in bank
    with pytest.raises(BankError, match="'empty' is taken"):
        bank.rename("menus", "empty")


# ---- the list and its index


def test_an_entry_says_what_the_card_says(bank: Bank) -> None:
    entry = bank.entries()[0]
    assert entry.model_dump() == {
        "name": "menus", "problem": None, "method": "prefix_tuning", "positions": "in_place", "num_virtual_tokens": 4,
        "base": "tiny", "fingerprint": bank.card("menus").base.fingerprint,
        "num_bytes": (bank.folder / "menus" / "prefix.safetensors").stat().st_size,
        "tags": ("test", "menus"), "parents": (), "licence": None, "scores": {"dev": {"bleu": 2.5}},
    }  # fmt: skip


def test_the_list_follows_the_files(bank: Bank) -> None:
    assert problems(bank) == dict.fromkeys(("menus", "news", "sport"))
    bank["menus"].save(bank.folder / "new")
    shutil.rmtree(bank.folder / "sport")
    news = bank["news"]
    changed = Prefix(news.tensors, news.card.model_copy(update={"licence": "MIT"}))
    changed.save(bank.folder / "news", overwrite=True)
    entries = {e.name: e for e in bank.entries()}
    assert list(entries) == ["menus", "new", "news"]
    assert entries["news"].licence == "MIT"
    (bank.folder / "new" / "prefix.safetensors").unlink()
    assert problems(bank) == {"menus": None, "new": "prefix.safetensors is missing", "news": None}
    shutil.copy(bank.folder / "menus" / "prefix.safetensors", bank.folder / "new")
    assert problems(bank) == {"menus": None, "new": None, "news": None}


def test_only_changed_cards_are_read_again_and_never_a_tensor(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        "antefix.bank.entry.read_card", lambda path: opened.append(path.name) or prefix_module.read_card(path)
    )
    for name in bank:
        os.truncate(bank.folder / name / "prefix.safetensors", 1)  # whoever read it would complain
    assert problems(bank) == dict.fromkeys(("menus", "news", "sport"))
    assert opened == ["menus", "news", "sport"]
    bank.entries()
    assert opened == ["menus", "news", "sport"]
    os.utime(bank.folder / "news" / "card.json")
    bank.entries()
    assert opened == ["menus", "news", "sport", "news"]


@pytest.mark.parametrize("content", [b"", b"{", b"SQLite format 3\x00" + bytes(4080), b"\xff\x00" * 5000])
def test_a_foreign_index_is_made_anew(bank: Bank, content: bytes) -> None:
    wanted = bank.entries()
    path = bank.folder / INDEX_FOLDER / INDEX_FILE
    path.write_bytes(content)
    assert bank.entries() == bank.page().entries == wanted
    assert path.stat().st_size > len(content)
    path.unlink()
    assert bank.page().entries == wanted


def test_an_index_of_another_version_is_made_anew(bank: Bank) -> None:
    wanted = bank.entries()
    path = bank.folder / INDEX_FOLDER / INDEX_FILE
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
        db.execute("DROP TABLE prefix")
    assert bank.entries() == wanted


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_bank_that_may_not_be_written_is_listed(bank: Bank) -> None:
    bank.folder.chmod(0o500)
    assert len(bank.entries()) == 3


def test_a_bank_whose_index_cannot_be_written_is_listed(bank: Bank) -> None:
    (bank.folder / INDEX_FOLDER).write_text("mine")
    assert len(bank.entries()) == len(bank.page().entries) == 3
    assert (bank.folder / INDEX_FOLDER).read_text() == "mine"
    assert [p for p in bank.folder.iterdir() if p.name.startswith(".") and p.name != INDEX_FOLDER] == []


def test_a_broken_prefix_leaves_the_others_alone(bank: Bank) -> None:
    break_card(bank, "news")
    (bank.folder / "sport" / "card.json").unlink()
    shutil.copytree(bank.folder / "menus", bank.folder / "two words")
    for _ in range(2):  # from the files, then with the index
        found = problems(bank)
        assert found.pop("menus") is None
        assert "card.json: not a readable card" in str(found.pop("news"))
        assert "card.json: no such file" in str(found.pop("sport"))
        assert "not a name: letters, digits" in str(found.pop("two words"))
        assert found == {}
    assert bank["menus"].card.method == "prefix_tuning"
    with pytest.raises(PrefixFileError, match="not a readable card"):
        bank["news"]
    bank.remove("news")
    assert "news" not in bank


def test_two_thousand_prefixes(made: Path, tmp_path: Path) -> None:
    bank = Bank(tmp_path / "many")
    for number in range(2000):
        folder = bank.folder / f"customer-{number:04}"
        folder.mkdir(parents=True)
        for file in ("card.json", "prefix.safetensors"):
            os.link(made / "menus" / file, folder / file)

    first = at_best(bank.entries, times=1)
    assert at_best(bank.entries) < first / 2, "the index spares reading the cards"
    assert len(bank) == len(bank.entries()) == 2000
    one = Bank(made)
    assert at_best(lambda: bank["customer-1234"]) < 5 * at_best(lambda: one["menus"]), "one is had without the others"
    with pytest.raises(BankError, match=r"'customer-9999' in the bank '.*': `antefix bank list --text customer-9999`"):
        bank["customer-9999"]


# ---- what may be done to a prefix


def test_rename(bank: Bank) -> None:
    before = bank["menus"]
    bank.rename("menus", "menus-2024.v1_a")
    assert list(bank) == ["menus-2024.v1_a", "news", "sport"]
    assert bank["menus-2024.v1_a"].card == before.card
    assert [e.name for e in bank.entries()] == list(bank)


def test_rename_refuses_a_taken_name(bank: Bank) -> None:
    before = bank["news"].card
    for taken in ("news", "menus"):
        with pytest.raises(BankError, match=f"'{taken}' is taken in the bank"):
            bank.rename("menus", taken)
    assert bank["news"].card == before
    assert len(bank) == 3


def test_remove_touches_nothing_else(bank: Bank, tmp_path: Path) -> None:
    outside = shutil.copytree(bank.folder / "menus", tmp_path / "outside")
    (bank.folder / "linked").symlink_to(outside, target_is_directory=True)
    (bank.folder / "sport" / "into").symlink_to(outside, target_is_directory=True)
    assert "linked" in bank
    bank.remove("linked")
    bank.remove("sport")
    assert list(bank) == ["menus", "news"]
    assert sorted(p.name for p in bank.folder.iterdir()) == ["menus", "news"]
    assert Prefix.load(outside).card.tags == ("test", "menus")


# ---- verify


def test_verify_reads_every_byte(bank: Bank) -> None:
    assert list(bank.verify()) == [("menus", None), ("news", None), ("sport", None)]
    path = bank.folder / "news" / "prefix.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of one value: the list does not see it
    path.write_bytes(content)
    assert problems(bank)["news"] is None
    found = dict(bank.verify())
    assert "not the bytes that were kept" in str(found.pop("news"))
    assert found == {"menus": None, "sport": None}
    assert list(bank.verify(["sport"])) == [("sport", None)]


def test_verify_with_a_base(bank: Bank) -> None:
    other = tiny_prefix(tiny_model("gpt2"))
    bank.add("other", other)
    fingerprint = bank.card("menus").base.fingerprint
    misfit = Prefix(other.tensors, other.card.model_copy(update={"base": bank.card("menus").base}))
    bank.add("misfit", misfit)
    found = dict(bank.verify(base=tiny_base("llama")))
    assert [name for name, problem in found.items() if problem is None] == ["menus", "news", "sport"]
    assert f"the model given has fingerprint {fingerprint}: load the base it was trained for" in str(found["other"])
    assert "has shape (6, 4, 8), this base has 2 key/value heads of width 10" in str(found["misfit"])


# ---- the commands


def run(*words: str, code: int = 0, answer: str | None = None) -> str:
    """What `antefix bank` prints on stdout. Raises what it raises."""
    result = CliRunner().invoke(app, ["bank", *words], input=answer)
    if isinstance(result.exception, AntefixError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def usage_error(*words: str) -> str:
    """What is said of an option with a value that it does not take."""
    result = CliRunner().invoke(app, ["bank", *words], env={"COLUMNS": "300"})
    assert result.exit_code == 2, result.output
    return result.output


def run_json(*words: str, **how: Any) -> Any:
    return json.loads(run(*words, "--json", **how))


def test_list_command(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    break_card(bank, "news")
    shown = [line.split() for line in run("list", "--bank", str(bank.folder)).splitlines()]
    assert shown[0] == ["name", "method", "slots", "positions", "base", "scores", "size", "tags"]
    assert shown[1][:9] == ["menus", "prefix_tuning", "4", "in_place", "tiny", "dev", "bleu", "2.5", "2.4"]
    assert shown[2][:2] == ["news", "broken"]
    monkeypatch.setenv("COLUMNS", "20")
    assert [line.split() for line in run("list", "--bank", str(bank.folder)).splitlines()] == shown, "a row is a line"
    listed = run_json("list", "--bank", str(bank.folder))
    assert [e["name"] for e in listed] == ["menus", "news", "sport"]
    assert "not a readable card" in listed[1]["problem"]
    monkeypatch.chdir(bank.folder.parent)
    assert run_json("list") == run_json("list", "--bank", "bank"), "the folder `bank` is the default"


def test_a_card_cannot_command_the_terminal(bank: Bank) -> None:
    menus = bank["menus"]
    evil = "[red]x[/] \x1b[2J\x07 [link=http://x]y[/link]"
    card = menus.card.model_copy(update={"tags": (evil,), "notes": evil, "licence": evil})
    bank.add("evil", Prefix(menus.tensors, card))
    for words in (("list",), ("show", "evil")):
        shown = run(*words, "--bank", str(bank.folder))
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert "[red]" in shown


def test_show_command(bank: Bank) -> None:
    shown = run("show", "menus", "--bank", str(bank.folder))
    assert "prefix_tuning" in shown
    assert "6: 480 values, 1.9 kB" in shown
    content = run_json("show", "menus", "--bank", str(bank.folder))
    assert (content["name"], content["num_values"], content["num_bytes"]) == ("menus", 480, 1920)
    assert content["tensors"]["layers.2.self.value"] == [2, 4, 10]
    assert content["card"] == bank.card("menus").model_dump(mode="json")
    break_card(bank, "menus")
    with pytest.raises(PrefixFileError, match="not a readable card"):
        run("show", "menus", "--bank", str(bank.folder))


def test_rename_command(bank: Bank) -> None:
    assert run("rename", "menus", "food", "--bank", str(bank.folder)) == "menus is now food\n"
    assert run_json("rename", "food", "menus", "--bank", str(bank.folder)) == {"renamed": "food", "to": "menus"}
    with pytest.raises(BankError, match="'news' is taken"):
        run("rename", "menus", "news", "--bank", str(bank.folder))


def test_remove_command_asks(bank: Bank) -> None:
    where = ("--bank", str(bank.folder))
    for answer in ("n\n", "\n", ""):
        with pytest.raises(CommandError, match="'menus' was not removed: nobody said yes"):
            run("remove", "menus", *where, answer=answer)
    assert "menus" in bank
    assert run("remove", "menus", *where, answer="y\n").endswith("menus is removed\n")
    assert run_json("remove", "news", "--yes", *where) == {"removed": "news"}
    assert list(bank) == ["sport"]
    with pytest.raises(BankError, match="no prefix 'news' in the bank"):
        run("remove", "news", *where, answer="y\n")


def test_verify_command(bank: Bank) -> None:
    where = ("--bank", str(bank.folder))
    assert run("verify", *where) == "3 of 3 prefixes are good\n"
    break_card(bank, "news")
    assert run("verify", *where, code=1).splitlines()[-1] == "2 of 3 prefixes are good"
    assert run("verify", "menus", "sport", *where) == "2 of 2 prefixes are good\n"
    assert [c["name"] for c in run_json("verify", *where, code=1) if c["problem"]] == ["news"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_verify_and_import_commands_with_a_base(bank: Bank, tmp_path: Path) -> None:
    base, where = tiny_base("llama"), ("--bank", str(bank.folder))
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "peft")
    words = ("import", str(tmp_path / "peft"))
    named = ("--base", str(tmp_path / "base"))
    assert run(*words, "a", *named, *where).splitlines()[-1] == f"a is in {bank.folder / 'a'}, positions in_place"
    assert run_json(*words, "b", *named, *where, "--positions", "shifted") == {
        "imported": "b", "folder": str(bank.folder / "b"), "positions": "shifted",
    }  # fmt: skip
    assert run("verify", *named, *where) == "5 of 5 prefixes are good\n"
    with pytest.raises(BankError, match="'a' is taken"):
        run(*words, "a", *named, *where)
    said = usage_error(*words, "c", *named, *where, "--positions", "sideways")
    assert "'sideways' is not one of 'in_place', 'shifted'" in said
    with pytest.raises(BankError, match="cannot be a prefix's name"):
        run(*words, "../c", *named, *where)
