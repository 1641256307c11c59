"""A bank in one file: what comes out is what went in, and a hostile archive changes nothing."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_bank import run, run_json
from test_prefix_file import tiny_prefix

from antefix.bank import Bank
from antefix.bank import archive as archive_module
from antefix.bank.archive import pack, unpack
from antefix.errors import BankError, PrefixFileError
from antefix.prefix import Prefix

LONG = "a" + "b" * 99


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    made, model = Bank(tmp_path_factory.mktemp("made") / "bank"), tiny_model("llama")
    for slots, name in ((4, "menus"), (3, "sport.v2"), (2, LONG)):
        made.add(name, tiny_prefix(model, slots, notes=f"of {name}"))
    return made


@pytest.fixture
def other(tmp_path: Path) -> Bank:
    return Bank(tmp_path / "other")


def test_there_and_back(bank: Bank, other: Bank, tmp_path: Path) -> None:
    path = tmp_path / "all.tar"
    assert pack(bank, path) == list(bank)
    assert unpack(path, other) == (list(bank), [])
    assert list(other) == list(bank)
    for name in bank:
        for file in ("card.json", "prefix.safetensors"):
            assert (other.folder / name / file).read_bytes() == (bank.folder / name / file).read_bytes()
    assert [p.name for p in other.folder.iterdir() if p.name.startswith(".")] == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    pack(other, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == path.read_bytes(), "equal prefixes make equal archives"


def test_tar_reads_it_and_writes_it(bank: Bank, other: Bank, tmp_path: Path) -> None:
    pack(bank, tmp_path / "some.tar", ["sport.v2", LONG])
    (tmp_path / "by_tar").mkdir()
    subprocess.run(["tar", "xf", tmp_path / "some.tar", "-C", tmp_path / "by_tar"], check=True)
    assert sorted(Bank(tmp_path / "by_tar")) == sorted(["sport.v2", LONG])
    files = ["menus/card.json", "menus/prefix.safetensors"]
    subprocess.run(["tar", "--format=ustar", "-cf", tmp_path / "b.tar", "-C", bank.folder, *files], check=True)
    assert unpack(tmp_path / "b.tar", other) == (["menus"], [])


def test_taken_names_are_told_and_nothing_is_changed(bank: Bank, other: Bank, tmp_path: Path) -> None:
    path = tmp_path / "all.tar"
    pack(bank, path)
    other.add("menus", bank["sport.v2"])
    with pytest.raises(BankError, match=r"'menus' is taken in the bank '.*': rename or remove what is there, or skip"):
        unpack(path, other)
    assert list(other) == ["menus"]
    came, taken = unpack(path, other, skip_taken=True)
    assert (sorted(came), taken) == (sorted([LONG, "sport.v2"]), ["menus"])
    assert other["menus"].card.notes == "of sport.v2"
    assert unpack(path, other, skip_taken=True) == ([], list(bank))


def test_a_name_taken_meanwhile_takes_all_back(
    bank: Bank, other: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(bank, tmp_path / "all.tar")
    monkeypatch.setattr(archive_module.os, "sync", lambda: bank["menus"].save(other.folder / "sport.v2"))
    with pytest.raises(BankError, match=r"'sport.v2' is taken"):
        unpack(tmp_path / "all.tar", other)
    assert list(other) == ["sport.v2"]
    assert other["sport.v2"].card.notes == "of menus"


def member(name: str, content: bytes = b"{}", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


HOSTILE: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "up": ([member("../card.json")], r"'../card.json' is not NAME/card.json"),
    "further up": ([member("menus/../../card.json")], "is not NAME/card.json"),
    "absolute": ([member("/menus/card.json")], "is not NAME/card.json"),
    "no folder": ([member("card.json")], "is not NAME/card.json"),
    "hidden": ([member(".index/card.json")], "is not NAME/card.json"),
    "another file": ([member("menus/run.py")], r"'menus/run.py' is not NAME/card.json"),
    "a link": ([member("menus/card.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "is no regular file"),
    "a hard link": ([member("menus/card.json", b"", type=tarfile.LNKTYPE, linkname="x")], "is no regular file"),
    "a pipe": ([member("menus/card.json", b"", type=tarfile.FIFOTYPE)], "is no regular file"),
    "a folder": ([member("menus", b"", type=tarfile.DIRTYPE)], "is no regular file"),
    "a long name of GNU": ([member("x" * 300 + "/card.json")], "is no regular file"),
    "a large card": ([member("menus/card.json", bytes((1 << 20) + 1))], "has 1,048,577 bytes, allowed are 1,048,576"),
    "twice": ([member("menus/card.json"), member("menus/card.json")], "holds 'menus/card.json' twice"),
    "half": ([member("menus/card.json")], "'menus' has no prefix.safetensors"),
    "nothing": ([], "holds no prefix"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive(kind: str, other: Bank, tmp_path: Path) -> None:
    members, message = HOSTILE[kind]
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BankError, match=message) as refusal:
        unpack(tmp_path / "bad.tar", other)
    assert str(refusal.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before


def claims(content: bytes) -> bytes:
    """The first member says that it has 8 GiB less one byte."""
    header = bytearray(content[:512])
    header[124:136] = b"77777777777\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    return bytes(header) + content[512:]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "cut off; fetch it again"),
    "no tar": (lambda c: b"hello" * 1000, "no archive of `antefix bank pack`"),
    "gzip": (lambda c: b"\x1f\x8b" + bytes(1000), r"\(compressed ones are not read\)"),
    "cut in a header": (lambda c: c[:700], "cut off"),
    "cut in a file": (lambda c: c[:2600], "cut off within 'menus/"),
    "cut at the end": (lambda c: c[: c.rindex(b"sport.v2/prefix") + 512 + 2048], "cut off"),
    "a claim": (claims, "has 8,589,934,591 bytes, allowed are 1,048,576"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_archive(kind: str, bank: Bank, other: Bank, tmp_path: Path) -> None:
    change, message = BROKEN[kind]
    pack(bank, tmp_path / "a.tar", ["menus", "sport.v2"])
    (tmp_path / "a.tar").write_bytes(change((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(BankError, match=message):
        unpack(tmp_path / "a.tar", other)
    assert not other.folder.exists()


def test_a_broken_prefix_keeps_all_out(bank: Bank, other: Bank, tmp_path: Path) -> None:
    pack(bank, tmp_path / "a.tar", ["menus", "sport.v2"])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[content.rindex(b"sport.v2/prefix") + 512 + 1500] ^= 1  # one bit of one value
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(PrefixFileError, match=r"a.tar: sport.v2/prefix.safetensors: not the bytes that were kept"):
        unpack(tmp_path / "a.tar", other)
    assert list(other.folder.iterdir()) == []


def test_what_cannot_be_packed(bank: Bank, other: Bank, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with pytest.raises(BankError, match="no prefix 'gone' in the bank"):
        pack(bank, path, ["menus", "gone"])
    shutil.copytree(bank.folder, other.folder)
    tensors = other.folder / "menus" / "prefix.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(PrefixFileError, match="not the bytes that were kept"):
        pack(other, path)
    assert list(tmp_path.glob("*.tar*")) == [] == [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    path.touch()
    with pytest.raises(BankError, match="exists: give the archive another name"):
        pack(bank, path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BankError, match="has no prefix to pack"):
        pack(Bank(tmp_path / "empty"), tmp_path / "b.tar")


def test_the_commands(bank: Bank, other: Bank, tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar")
    assert run_json("pack", path, "menus", "--bank", str(bank.folder)) == {"archive": path, "packed": ["menus"]}
    assert run_json("unpack", path, "--bank", str(other.folder)) == {"unpacked": ["menus"], "taken": []}
    with pytest.raises(BankError, match="'menus' is taken"):
        run("unpack", path, "--bank", str(other.folder))
    said = run("unpack", path, "--skip-taken", "--bank", str(other.folder))
    assert said == f"0 prefixes are in {other.folder}, 1 names were taken\n"
    assert torch.equal(
        other["menus"].tensors["layers.0.self.key"], Prefix.load(bank.folder / "menus").tensors["layers.0.self.key"]
    )
    assert os.listdir(other.folder) == ["menus"]
