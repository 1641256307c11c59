"""A kept prefix says after loading what it said before saving; keeping is all or nothing."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from antefix.attach import attached
from antefix.errors import PrefixError, PrefixFileError, WrongBaseError
from antefix.fingerprint import fingerprint
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.initial import random_slots
from antefix.parts.key_value import DirectSlots
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.sites import find_sites
from antefix.tensor_file import read_tensors

DATA = Path(__file__).parent / "data"
IDS = torch.arange(3, 15).reshape(2, 6)


def logits(model: PreTrainedModel, *prefixes: Any) -> Tensor:
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        if not prefixes:
            return model(**inputs).logits
        with attached(model, *prefixes):
            return model(**inputs).logits


def card_for(model: PreTrainedModel, config: PrefixTuningConfig, **more: Any) -> Card:
    return Card(
        method="prefix_tuning", config=config.model_dump(mode="json"), positions=config.positions,
        base=BaseRecord(name="tiny", fingerprint=fingerprint(model)), **more,
    )  # fmt: skip


def tiny_prefix(model: PreTrainedModel, num_slots: int = 4, **more: Any) -> Prefix:
    config = PrefixTuningConfig.model_validate({"num_virtual_tokens": num_slots})
    torch.manual_seed(0)
    sites = find_sites(model).attention
    module = PrefixTuning(config, DirectSlots(sites, random_slots(sites, num_slots, "normal", 1.0)), None)
    return Prefix(module.kept_tensors(), card_for(model, config, **more))


@pytest.mark.parametrize("parametrisation", ["direct", "network", "linear"])
def test_folded_saved_and_loaded_is_bit_equal_to_the_trained_module(
    architecture: str, parametrisation: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    sites = find_sites(model)
    config = PrefixTuningConfig.model_validate(
        {"num_virtual_tokens": 4, "parametrisation": parametrisation, "hidden_width": 20, "dropout": 0.5}
    )
    torch.manual_seed(0)
    if parametrisation == "direct":
        slots: Any = DirectSlots(sites.attention, random_slots(sites.attention, 4, "normal", 1.0))
    else:
        slots = PrefixTuning.network(sites, config, 4)
    module = PrefixTuning(config, slots, None).eval()
    unfolded = logits(model, module)
    assert not torch.equal(unfolded, logits(model)), "the prefix says nothing, so the test would say nothing"
    prefix = Prefix(module.kept_tensors(), card_for(model, config))
    prefix.save(tmp_path / "kept")
    loaded = Prefix.load(tmp_path / "kept")
    assert torch.equal(logits(model, prefix), unfolded)
    assert torch.equal(logits(model, loaded), unfolded)
    assert loaded.card == prefix.card


def test_what_stands_in_the_folder(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prefix = tiny_prefix(model, notes="Grüße\n🙂", tags=("a", "b"), scores={"dev": [{"bleu": 1.5}]})
    assert prefix.save(tmp_path / "bank" / "menus") == tmp_path / "bank" / "menus"
    folder = tmp_path / "bank" / "menus"
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "prefix.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["menus"], "no scratch is left"
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert list(card)[:3] == ["format_version", "tensors_sha256", "method"]
    assert card["tensors_sha256"] == hashlib.sha256((folder / "prefix.safetensors").read_bytes()).hexdigest()
    assert card["notes"] == "Grüße\n🙂"
    tensors = load_file(folder / "prefix.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"layers.{layer}.self.{part}": (2, 4, 10) for layer in range(3) for part in ("key", "value")
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").touch()
    for made, usual in ((folder, plain), (folder / "card.json", plain / "file")):
        assert made.stat().st_mode == usual.stat().st_mode, "readable for whoever may read any other file"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    prefix = tiny_prefix(tiny_model("llama"))
    half = Prefix({name: t.to(dtype) for name, t in prefix.tensors.items()}, prefix.card)
    half.save(tmp_path / "half")
    loaded = Prefix.load(tmp_path / "half")
    assert all(t.dtype == dtype and torch.equal(t, half.tensors[n]) for n, t in loaded.tensors.items())
    assert loaded.num_bytes * 2 == prefix.num_bytes
    assert loaded.num_values == prefix.num_values


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prefix.safetensors"
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(5).to(torch.float16)}
    content = save(tensors)
    num_bytes = int.from_bytes(content[:8], "little")
    for more in range(4):
        header = content[8 : 8 + num_bytes] + b" " * more
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + num_bytes :])
        assert all(torch.equal(t, tensors[name]) for name, t in read_tensors(path).items())


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "prefix.safetensors"
    save_file({f"t{n}": torch.randn(300, 3) for n in range(100)}, path)

    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    read_tensors(path)
    before = blocks()
    for _ in range(20):
        read_tensors(path)
    assert blocks() - before < 20 * 100 / 2, "a server reads prefixes for months"


def test_a_loaded_prefix_can_be_saved_again(tmp_path: Path) -> None:
    tiny_prefix(tiny_model("llama")).save(tmp_path / "first")
    Prefix.load(tmp_path / "first").save(tmp_path / "second")
    for name in ("card.json", "prefix.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_scores_that_are_no_numbers_are_kept_as_null(tmp_path: Path) -> None:
    tiny_prefix(tiny_model("llama"), scores={"dev_loss": float("nan")}).save(tmp_path / "p")
    assert Prefix.load(tmp_path / "p").card.scores == {"dev_loss": None}


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    model = tiny_model("llama")
    old, new = tiny_prefix(model, notes="old"), tiny_prefix(model, notes="new", num_slots=2)
    old.save(tmp_path / "p")
    with pytest.raises(PrefixFileError, match="p exists: choose another name, or say overwrite"):
        new.save(tmp_path / "p")
    assert Prefix.load(tmp_path / "p").card.notes == "old"
    new.save(tmp_path / "p", overwrite=True)
    assert Prefix.load(tmp_path / "p").card.notes == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["p"], "no scratch is left"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PrefixFileError, match="exists"):
        new.save(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(PrefixFileError, match="exists"):
        new.save(tmp_path / "link")
    with pytest.raises(PrefixFileError, match="could not be saved"):
        new.save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two folders cannot change places in one step")
def test_whoever_reads_while_it_is_overwritten_finds_the_old_or_the_new(tmp_path: Path) -> None:
    model, path, done = tiny_model("llama"), tmp_path / "p", threading.Event()
    old, new = tiny_prefix(model, notes="old"), tiny_prefix(model, notes="new")
    old.save(path)
    missed = []

    def watch() -> None:
        while not done.is_set():
            if not (path / "card.json").exists():
                missed.append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(60):
        new.save(path, overwrite=True)
        old.save(path, overwrite=True)
    done.set()
    watcher.join()
    assert missed == []


@contextlib.contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """The system itself refuses to write more, as it does on a full disk."""
    resource = pytest.importorskip("resource", reason="limits on file sizes are POSIX's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", ["none", "some of the tensors", "the tensors, not the card"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_full_disk_leaves_what_was_there(room: str, overwrite: bool, tmp_path: Path) -> None:
    prefix = tiny_prefix(tiny_model("llama"), notes="old " * 2000)
    prefix.save(tmp_path / "p")
    before = {p.name: p.read_bytes() for p in (tmp_path / "p").iterdir()}
    assert len(before["prefix.safetensors"]) < 4000 < len(before["card.json"])
    num_bytes = {"none": 0, "some of the tensors": 1000, "the tensors, not the card": 4000}[room]
    name = "p" if overwrite else "q"
    with no_file_larger_than(num_bytes), pytest.raises(PrefixFileError) as refusal:
        prefix.save(tmp_path / name, overwrite=overwrite)
    assert str(refusal.value) == f"{tmp_path / name}: could not be saved (File too large); nothing was changed"
    assert {p.name: p.read_bytes() for p in (tmp_path / "p").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["p"], "no scratch is left"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PrefixFileError, match=r"could not be saved \(Permission denied\)"):
        tiny_prefix(tiny_model("llama")).save(tmp_path / "p")


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    prefix = tiny_prefix(tiny_model("llama"))
    first = next(iter(prefix.tensors))
    for bad, message in (
        (prefix.tensors[first] * float("nan"), f"not saved, tensor '{first}' holds NaN or infinity"),
        (torch.zeros(2, 0, 10), f"not saved, tensor '{first}' has shape"),
        (torch.zeros(2, 4, 10, dtype=torch.int64), f"not saved, tensor '{first}' is torch.int64"),
    ):
        with pytest.raises(PrefixFileError, match=message):
            Prefix({**prefix.tensors, first: bad}, prefix.card).save(tmp_path / "p")
    endless = Prefix(prefix.tensors, prefix.card.model_copy(update={"notes": "x" * (1 << 20)}))
    with pytest.raises(PrefixFileError, match="not saved, its card has 1,0"):
        endless.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    prefix = tiny_prefix(model)
    with pytest.raises(WrongBaseError) as refusal:
        logits(other, prefix)
    assert str(refusal.value) == (
        f"this prefix was trained for the base 'tiny' (fingerprint {fingerprint(model)}), the model given has "
        f"fingerprint {fingerprint(other)}: load the base it was trained for"
    )
    with pytest.raises(WrongBaseError, match="load the base in float32 or bfloat16"):
        prefix.module(tiny_model("llama", dtype=torch.float16))
    prefix.module(other, check_base=False)
    with pytest.raises(PrefixError, match=r"has shape \(2, 4, 10\), this base has 6 key/value heads of width 8"):
        prefix.module(tiny_model("gpt2"), check_base=False)
    with pytest.raises(PrefixError, match=r"'layers.0.self.key' belongs to no site of this base"):
        prefix.module(tiny_model("bert"), check_base=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"layers.7.self.key": torch.zeros(2, 4, 10)}, "tensor 'layers.7.self.key' belongs to no site"),
        (lambda t: t | {"layers.0.self.query": torch.zeros(2, 4, 10)}, "tensor 'layers.0.self.query' belongs to no"),
        (lambda t: {n: v for n, v in t.items() if n != "layers.1.self.key"}, "'layers.1.self.key' is missing beside"),
        (lambda t: {n: v for n, v in t.items() if n != "layers.1.self.value"}, "'layers.1.self.value' is missing"),
        (lambda t: {n: v.transpose(0, 1) for n, v in t.items()}, r"'layers.0.self.key' has shape \(4, 2, 10\)"),
        (lambda t: {n: v.transpose(1, 2) for n, v in t.items()}, r"'layers.0.self.key' has shape \(2, 10, 4\)"),
        (lambda t: {n: v.flatten() for n, v in t.items()}, r"'layers.0.self.key' has shape \(80,\)"),
        (lambda t: t | {"layers.2.self.value": torch.zeros(2, 3, 10)}, r"'layers.2.self.value' has shape \(2, 3, 10\)"),
    ],
)
def test_tensors_that_do_not_fit_the_sites(change: Any, message: str) -> None:
    model = tiny_model("llama")
    prefix = tiny_prefix(model)
    with pytest.raises(PrefixError, match=message) as refusal:
        Prefix(change(prefix.tensors), prefix.card).module(model)
    assert "\n" not in str(refusal.value)


# ---- the kept file of format version 1


def frozen_base() -> LlamaForCausalLM:
    """A model whose weights come from a formula, so that no version of any library draws others."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=6, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2, tie_word_embeddings=False)
    )  # fmt: skip
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(torch.sin(steps * 0.7 + index).reshape(parameter.shape) * 0.4)
    return model.eval()


