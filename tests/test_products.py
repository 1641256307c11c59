"""Products by oneDNN are torch's, to rounding: values, gradients, and everything that is not theirs is torch's own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, is_output, tiny_base, tiny_batch, tiny_method, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from antefix.attach import attached
from antefix.base import load_base
from antefix.fingerprint import fingerprint
from antefix.products import FrozenConv1D, FrozenLinear, by_onednn, by_torch

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MIB = 1 << 20
MANY_SHAPES = """
import psutil, torch
from antefix.products import by_onednn
from antefix.server.heap import give_back
layer = torch.nn.Linear(256, 512).requires_grad_(False)
by_onednn(layer)
found = []
for num_rows in range(1, 601):
    layer(torch.ones(num_rows, 256))
    if num_rows in (200, 600):
        give_back()
        found.append(psutil.Process().memory_info().rss)
print(found[1] - found[0])
"""

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")


@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (2, 5, 24), (2, 0, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_is_torchs_in_value_and_gradient(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    if kind == "conv1d" and not bias:
        pytest.skip("transformers' Conv1D always has one")
    layer = nn.Linear(24, 40, bias=bias) if kind == "linear" else Conv1D(40, 24)
    layer.requires_grad_(False)
    x, weights = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 40)
    results = []
    for route in (by_torch, by_onednn):
        route(layer)
        out = layer(x)
        results.append((out.detach(), *torch.autograd.grad((out * weights).sum(), x)))
        with torch.no_grad():
            assert torch.equal(layer(x), out)
    assert type(layer) in (FrozenLinear, FrozenConv1D)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_derivatives_of_every_kind_are_torchs(kind: str) -> None:
    """Forward mode, functional, and of second order."""
    torch.manual_seed(0)
    layer = (nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6)).requires_grad_(False)
    x, direction = torch.randn(3, 6), torch.randn(3, 6)

    def curved(x: Tensor) -> Tensor:
        return layer(x.square()).pow(3).sum()

    found = []
    for route in (by_torch, by_onednn):
        route(layer)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(curved(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), leaf)
        forward = torch.func.jvp(curved, (x,), (direction,))[1]
        with torch.no_grad():
            without_graph = torch.func.jvp(curved, (x,), (direction,))[1]
        found.append((first, second, torch.func.grad(curved)(x), forward, without_graph))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param).requires_grad_(False)


def logits(name: str, model: PreTrainedModel) -> Tensor:
    batch = tiny_batch(name)
    return model(**batch).logits[is_output(batch)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefix_learns_the_same(name: str) -> None:
    base = tiny_base(name)
    module, found = tiny_method(base), []
    for route in (by_torch, by_onednn, by_torch):
        route(base.model)
        with attached(base.model, module):
            out = logits(name, base.model)
            found.append((out.detach(), *torch.autograd.grad(out.square().mean(), list(module.parameters()))))
    for plain, ours, again in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
        assert torch.equal(plain, again)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_trained_or_rounded_is_torchs_own(name: str) -> None:
    for changed in (tiny_model(name, torch.bfloat16).requires_grad_(False), tiny_model(name).requires_grad_(True)):
        plain = logits(name, changed)
        by_onednn(changed)
        assert torch.equal(logits(name, changed), plain)
    plain = tiny_model(name)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = logits(name, plain)
        by_onednn(plain.requires_grad_(False))
        assert torch.equal(logits(name, plain), wanted)


def test_weights_stay_what_they_are(model: PreTrainedModel) -> None:
    before, state = fingerprint(model), {n: t.clone() for n, t in model.state_dict().items()}
    by_onednn(model)
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model) == before
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_code_is_kept_for_few_shapes_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CAPACITIES:
        monkeypatch.setenv(name, "7")
        by_onednn(nn.Linear(2, 2))
        assert os.environ[name] == "7"
        monkeypatch.delenv(name)
        by_onednn(nn.Linear(2, 2))
        assert int(os.environ[name]) < 1024


@pytest.mark.skipif(sys.platform != "linux", reason="freed memory is given back on Linux alone")
def test_memory_does_not_grow_with_the_numbers_of_rows() -> None:
    clean = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    done = subprocess.run([sys.executable, "-c", MANY_SHAPES], capture_output=True, text=True, env=clean, check=True)
    assert int(done.stdout) < 20 * MIB


def test_a_base_is_loaded_so_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_base("llama")
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    for pays in (True, False):
        monkeypatch.setattr("antefix.base.onednn_pays", lambda pays=pays: pays)
        base = load_base(tmp_path)
        assert any(isinstance(m, FrozenLinear) for m in base.model.modules()) == pays
