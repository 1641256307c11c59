"""A quantised base: close to what it was made from, the same base to a prefix, trained over like any other."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_base, tiny_batch, tiny_method
from torch import nn

import antefix
from antefix import base as base_module
from antefix.attach import attached
from antefix.base import Base, load_base
from antefix.errors import BaseModelError, PrefixError


def kept(name: str, folder: Path) -> str:
    made = tiny_base(name)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return kept("llama", tmp_path / "base")


@pytest.fixture
def int8(folder: str) -> Base:
    return load_base(folder, dtype="int8")


def test_linear_layers_are_quantised_and_the_head_is_not(int8: Base, folder: str) -> None:
    head = int8.model.get_output_embeddings()
    layers = [m for m in int8.model.modules() if isinstance(m, nn.Linear) and m is not head]
    assert len(layers) == 3 * 7
    for layer in layers:
        assert layer.weight.qdata.dtype == torch.int8
        assert not layer.weight.requires_grad
    assert type(head.weight) is nn.Parameter


def test_it_is_close_to_what_it_was_made_from(int8: Base, folder: str) -> None:
    whole = load_base(folder, dtype="native")
    assert int8.model.dtype == whole.model.dtype
    batch = tiny_batch("llama")
    with torch.no_grad():
        ours, theirs = (base.model(**batch).logits.float() for base in (int8, whole))
    error = (ours - theirs).norm() / theirs.norm()
    assert 1e-4 < error < 0.05


def test_a_prefix_is_trained_over_it_and_fits_the_base_it_was_made_from(int8: Base, folder: str) -> None:
    examples = [antefix.Example(source=f"name : N{n}", targets=(f"This is N{n}.", f"N{n} it is.")) for n in range(12)]
    before = int8.model.model.layers[0].mlp.up_proj.weight.qdata.clone()
    training = antefix.TrainingRecipe(max_steps=12, pairs_per_step=8, evaluations=3)
    prefix = antefix.train(int8, examples, training=training, num_virtual_tokens=4)
    losses = [scores["dev_loss"] for scores in prefix.card.scores["dev"]]
    assert losses[-1] < losses[0]
    assert prefix.card.training["dtype"] == int8.precision == "int8"
    torch.testing.assert_close(int8.model.model.layers[0].mlp.up_proj.weight.qdata, before, rtol=0, atol=0)
    whole = load_base(folder)
    assert whole.fingerprint == int8.fingerprint == prefix.card.base.fingerprint
    with attached(whole.model, prefix):
        assert antefix.generate(whole, examples[:1])


def test_it_is_searched_over_without_gradients(int8: Base) -> None:
    examples = [antefix.Example(source=s, targets=(t,)) for s, t in (("a cat", "pet"), ("an elk", "wild"))]
    training = antefix.TrainingRecipe(evaluations=1, black_box={"candidates": 30, "population": 5})
    prefix = antefix.train(
        int8, examples, dev=examples, method="bbt_v2", task="classification", words={"pet": "x", "wild": "y"},
        training=training, num_virtual_tokens=2, dimensions=3,
    )  # fmt: skip
    assert prefix.card.training["steps"] == 6
    with attached(int8.model, prefix):
        assert set(antefix.label(int8, examples)) <= {"pet", "wild"}


def test_every_slot_gets_the_gradient_of_the_base_it_was_made_from(int8: Base, folder: str) -> None:
    whole = load_base(folder, dtype="native")
    found = []
    for base in (int8, whole):
        module = tiny_method(base)
        with attached(base.model, module):
            base.model(**tiny_batch("llama")).logits.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.98


def test_a_copy_is_quantised_too(int8: Base) -> None:
    again = Base(copy.deepcopy(int8.model), int8.tokenizer, "copy")
    assert (again.precision, again.fingerprint) == ("int8", int8.fingerprint)


def test_a_base_without_such_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="dtype 'int8': GPT2LMHeadModel has no linear layers to quantise"):
        load_base(kept("gpt2", tmp_path / "gpt2"), dtype="int8")


def test_without_torchao_the_extra_is_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(BaseModelError, match=r"dtype 'int8' needs torchao: pip install 'antefix\[int8\]'"):
        load_base(folder, dtype="int8")


@pytest.mark.parametrize("method", ["full", "top_layers"])
def test_its_own_weights_are_not_trained(folder: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where `native`, which is all but these weights, is float32."""
    monkeypatch.setattr(base_module, "native_precision", lambda device: "float32")
    with pytest.raises(PrefixError, match="are trained, in float32, and it was loaded in int8: set dtype = 'float32'"):
        tiny_method(load_base(folder, dtype="int8"), method)
