"""A prefix that was broken, forged or made to harm gives one line of error, at no cost, and runs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save
from test_prefix_file import tiny_prefix

from antefix.errors import PrefixError, PrefixFileError
from antefix.prefix import MOST_CARD_BYTES, Prefix
from antefix.strict_json import MOST_DEPTH
from antefix.tensor_file import MOST_BYTES, MOST_HEADER_BYTES, MOST_TENSORS

MOST_SECONDS = 2.0
MOST_NEW_BYTES = 64 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_prefix(tiny_model("llama"), notes="good", tags=("x",), scores={"bleu": 1.5}).save(tmp_path / "p")


def refusal(folder: Path, error: type[PrefixError] = PrefixFileError) -> str:
    """The one line that reading this prefix gives. Time and memory are watched."""
    start, before = time.process_time(), resident_bytes()
    with pytest.raises(error) as refused:
        Prefix.load(folder)
    assert time.process_time() - start < MOST_SECONDS
    assert resident_bytes() - before < MOST_NEW_BYTES
    message = str(refused.value)
    assert message.isprintable(), "one line, nothing that a terminal obeys"
    assert len(message) < 500 + 2 * len(str(folder))
    return message


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def put_tensors(folder: Path, content: bytes) -> None:
    """A tensor file with a card that vouches for it, as a forger would make it."""
    (folder / "prefix.safetensors").write_bytes(content)
    put_card(folder, tensors_sha256=hashlib.sha256(content).hexdigest())


def put_card(folder: Path, **changes: Any) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def raw(header: Any, data: bytes = b"", *, claimed: int | None = None) -> bytes:
    """A safetensors file around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def tensor(shape: list[int], start: int = 0, end: int | None = None, dtype: str = "F32") -> dict[str, Any]:
    num_bytes = 4 * int(torch.tensor(shape).prod()) if end is None else end - start
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + num_bytes]}


# ---- mutations by chance, seeded


