"""Pages of a bank's list, and what they must not miss: whatever changed in the folder, by any means."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from test_bank import run, run_json, usage_error
from test_prefix_file import tiny_prefix

from antefix import atomic
from antefix.bank import Bank, Page, Query
from antefix.bank import index as index_module
from antefix.bank.entry import version_of
from antefix.bank.lineage import lineage
from antefix.errors import BankError
from antefix.prefix import Prefix

CARDS: dict[str, dict[str, Any]] = {
    "everyone": {"notes": "All inns."},
    "ledbury": {"tags": ("inn", "North"), "notes": "Menus of the Feathers", "parents": ("everyone",)},
    "ledbury.v2": {"tags": ("inn",), "parents": ("everyone", "ledbury")},
    "ledbury.v10": {"tags": ("inn",), "parents": ("ledbury.v2",), "licence": "MIT"},
    "ludlow": {"tags": ("pub", "North"), "notes": "Menus of the Crown; NIGHT run", "parents": ("everyone",)},
    "soup.v0": {"tags": ("inn", "pub"), "notes": "All [*?]"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("made") / "bank", tiny_model("llama")
    for slots, (name, card) in enumerate(CARDS.items(), 1):
        tiny_prefix(model, slots, **card).save(folder / name)
    return folder


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Bank:
    return Bank(shutil.copytree(made, tmp_path / "bank"))


def settle(bank: Bank) -> None:
    """As if nothing had happened for long, and the index knew it."""
    bank.page()
    long_ago = time.time() - 60
    os.utime(bank.folder, (long_ago, long_ago))
    bank.page()


def names(page: Page) -> list[str]:
    return [entry.name for entry in page.entries]


def edit_card(bank: Bank, name: str, **changes: Any) -> None:
    """By hand, in its place: no folder is changed by that."""
    path = bank.folder / name / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, list(CARDS)),
        ({"text": "menus"}, ["ledbury", "ludlow"]),
        ({"text": "night MENUS"}, ["ludlow"]),
        ({"text": "edbur"}, ["ledbury", "ledbury.v10", "ledbury.v2"]),
        ({"text": "100%_"}, []),
        ({"text": "l*w"}, []),
        ({"text": "[l]udlow"}, []),
        ({"text": "[*?] all"}, ["soup.v0"]),
        ({"tags": ("inn",)}, ["ledbury", "ledbury.v10", "ledbury.v2", "soup.v0"]),
        ({"tags": ("inn", "pub")}, ["soup.v0"]),
        ({"tags": ("in",)}, []),
        ({"method": "prefix_tuning", "base": "tiny", "tags": ("North",)}, ["ledbury", "ludlow"]),
        ({"method": "lora"}, []),
        ({"base": "other"}, []),
        ({"parent": "everyone"}, ["ledbury", "ledbury.v2", "ludlow"]),
        ({"stem": "ledbury"}, ["ledbury", "ledbury.v10", "ledbury.v2"]),
        ({"latest": True}, ["everyone", "ledbury.v10", "ludlow", "soup.v0"]),
        ({"broken": True}, []),
        ({"broken": False, "limit": 2, "offset": 1}, ["ledbury", "ledbury.v10"]),
        ({"sort": "slots", "descending": True, "limit": 3}, ["soup.v0", "ludlow", "ledbury.v10"]),
        ({"sort": "method", "limit": 2}, ["everyone", "ledbury"]),
        ({"offset": 6}, []),
        ({"limit": 0}, []),
    ],
    ids=str,
)
def test_a_page(bank: Bank, asked: dict[str, Any], wanted: list[str]) -> None:
    wanted = sorted(wanted) if "sort" not in asked else wanted
    for _ in range(2):  # the index is made, then read
        page = bank.page(Query(**asked))
        assert names(page) == wanted
    whole = bank.page(Query(**{**asked, "limit": None, "offset": 0}))
    assert page.total == whole.total == len(whole.entries)


def test_versions(bank: Bank) -> None:
    assert [version_of(name) for name in ("a", "a.v3", "a.v03", "a.v", ".v3", "a.v1.v2")] == [
        ("a", 0), ("a", 3), ("a.v03", 0), ("a.v", 0), (".v3", 0), ("a.v1", 2),
    ]  # fmt: skip
    assert [bank.latest(name) for name in ("ledbury", "ludlow", "soup")] == ["ledbury.v10", "ludlow", "soup.v0"]
    bank.remove("ledbury.v10")
    assert bank.latest("ledbury") == "ledbury.v2"
    with pytest.raises(BankError, match=r"no prefix 'ledbur' and no version of it \('ledbur.v1'\)"):
        bank.latest("ledbur")


def test_pages_follow_what_happens_to_the_folder(bank: Bank) -> None:
    settle(bank)
    bank["ludlow"].save(bank.folder / "clun")
    assert bank.page(Query(text="clun")).total == 1
    settle(bank)
    bank.rename("clun", "tenbury")
    assert names(bank.page(Query(parent="everyone"))) == ["ledbury", "ledbury.v2", "ludlow", "tenbury"]
    settle(bank)
    shutil.rmtree(bank.folder / "tenbury")
    assert bank.page(Query(tags=("pub",))).total == 2
    settle(bank)
    ludlow = bank["ludlow"]
    changed = Prefix(ludlow.tensors, ludlow.card.model_copy(update={"tags": ("closed",)}))
    changed.save(bank.folder / "ludlow", overwrite=True)
    assert names(bank.page(Query(tags=("closed",)))) == ["ludlow"]


def test_two_changes_within_one_tick_of_the_clock_are_both_seen(bank: Bank) -> None:
    for number in range(3):
        now = time.time_ns()
        bank["ludlow"].save(bank.folder / f"new-{number}")
        os.utime(bank.folder, ns=(now, now))
        bank.page()
        bank["ludlow"].save(bank.folder / f"newer-{number}")
        os.utime(bank.folder, ns=(now, now))  # the same time as before
        assert bank.page(Query(text=f"newer-{number}")).total == 1


def test_what_is_shown_is_what_is_on_disk(bank: Bank) -> None:
    settle(bank)
    edit_card(bank, "ludlow", tags=["edited"], licence="CC0")
    shown = {e.name: e for e in bank.page().entries}
    assert (shown["ludlow"].tags, shown["ludlow"].licence) == (("edited",), "CC0")
    settle(bank)
    edit_card(bank, "ledbury", tags=["edited"])
    assert "ledbury" not in names(bank.page(Query(tags=("North",)))), "what it shows is looked at before"
    assert names(bank.page(Query(tags=("edited",)))) == ["ledbury", "ludlow"]


def test_a_card_edited_by_hand_is_found_after_a_refresh(bank: Bank) -> None:
    settle(bank)
    edit_card(bank, "soup.v0", notes="A broth.")
    assert bank.card("soup.v0").notes == "A broth."
    bank.refresh()
    assert names(bank.page(Query(text="broth"))) == ["soup.v0"]


def test_a_copy_under_way_is_looked_at_until_it_is_whole(bank: Bank, made: Path) -> None:
    (bank.folder / "copy").mkdir()
    settle(bank)
    assert bank.page(Query(text="copy")).total == 0
    shutil.copy(made / "ludlow" / "card.json", bank.folder / "copy")
    settle(bank)
    assert bank.page(Query(text="copy")).entries[0].problem == "prefix.safetensors is missing"
    shutil.copy(made / "ludlow" / "prefix.safetensors", bank.folder / "copy")
    settle(bank)
    assert bank.page(Query(text="copy", broken=False)).total == 1


def test_a_settled_bank_is_neither_walked_nor_written(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(bank)
    before = bank.folder.stat().st_mtime_ns
    monkeypatch.setattr(index_module, "folders_in", lambda folder: pytest.fail("the folder was walked"))
    monkeypatch.setattr(index_module, "read_entry", lambda *_: pytest.fail("a card was read"))
    assert bank.page().total == len(CARDS)
    assert bank.latest("ledbury") == "ledbury.v10"
    assert bank.folder.stat().st_mtime_ns == before, "the index's own files must not make it stale"


def test_list_and_latest_commands(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    where = ("--bank", str(bank.folder))
    settle(bank)
    edit_card(bank, "soup.v0", notes="A broth.")
    assert [e["name"] for e in run_json("list", "--text", "broth", *where)] == ["soup.v0"]
    words = ("--tag", "inn", "--latest", "--sort", "slots", "--descending", "--limit", "1", *where)
    assert [e["name"] for e in run_json("list", *words)] == ["soup.v0"]
    assert len(run("list", *words).splitlines()) == 2
    said = usage_error("list", "--sort", "colour", *where)
    assert "'colour' is not one of 'name', 'changed', 'size', 'slots', 'method'" in said
    assert run("latest", "ledbury", *where) == "ledbury.v10\n"
    assert run_json("latest", "soup", *where) == {"name": "soup", "latest": "soup.v0"}


# ---- lineage


def test_lineage(bank: Bank) -> None:
    parents, children = lineage(bank, "ledbury.v2")
    assert [(r.depth, r.name) for r in parents] == [(1, "everyone"), (1, "ledbury"), (2, "everyone")]
    assert [r.is_repeated for r in parents] == [False, False, True]
    assert [(r.depth, r.name) for r in children] == [(1, "ledbury.v10")]
    assert [(r.depth, r.name) for r in lineage(bank, "everyone").children] == [
        (1, "ledbury"), (2, "ledbury.v2"), (3, "ledbury.v10"), (1, "ledbury.v2"), (1, "ludlow"),
    ]  # fmt: skip
    bank.remove("ledbury")
    assert [(r.name, r.is_there) for r in lineage(bank, "ledbury.v2").parents] == [
        ("everyone", True),
        ("ledbury", False),
    ]
    with pytest.raises(BankError, match="no prefix 'ledbury' in the bank"):
        lineage(bank, "ledbury")


def test_a_circle_of_parents_ends(bank: Bank) -> None:
    edit_card(bank, "everyone", parents=["ledbury.v10"])
    assert [(r.name, r.is_repeated) for r in lineage(bank, "everyone").parents] == [
        ("ledbury.v10", False), ("ledbury.v2", False), ("everyone", True), ("ledbury", False), ("everyone", True),
    ]  # fmt: skip


def test_lineage_command(bank: Bank) -> None:
    bank.remove("ledbury")
    shown = run("lineage", "ledbury.v2", "--bank", str(bank.folder))
    assert shown == ("made from:\n  everyone\n  ledbury  (not in the bank)\nmade from it:\n  ledbury.v10\n")
    content = run_json("lineage", "ledbury.v2", "--bank", str(bank.folder))
    assert content["children"] == [{"depth": 1, "name": "ledbury.v10", "is_there": True, "is_repeated": False}]


# ---- what interrupted writes leave behind


def test_clean_deletes_left_overs_and_nothing_else(bank: Bank, tmp_path: Path) -> None:
    bank.page()
    menus = bank.folder / "ludlow"
    old, young = bank.folder / ".ludlow-0123abcd", bank.folder / ".ludlow-0123abce"
    for path in (old, young, bank.folder / ".git", bank.folder / ".ludlow-0123abc", bank.folder / "x-0123abcd"):
        shutil.copytree(menus, path)
    outside = shutil.copytree(menus, tmp_path / "outside")
    (bank.folder / ".linked-0123abcd").symlink_to(outside)
    (bank.folder / ".file-0123abcd").write_text("half a fi")
    before = sorted(p.name for p in bank.folder.iterdir())
    assert bank.clean() == [], "all of it was made just now"
    time.sleep(0.3)
    (young / "late").write_text("somebody is at work")
    assert bank.clean(older_than_s=0.2) == [".file-0123abcd", ".linked-0123abcd", ".ludlow-0123abcd"]
    gone = {".file-0123abcd", ".linked-0123abcd", ".ludlow-0123abcd"}
    assert sorted(p.name for p in bank.folder.iterdir()) == [name for name in before if name not in gone]
    assert Prefix.load(outside).card.tags == ("pub", "North")
    with pytest.raises(BankError, match="is no bank"):
        Bank(tmp_path / "gone").clean()


def test_clean_takes_what_a_killed_write_leaves(bank: Bank) -> None:
    def interrupted() -> None:
        with atomic.new_folder(bank.folder / "new") as scratch:
            (scratch / "card.json").write_text("{")
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(atomic, "_delete", lambda path: None)  # as if the process were gone
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    (scratch,) = bank.folder.glob(".new-*")
    assert "new" not in bank
    assert run_json("clean", "--minutes", "0", "--bank", str(bank.folder)) == {"deleted": [scratch.name]}
    assert len(bank) == len(CARDS)


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(atomic, "_sync", written.append)
    with atomic.new_folder(tmp_path / "new") as scratch:
        (scratch / "file").write_bytes(b"x")
    assert written == [scratch / "file", scratch, tmp_path]
