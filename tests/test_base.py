"""Loading a base: what cannot be loaded is one line that says why and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_base

from antefix import embedded
from antefix.base import load_base, load_tokenizer
from antefix.errors import BaseModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny_base("llama")
    base.model.save_pretrained(tmp_path / "llama")
    base.tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refusal(name: str | Path, **options: object) -> str:
    with pytest.raises(BaseModelError) as refused:
        load_base(name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_base_is_frozen_and_at_rest(folder: Path, dtype: str) -> None:
    base = load_base(folder, dtype=dtype)  # type: ignore[arg-type]
    assert base.model.dtype == getattr(torch, dtype)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.fingerprint == tiny_base("llama").fingerprint
    assert load_base(folder, device="auto").model.device.type in ("cpu", "cuda", "mps")


def test_what_cannot_be_loaded_is_said_in_one_line(folder: Path) -> None:
    assert refusal("no/such/folder").startswith("no folder or file 'no/such/folder'")
    assert refusal("smolm2-135m") == "no base 'smolm2-135m': did you mean 'smollm2-135m'?"
    assert refusal("smollm2-135m").startswith("the embedded base 'smollm2-135m' is not here yet: run `antefix base")
    assert refusal(folder, dtype="float8").startswith("unknown dtype 'float8'")
    assert refusal(folder, device="tpu").startswith("device 'tpu' cannot be used here: ")
    assert refusal(folder, device="tpu", dtype="native").startswith("device 'tpu' cannot be used here: ")


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_broken_folder(folder: Path, broken: str, how: str) -> None:
    content = (folder / broken).read_bytes()
    (folder / broken).unlink()
    if how == "cut":
        (folder / broken).write_bytes(content[: len(content) // 2])
    assert str(folder) in refusal(folder)


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ANTEFIX_HOME", str(tmp_path / "file"))
    with pytest.raises(
        BaseModelError, match=r"cannot be written \(.*\); set ANTEFIX_HOME to a folder with 1 GB of room"
    ):
        embedded.fetch()


def test_a_tokenizer_without_its_base_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BaseModelError, match=r"cannot load the base '.*': .* \(give a folder, a .gguf file, a hub id"):
        load_tokenizer(tmp_path)
