"""Methods that act together: one prefix, one card, one recipe line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import METHOD_CONFIGS, NOT_ON, is_output, tell_sources, tiny_base, tiny_batch, tiny_method

import antefix
from antefix.attach import attached
from antefix.base import Base
from antefix.errors import PrefixError, RecipeError, TrainingError
from antefix.methods import METHODS, method_class
from antefix.methods.base import MethodModule
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.sites import find_sites
from antefix.training.recipe import Recipe


def union(base: Base, *members: str) -> tuple[MethodModule, Any]:
    torch.manual_seed(1)
    found = method_class("+".join(members))
    config = found.Config.model_validate({m: METHOD_CONFIGS[m] for m in members})
    return found.build(base, config), config


@pytest.mark.parametrize("other", [m for m in METHODS if m not in ("prefix_tuning", "infix", "mam")])
@pytest.mark.parametrize("architecture", ["llama", "bart"])
def test_every_method_goes_together_with_a_prefix(architecture: str, other: str, tmp_path: Path) -> None:
    base = tiny_base(architecture)
    if architecture in NOT_ON.get(other, ()):
        pytest.skip(f"{other} is not for {architecture}")
    if not method_class(other).acts_on_rows:
        pytest.skip(f"untrained, {other} is the base")
    module, config = union(base, "prefix_tuning", other)
    batch = tiny_batch(architecture, "right")
    real = is_output(batch)
    found = {}
    name = f"prefix_tuning+{other}"
    card = Card(
        method=name, config=config.model_dump(mode="json"), positions=module.positions,
        base=BaseRecord(name="tiny", fingerprint=base.fingerprint),
    )  # fmt: skip
    loaded = Prefix.load(Prefix(module.kept_tensors(), card).save(tmp_path / "kept"))
    alone = {m: tiny_method(base, m).eval() for m in ("prefix_tuning", other)}
    for key, prefix in {"both": module.eval(), "loaded": loaded, **alone}.items():
        with torch.no_grad(), attached(base.model, prefix):
            tell_sources(base)
            found[key] = base.model(**batch).logits[real]
    assert torch.equal(found["both"], found["loaded"])
    same_words = [m for m in alone if found[m].shape == found["both"].shape]  # new tokens are one member's
    assert same_words
    assert not any(torch.allclose(found["both"], found[m]) for m in same_words)
    with attached(base.model, module.train()):
        tell_sources(base)
        loss = base.model(**batch).logits[real].square().mean()
        loss.backward()
    of_member = [p for n, p in module.named_parameters() if "speaker" not in n]
    assert all(p.grad is not None and bool(p.grad.any()) for p in of_member)


def test_slots_of_two_stand_side_by_side() -> None:
    base = tiny_base("llama")
    module, _ = union(base, "prefix_tuning", "prompt_tuning")
    assert {pair.key_GPD.shape[1] for pair in module.slots().values()} == {10}


def test_it_needs_what_each_of_them_needs() -> None:
    assert method_class("special_tokens+pip_direct+pip_indirect").needs == (
        *method_class("special_tokens").needs,
        "a second text for every example",
    )


def test_each_has_its_own_learning_rate() -> None:
    base = tiny_base("llama")
    module, config = union(base, "prefix_tuning", "prefix_memory")
    assert type(module).default_learning_rate(config) == 5e-2
    assert [round(scale, 6) for _, scale in module.rate_scales()] == [1.0, 0.02]


def test_a_union_is_trained_and_kept(tmp_path: Path) -> None:
    base = tiny_base("llama")
    examples = [antefix.Example(source=f"name : N{n}", targets=(f"This is N{n}.",)) for n in range(12)]
    training = antefix.TrainingRecipe(max_steps=10, pairs_per_step=8, evaluations=2)
    config = {m: METHOD_CONFIGS[m] for m in ("prefix_tuning", "prefix_memory")}
    prefix = antefix.train(base, examples, training=training, method="prefix_tuning+prefix_memory", **config)
    assert prefix.card.method == "prefix_tuning+prefix_memory"
    assert {name.partition(".")[0] for name in prefix.tensors} == {"prefix_tuning", "prefix_memory"}
    losses = [scores["dev_loss"] for scores in prefix.card.scores["dev"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prefix_tuning+prefix_memry", "unknown method 'prefix_memry': did you mean 'prefix_memory'"),
        ("apt+apt", "apt+apt: a method is named twice"),
    ],
)
def test_a_wrong_union_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        method_class(name)
    assert message in str(refused.value)
    with pytest.raises(ValueError, match="method"):
        Recipe.model_validate({"name": "x", "method": name, "data": {"train": "x.csv"}})


@pytest.mark.parametrize(
    ("architecture", "members", "reason"),
    [
        ("gpt2", ("prompt_tuning", "prefix_propagation"), "several of these want to stand before the text"),
        ("bert", ("prompt_tuning", "prefix_propagation"), "several of these put rows before the text"),
        ("llama", ("infix", "prefix_tuning"), "slots for targets alone and others do not go together"),
    ],
)
def test_what_does_not_go_together_is_refused(architecture: str, members: tuple[str, ...], reason: str) -> None:
    with pytest.raises(PrefixError, match=reason):
        union(tiny_base(architecture), *members)


def test_a_kept_union_refuses_tensors_of_others() -> None:
    base = tiny_base("llama")
    module, config = union(base, "prefix_tuning", "prefix_memory")
    tensors = {**module.kept_tensors(), "apt.layers.0.self.key": torch.zeros(1)}
    with pytest.raises(PrefixError, match="tensor 'apt.layers.0.self.key' belongs to none of"):
        type(module).restore(find_sites(base.model), config, tensors)


def test_states_of_sources_are_kept_only_where_every_member_leaves_them() -> None:
    base = tiny_base("llama")
    examples = [antefix.Example(source=f"name : N{n}", targets=(f"This is N{n}.",)) for n in range(4)]
    training = antefix.TrainingRecipe(max_steps=1, pairs_per_step=2, evaluations=0, keep_source_states=True)
    config = {m: METHOD_CONFIGS[m] for m in ("infix", "ia3")}
    with pytest.raises(TrainingError, match="sources are read anew in every step where they see what is learned"):
        antefix.train(base, examples, training=training, method="infix+ia3", **config)
