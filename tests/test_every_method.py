"""What every method promises on every architecture: it learns, the base does not, and what is kept says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DECODER_ONLY, METHOD_CONFIGS, is_output, tiny_base, tiny_batch, tiny_method
from torch import Tensor

from antefix.attach import attached
from antefix.base import Base
from antefix.methods import METHODS, method_class
from antefix.methods.base import MethodModule
from antefix.sites import find_sites
from antefix.training.recompute import recomputing

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "network": {"parametrisation": "network", "hidden_width": 9},
    "linear, dropout, frozen sink": {"parametrisation": "linear", "dropout": 0.3, "freeze_first": True},
}


def loss_of(base: Base, batch: dict[str, Tensor]) -> Tensor:
    """The negative log-likelihood of random tokens."""
    real = is_output(batch)
    labels = torch.randint(3, 200, (int(real.sum()),), generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.cross_entropy(base.model(**batch).logits[real], labels)


def snapshot(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_every_method_has_a_config_here() -> None:
    assert METHOD_CONFIGS.keys() == METHODS.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_of_the_prefix_moves_and_nothing_of_the_base(architecture: str, method: str, variant: str) -> None:
    base = tiny_base(architecture)
    module = tiny_method(base, method, **VARIANTS[variant]).train()
    batch, weights = tiny_batch(architecture, "right"), snapshot(base.model)
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    with attached(base.model, module):
        for _ in range(2):
            before = snapshot(module)
            loss_of(base, batch).backward()
            gradients = [p.grad for p in module.parameters()]
            assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
            optimiser.step()
            optimiser.zero_grad()
            assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
            with torch.no_grad():  # an evaluation between steps must not stand in the next one's way
                module.eval()
                loss_of(base, batch)
                module.train()
    assert all(torch.equal(a, b) for a, b in zip(weights, base.model.parameters(), strict=True))
    assert all(p.grad is None for p in base.model.parameters())


def test_every_slot_of_every_site_gets_a_gradient(architecture: str, method: str) -> None:
    base = tiny_base(architecture)
    module = tiny_method(base, method)
    with attached(base.model, module):
        loss_of(base, tiny_batch(architecture, "right")).backward()
    slots = module.slots()
    assert set(slots) == {s.name for s in find_sites(base.model).attention}, "three kinds of sites on encoder-decoders"
    for name, pair in slots.items():
        for tensor in pair:
            assert tensor.grad is not None
            assert bool((tensor.grad.abs().sum(dim=(0, 2)) > 0).all()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_activations_changes_neither_loss_nor_gradients(
    architecture: str, method: str, variant: str
) -> None:
    base = tiny_base(architecture)
    module = tiny_method(base, method, **VARIANTS[variant]).train()
    batch = tiny_batch(architecture, "right")

    def one_pass() -> list[Tensor]:
        torch.manual_seed(4)  # of the slots' dropout
        loss = loss_of(base, batch)
        return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]

    with attached(base.model, module):
        plain = one_pass()
        passes = [0]
        watched = base.model.get_submodule(find_sites(base.model).attention[0].module)
        watched.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
        with recomputing(base.model):
            recomputed = one_pass()
    assert passes == [2], "transformers did recompute"
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_says_what_was_trained(architecture: str, method: str, variant: str) -> None:
    base = tiny_base(architecture)
    module = tiny_method(base, method, **VARIANTS[variant]).eval()
    batch = tiny_batch(architecture)
    kept = module.kept_tensors()
    found = method_class(method)
    config = found.Config.model_validate({**METHOD_CONFIGS[method], **VARIANTS[variant]})
    restored = found.restore(find_sites(base.model), config, kept)
    with torch.no_grad():
        with attached(base.model, module):
            trained = base.model(**batch).logits
        with attached(base.model, restored):
            assert torch.equal(base.model(**batch).logits, trained)
        assert not torch.equal(base.model(**batch).logits, trained)
    assert all(torch.equal(t, kept[name]) for name, t in restored.kept_tensors().items())


def text_as_prefix(base: Base, text: str, positions: str) -> MethodModule:
    return tiny_method(base, initial="text", initial_text=text, num_virtual_tokens=None, positions=positions)


def in_context(base: Base, prefix: str, text: str) -> Tensor:
    ids = base.tokenizer(prefix + text)["input_ids"]
    with torch.no_grad():
        return base.model(torch.tensor([ids])).logits[0, len(prefix) :]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("positions", ["shifted", "in_place"])
@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_text_as_prefix_is_the_text_in_context(name: str, positions: str, padding: str) -> None:
    """Mixed prefixes, each row shorter than the smallest window; the slots of rotary bases stand before position 0."""
    base = tiny_base(name)
    if positions == "in_place" and find_sites(base.model).positions == "absolute":
        pytest.skip("learned positions: a text before position 0 has none")
    is_sliding = getattr(base.model.config, "sliding_window", None) is not None
    prefixes, texts = (
        (["ab", "q", ""], ["xy", "yzz", "z"]) if is_sliding else (["abcde", "qr", ""], ["xyzv", "yz", "zzy"])
    )
    modules = [text_as_prefix(base, p, positions) for p in prefixes if p]
    base.tokenizer.padding_side = padding
    batch = base.tokenizer(texts, return_tensors="pt", padding=True)
    mask = batch["attention_mask"]
    with torch.no_grad(), attached(base.model, *modules, rows=[0, 1, -1]):
        found = base.model(
            batch["input_ids"], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    for row, (prefix, text) in enumerate(zip(prefixes, texts, strict=True)):
        difference = found[row][mask[row].bool()] - in_context(base, prefix, text)
        assert float(difference.abs().max()) < 1e-4