def mutated(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(6)
    at = draw.randrange(len(content))
    if kind == 0:  # a flipped bit
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    if kind == 1:  # cut off
        return content[:at]
    if kind == 2:  # a piece twice
        end = min(len(content), at + draw.randrange(1, 40))
        return content[:end] + content[at:]
    if kind == 3:  # a piece missing
        return content[:at] + content[at + draw.randrange(1, 40) :]
    if kind == 4:  # random bytes
        return content[:at] + draw.randbytes(draw.randrange(1, 16)) + content[at + 8 :]
    return content + draw.randbytes(draw.randrange(1, 64))  # something behind


def test_a_mutated_tensor_file_is_always_refused(folder: Path) -> None:
    path = folder / "prefix.safetensors"
    content = path.read_bytes()
    for seed in range(300):
        changed = mutated(content, random.Random(seed))
        path.write_bytes(changed)
        if changed != content:
            assert "prefix.safetensors" in refusal(folder)


def test_a_mutated_tensor_file_that_its_card_vouches_for_never_crashes(folder: Path) -> None:
    model, content = tiny_model("llama"), (folder / "prefix.safetensors").read_bytes()
    messages: list[str] = []
    outcomes = {"refused": 0, "refused by the base": 0, "read": 0}
    for seed in range(400):
        draw = random.Random(seed)
        changed = mutated(content, draw)
        if seed % 2:  # most of the file are values: half of the mutations go to the header
            header = struct.unpack("<Q", content[:8])[0]
            changed = mutated(content[: 8 + header], draw) + content[8 + header :]
        put_tensors(folder, changed)
        try:
            loaded = Prefix.load(folder)
        except PrefixFileError as error:
            outcomes["refused"] += 1
            messages.append(str(error))
            continue
        assert all(bool(torch.isfinite(t).all()) for t in loaded.tensors.values())
        try:
            loaded.module(model)
            outcomes["read"] += 1
        except PrefixError as error:
            outcomes["refused by the base"] += 1
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    assert min(outcomes.values()) > 0, outcomes


def test_a_mutated_card_is_refused_or_read_but_never_crashes(folder: Path) -> None:
    path = folder / "card.json"
    content, model = path.read_bytes(), tiny_model("llama")
    messages: list[str] = []
    outcomes = {"refused": 0, "read": 0}
    for seed in range(600):
        path.write_bytes(mutated(content, random.Random(seed)))
        try:
            Prefix.load(folder).module(model)
            outcomes["read"] += 1  # a changed letter of a note is still a note
        except PrefixError as error:
            outcomes["refused"] += 1
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    assert outcomes["refused"] > 300, outcomes


# ---- the tensor file, on purpose


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not a readable safetensors file", id="empty"),
        pytest.param(b"\x00" * 8, "not a readable safetensors file", id="no header"),
        pytest.param(raw({}, claimed=HUGE), "its header claims 4,611,686,018,427,387,904 bytes", id="header lies"),
        pytest.param(raw({}, claimed=MOST_HEADER_BYTES), "not a readable safetensors file", id="header too long"),
        pytest.param(raw(b"not json"), "not a readable safetensors file", id="header no json"),
        pytest.param(raw(b"\xff\xfe{}"), "not a readable safetensors file", id="header no text"),
        pytest.param(raw(b"[" * 200_000), "nested more than 32 deep", id="header deeply nested"),
        pytest.param(raw({}), "0 tensors, allowed are 1 to 20,000", id="no tensor"),
        pytest.param(raw({"a": tensor([HUGE, 4], 0, 16)}, b"\x00" * 16), "not a readable", id="huge shape"),
        pytest.param(raw({"a": tensor([HUGE, HUGE, HUGE], 0, 16)}, b"\x00" * 16), "not a readable", id="overflow"),
        pytest.param(raw({"a": tensor([-1, 4], 0, 16)}, b"\x00" * 16), "not a readable", id="negative shape"),
        pytest.param(raw({"a": tensor([4], 0, HUGE)}, b"\x00" * 16), "not a readable", id="offsets outside"),
        pytest.param(raw({"a": tensor([4], 16, 0)}, b"\x00" * 16), "not a readable", id="offsets backwards"),
        pytest.param(
            raw({"a": tensor([4]), "b": tensor([4])}, b"\x00" * 16), "not a readable safetensors file", id="overlap"
        ),
        pytest.param(raw({"a": tensor([4])}, b"\x00" * 99), "not a readable safetensors file", id="bytes behind"),
        pytest.param(
            raw(b'{"a":%b,"a":%b}' % ((json.dumps(tensor([4])).encode(),) * 2), b"\x00" * 16),
            "not a readable safetensors file (a key occurs twice)",
            id="a name twice",
        ),
        pytest.param(
            raw({"a": tensor([0, HUGE], 0, 0)}), "tensor 'a' has shape (0, 4611686018427387904)", id="no value"
        ),
        pytest.param(raw({"a": tensor([1] * 5000, 0, 4)}, b"\x00" * 4), "tensor 'a' has shape (1, 1, 1,", id="axes"),
        pytest.param(raw({"a": tensor([2], 0, 16, "I64")}, b"\x00" * 16), "'a' is I64, allowed", id="int64"),
        pytest.param(raw({"a": tensor([2], 0, 2, "BOOL")}, b"\x02" * 2), "'a' is BOOL, allowed", id="bool"),
        pytest.param(raw({"a": tensor([2], 0, 16, "F64")}, b"\x00" * 16), "'a' is F64, allowed", id="float64"),
        pytest.param(raw({"a": ["F32", [4], [0, 16]]}, b"\x00" * 16), "not a readable", id="a list for a tensor"),
        pytest.param(raw({"a": tensor([2], 0, 16, "Q77")}, b"\x00" * 16), "not a readable", id="unknown type"),
        pytest.param(
            raw({"../../etc/passwd": tensor([4])}, b"\x00" * 16),
            "tensor name '../../etc/passwd' is not allowed",
            id="a path for a name",
        ),
        pytest.param(
            raw({"a\n\x1b[2J": tensor([4])}, b"\x00" * 16), "tensor name 'a ?[2J' is not allowed", id="terminal codes"
        ),
        pytest.param(raw({"ä": tensor([4])}, b"\x00" * 16), "tensor name 'ä' is not allowed", id="no ascii"),
        pytest.param(raw({"a" * 99_999: tensor([4])}, b"\x00" * 16), "aaaaa...' is not allowed", id="endless name"),
        pytest.param(
            raw({f"t{i}": tensor([1], 4 * i, 4 * i + 4) for i in range(20_001)}, b"\x00" * 80_004),
            "20,001 tensors, allowed are 1 to 20,000",
            id="too many",
        ),
        pytest.param(pickle.dumps({"a": [1.0]}), "prefix.safetensors: ", id="pickle"),
        pytest.param(b"GGUF" + b"\x03" + b"\x00" * 99, "prefix.safetensors: ", id="gguf"),
        pytest.param(b"PK\x03\x04" + b"\x00" * 99, "prefix.safetensors: ", id="zip"),
    ],
)
def test_a_forged_tensor_file(folder: Path, content: bytes, message: str) -> None:
    put_tensors(folder, content)
    assert message in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(folder: Path, value: float, dtype: torch.dtype) -> None:
    good = torch.ones(2, 4, 10, dtype=dtype)
    bad = good.clone()
    bad[1, 2, 3] = value
    put_tensors(folder, save({"layers.0.self.key": good, "layers.0.self.value": bad}))
    assert "tensor 'layers.0.self.value' holds NaN or infinity" in refusal(folder)


