"""What every method promises on every architecture: it learns, the base does not, and what is kept says the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    METHOD_CONFIGS,
    METHOD_VARIANTS,
    is_output,
    tell_sources,
    tiny_base,
    tiny_batch,
    tiny_method,
    tiny_pair,
)
from torch import Tensor

from antefix.attach import attached, current_attachment
from antefix.attention.branch import Branch
from antefix.base import Base
from antefix.methods import METHODS, method_class
from antefix.methods.base import MethodModule
from antefix.methods.listing import counted
from antefix.parts.key_value import KeyValue
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.sites import Kind, find_sites
from antefix.training.recompute import recomputing

Variant = tuple[str, dict[str, Any]]
"""A method and the changes to its METHOD_CONFIGS."""


def loss_of(base: Base, batch: dict[str, Tensor]) -> Tensor:
    """The negative log-likelihood of random tokens."""
    tell_sources(base)
    batch = with_prompts(base, batch)
    real = is_output(batch)
    labels = torch.randint(3, 200, (int(real.sum()),), generator=torch.Generator().manual_seed(3))
    loss = torch.nn.functional.cross_entropy(base.model(**batch).logits[real], labels)
    attachment = current_attachment(base.model)
    modules = [p for p in attachment.prefixes if isinstance(p, MethodModule)] if attachment else []
    further = [m.auxiliary_loss(attachment.condition) for m in modules if attachment]
    return loss + sum(f for f in further if f is not None)


def with_prompts(base: Base, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder scores no new tokens: they are learned where texts hold them."""
    attachment = current_attachment(base.model)
    symbols = () if attachment is None else attachment.module_of(0).symbols
    if not symbols or find_sites(base.model).is_causal:
        return batch
    first = base.model.get_input_embeddings().weight.shape[0]
    ids = batch["input_ids"].clone()
    ids[:, 1 : 1 + len(symbols)] = torch.arange(first, first + len(symbols))
    return {**batch, "input_ids": ids}


def snapshot(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_every_method_is_swept() -> None:
    assert METHOD_CONFIGS.keys() == METHOD_VARIANTS.keys() == METHODS.keys()
    assert all(METHOD_VARIANTS.values()), "a method without a variant would be passed over"


def test_what_is_mixed_in_a_batch_is_of_unlike_sizes(method: str) -> None:
    if METHOD_VARIANTS[method].keys() == {"as it is"}:
        pytest.skip(f"{method} has one size")
    one, other = ({n: t.shape for n, t in m.kept_tensors().items()} for m in tiny_pair(tiny_base("llama"), method))
    assert one != other


def test_all_of_the_prefix_moves_and_nothing_of_the_base(architecture: str, variant: Variant) -> None:
    method, changes = variant
    base = tiny_base(architecture)
    module = tiny_method(base, method, **changes).train()
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


KINDS_OF: dict[str, tuple[Kind, ...]] = {"infix": ("self", "cross"), "llama_adapter": ("self", "encoder_self")}
"""The sites of methods that do not act at all of them."""


def test_every_site_is_acted_at_and_every_slot_gets_a_gradient(architecture: str, method: str) -> None:
    base = tiny_base(architecture)
    module = tiny_method(base, method)
    if module.encoder_rows() is not None:
        pytest.skip("rows before a text act at no site of their own")
    if not (module.slots() or module.branches()):
        pytest.skip("it acts at no attention site")
    made: dict[str, list[Tensor]] = {}
    slots, branches = module.slots, module.branches

    def kept(name: str, tensors: Iterable[Tensor]) -> None:
        made[name] = [t for t in tensors if t.requires_grad]
        for tensor in made[name]:
            tensor.retain_grad()

    def watched_slots() -> Mapping[str, KeyValue]:
        found = slots()
        for name, pair in found.items():
            kept(name, pair)
        return found

    def watched_branches() -> Mapping[str, Sequence[Branch]]:
        found = branches()
        for name, (branch,) in found.items():
            kept(name, branch.tensors())
        return found

    module.slots, module.branches = watched_slots, watched_branches  # type: ignore[method-assign]
    with attached(base.model, module):
        loss_of(base, tiny_batch(architecture, "right")).backward()
    assert made.keys() == {s.name for s in find_sites(base.model).of_kinds(KINDS_OF.get(method))}
    plain = slots().keys() if method != "sparse_prefix" else {}  # it leaves slots out
    for name, tensors in made.items():
        for tensor in tensors:
            assert tensor.grad is not None, name
            assert bool(tensor.grad.any()), name
            if name in plain:
                assert bool((tensor.grad.abs().sum(dim=(0, 2)) > 0).all()), name


def test_recomputing_activations_changes_neither_loss_nor_gradients(unlike_architecture: str, variant: Variant) -> None:
    method, changes = variant
    base = tiny_base(unlike_architecture)
    module = tiny_method(base, method, **changes).train()
    batch = tiny_batch(unlike_architecture, "right")

    def one_pass() -> list[Tensor]:
        torch.manual_seed(4)  # of the slots' dropout
        loss = loss_of(base, batch)
        return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]

    with attached(base.model, module):
        passes = [0]
        watched = base.model.get_submodule(find_sites(base.model).attention[-1].module)
        watched.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
        plain, of_plain = one_pass(), passes[0]
        with recomputing(base.model):
            recomputed = one_pass()
    if not module.symbols:  # nothing flows through layers where no new token is read
        assert passes == [2 * of_plain + 1], "transformers did recompute"
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-6)


def test_what_is_kept_says_what_was_trained(unlike_architecture: str, variant: Variant, tmp_path: Path) -> None:
    """Restored from its tensors, and loaded from its folder."""
    method, changes = variant
    base = tiny_base(unlike_architecture)
    module = tiny_method(base, method, **changes).eval()
    batch = tiny_batch(unlike_architecture)
    tensors = module.kept_tensors()
    found = method_class(method)
    config = found.Config.model_validate({**METHOD_CONFIGS[method], **changes})
    restored = found.restore(find_sites(base.model), config, tensors)
    record = BaseRecord(name=base.name, fingerprint=base.fingerprint)
    card = Card(method=method, config=config.model_dump(mode="json"), positions=module.positions, base=record)
    loaded = Prefix.load(Prefix(module.kept_tensors(), card).save(tmp_path / "kept"))
    with torch.no_grad():
        with attached(base.model, module):
            tell_sources(base)
            trained = base.model(**batch).logits
        for again in (restored, loaded):
            with attached(base.model, again):
                tell_sources(base)
                assert torch.equal(base.model(**batch).logits, trained)
        assert not torch.equal(base.model(**batch).logits, trained)
    assert all(torch.equal(t, tensors[name]) for name, t in restored.kept_tensors().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_of_a_base_whether_what_is_kept_is_keys_and_values_alone(
    unlike_architecture: str, name: str
) -> None:
    base = tiny_base(unlike_architecture)
    row = counted(base, name)
    if why := row["refusal"] or row["asks_for"]:
        pytest.skip(f"{name} is not for {unlike_architecture} without more: {why}")
    assert row["kept_bytes"] == 4 * row["kept"]
    found = method_class(name)
    config = found.Config()
    restored = found.restore(find_sites(base.model), config, found.build(base, config).kept_tensors())
    slots = {f"{site}.{part}" for site in restored.slots() for part in ("key", "value")}
    assert row["folds_to_key_value"] == (slots == restored.kept_tensors().keys() and not restored.branches())