def test_the_first_format_is_read_forever() -> None:
    prefix, model = Prefix.load(DATA / "prefix_v1"), frozen_base()
    assert prefix.card.format_version == 1
    assert prefix.card.notes == "Format version 1, kept for ever."
    wanted = load_file(DATA / "prefix_v1_logits.safetensors")
    torch.testing.assert_close(logits(model), wanted["without"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, prefix), wanted["with"], rtol=1e-5, atol=1e-5)
    assert (wanted["with"] - wanted["without"]).abs().max() > 0.05


def test_a_card_counts_its_slots() -> None:
    card = tiny_prefix(tiny_model("llama"), 4).card
    assert card.num_virtual_tokens == 4
    both = {"prefix_tuning": {"num_virtual_tokens": 4}, "prompt_tuning": {"num_virtual_tokens": 3}, "lora": {"rank": 2}}
    union = card.model_copy(update={"method": "prefix_tuning+prompt_tuning+lora", "config": both})
    assert union.num_virtual_tokens == 7
    assert card.model_copy(update={"method": "lora", "config": {"rank": 2}}).num_virtual_tokens is None


def test_the_base_of_a_card_is_loaded_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr("antefix.prefix.load_base", lambda name, **how: asked.append((name, how["revision"])))
    record = BaseRecord(name="a/model", revision="abc", fingerprint="0")
    record.load()
    record.load("copy")
    assert asked == [("a/model", "abc"), ("copy", None)], "a revision is the named model's alone"