def test_too_large_a_tensor_file_is_not_even_opened(folder: Path) -> None:
    with (folder / "prefix.safetensors").open("r+b") as file:
        file.truncate(MOST_BYTES + 1)  # a hole: it takes no room on the disk
    assert "8,589,934,593 bytes, more than the 8,589,934,592 a prefix may have" in refusal(folder)


def test_a_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    put_tensors(folder, pickle.dumps(Harm()))
    put_card(folder, notes=pickle.dumps(Harm(), protocol=0).decode("latin-1"))
    refusal(folder)
    assert not (tmp_path / "harm").exists()


def test_tensors_of_another_prefix(folder: Path, tmp_path: Path) -> None:
    other = tiny_prefix(tiny_model("llama"), num_slots=2).save(tmp_path / "other")
    (folder / "prefix.safetensors").write_bytes((other / "prefix.safetensors").read_bytes())
    assert "not the bytes that were kept (tensors_sha256 in card.json); fetch it again" in refusal(folder)


# ---- the card, on purpose


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this Antefix reads up to 1: upgrade it"),
        ({"format_version": 10**30}, "this Antefix reads up to 1: upgrade it"),
        ({"format_version": 0}, "format_version: Input should be 1"),
        ({"format_version": "1"}, "format_version: missing, or no whole number"),
        ({"format_version": True}, "format_version: missing, or no whole number"),
        ({"format_version": 1.0}, "format_version: missing, or no whole number"),
        ({"tensors_sha256": None}, "tensors_sha256: missing, or no text"),
        ({"tensors_sha256": "0" * 64}, "not the bytes that were kept"),
        ({"method": "os.system"}, "unknown method 'os.system': Known: "),
        ({"method": "prefix_tunin"}, "unknown method 'prefix_tunin': did you mean 'prefix_tuning'?"),
        ({"method": "x\n" * 9999}, "unknown method 'x x x"),
        ({"method": ["prefix_tuning"]}, "method: Input should be a valid string"),
        ({"config": {"layers": 3}}, "layers: Extra inputs are not permitted"),
        ({"config": {"num_virtual_tokens": -1}}, "num_virtual_tokens: Input should be greater than or equal to 1"),
        ({"config": {"num_virtual_tokens": 10**400}}, "not a readable card"),
        ({"config": []}, "config: Input should be a valid dictionary"),
        ({"positions": "shifted"}, "positions: the card says shifted, its config in_place"),
        ({"positions": "elsewhere"}, "positions: Input should be 'in_place' or 'shifted'"),
        ({"base": {"name": "x"}}, "base.fingerprint: Field required"),
        ({"text_format": {"linearise": "os.system"}}, "unknown linearisation 'os.system'"),
        ({"text_format": {"separator": 5}}, "text format: 'separator'"),
        ({"tags": "a"}, "tags: Input should be a valid tuple"),
        ({"a key \x1b[2J of a later version": 1}, "a key ?[2J of a later version: Extra inputs are not permitted"),
        ({"k" * 9999: 1}, "kkk..."),
        ({"notes": "\ud800"}, "not a readable card"),
        ({"scores": {"bleu": float("nan")}}, "NaN is no JSON"),
        ({"scores": {"bleu": float("-inf")}}, "-Infinity is no JSON"),
        ({"notes": "x" * MOST_CARD_BYTES}, "more than 1,048,576 bytes"),
    ],
)
def test_a_forged_card(folder: Path, changes: dict[str, Any], message: str) -> None:
    put_card(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize("missing", ["format_version", "tensors_sha256", "method", "config", "positions", "base"])
def test_a_key_that_is_missing(folder: Path, missing: str) -> None:
    path = folder / "card.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content[missing]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert f"{missing}: " in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable card"),
        (b"null", "no JSON object"),
        (b"[1]", "no JSON object"),
        (b"{", "not a readable card"),
        (b"\xff\xfe\x00", "not a readable card"),
        (b"{}" * 2, "not a readable card"),
        (b"[" * 100_000, "nested more than 32 deep"),
        (b'{"a":' * 100_000, "nested more than 32 deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 deep"),
        (b'{"format_version": 1, "format_version": 1}', "a key occurs twice"),
        (b'{"format_version": 1, "config": {"a": 1, "a": 2}}', "a key occurs twice"),
        (b'{"format_version": ' + b"9" * 10_000 + b"}", "not a readable card"),
        (b'{"format_version": 1e999}', "format_version: missing, or no whole number"),
    ],
)
def test_a_card_that_is_no_card(folder: Path, content: bytes, message: str) -> None:
    (folder / "card.json").write_bytes(content)
    assert message in refusal(folder)


# ---- what stands in place of the files


@pytest.mark.parametrize("name", ["card.json", "prefix.safetensors"])
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe", "device", "link to nothing", "link to itself"])
def test_something_else_in_place_of_a_file(folder: Path, name: str, instead: str) -> None:
    path = folder / name
    path.unlink()
    if instead == "folder":
        path.mkdir()
    elif instead == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    elif instead == "device":
        path.symlink_to("/dev/zero")  # reading it would never end
    elif instead == "link to nothing":
        path.symlink_to(folder / "gone")
    elif instead == "link to itself":
        path.symlink_to(path)
    assert f"{path}: no such file" in refusal(folder)


def test_a_link_to_a_good_file_is_read(folder: Path, tmp_path: Path) -> None:
    for name in ("card.json", "prefix.safetensors"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert Prefix.load(folder).card.notes == "good"


def test_a_link_to_a_foreign_file_does_not_show_it(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:hunter2")
    (folder / "card.json").unlink()
    (folder / "card.json").symlink_to(secret)
    assert "hunter2" not in refusal(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert "no such file; a prefix is a folder with prefix.safetensors and card.json" in refusal(tmp_path / "gone")
    (tmp_path / "file").touch()
    refusal(tmp_path / "file")


def test_the_page_of_the_format_names_these_limits() -> None:
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    for limit in (MOST_BYTES, MOST_HEADER_BYTES, MOST_TENSORS, MOST_CARD_BYTES):
        assert f"{limit:,}" in page
    assert page.count(f"at most {MOST_DEPTH} levels") == 2
