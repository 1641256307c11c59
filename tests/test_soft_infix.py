"""Soft tokens between source and target: their equation by hand, packed and padded, trained and written with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DECODER_ONLY, METHOD_CONFIGS, tiny_base, tiny_method
from torch import Tensor

import antefix
from antefix.attach import attached
from antefix.base import Base
from antefix.batches.batch import packed_batch, padded_batch
from antefix.batches.head import pair_losses
from antefix.data.encode import Encoded, EncodedExample
from antefix.data.plan import Unit
from antefix.errors import PrefixError, TrainingError
from antefix.methods.base import MethodModule

P = METHOD_CONFIGS["soft_infix"]["num_virtual_tokens"]
PAD = 0


def moved(base: Base) -> MethodModule:
    """An infix whose offsets are not zero any more."""
    module = tiny_method(base, "soft_infix")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return module


def test_by_hand() -> None:
    """GPT-2 with embeddings put together, and keys and values moved by a hook of our own."""
    base = tiny_base("gpt2")
    module = moved(base)
    tensors = module.kept_tensors()
    source, target = torch.tensor([5, 9, 14]), torch.tensor([20, 7])
    model: Any = base.model
    words = model.transformer.wte
    embedded = torch.cat([words(source), tensors["rows"], words(target)])[None]
    handles = []
    for n, block in enumerate(model.transformer.h):
        path = f"transformer.h.{n}.attn.c_attn"

        def move(layer: Any, args: Any, output: Tensor, path: str = path) -> Tensor:
            output = output.clone()
            width = output.shape[-1] // 3
            output[0, 3 : 3 + P, width : 2 * width] += tensors[f"{path}.key"]
            output[0, 3 : 3 + P, 2 * width :] += tensors[f"{path}.value"]
            return output

        handles.append(block.attn.c_attn.register_forward_hook(move))
    with torch.no_grad():
        wanted = model(inputs_embeds=embedded).logits
    for handle in handles:
        handle.remove()
    fed = torch.cat([source, torch.full((P,), PAD), target])[None]
    with torch.no_grad(), attached(model, module) as attachment:
        attachment.source_lengths = 3 + P
        torch.testing.assert_close(model(input_ids=fed).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_packed_is_padded(name: str) -> None:
    base = tiny_base(name)
    module = moved(base)
    examples = (
        EncodedExample((5, 9, 14, *[PAD] * P), ((20, 7, 2), (20, 8, 11, 2))),
        EncodedExample((6, *[PAD] * P), ((31, 2),)),
    )
    encoded, units = Encoded(examples, 0, 0), [Unit(0, (0, 1)), Unit(1, (0,))]
    found = []
    with attached(base.model, module):
        for make in (packed_batch, padded_batch):
            losses = pair_losses(base.model, make(encoded, units, base.model))
            found.append([losses.detach(), *torch.autograd.grad(losses.sum(), list(module.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_it_is_trained_kept_and_written_with_beside_others() -> None:
    base = tiny_base("llama")
    examples = [antefix.Example(source=f"name : N{n}", targets=(f"This is N{n}.",)) for n in range(12)]
    training = antefix.TrainingRecipe(max_steps=30, pairs_per_step=8, evaluations=2)
    prefix = antefix.train(base, examples, training=training, method="soft_infix", num_virtual_tokens=3)
    decoding = antefix.Decoding(max_new_tokens=6)
    with antefix.attached(base.model, prefix):
        alone = antefix.generate(base, examples[:2], decoding=decoding)
    with antefix.attached(base.model, tiny_method(base), prefix, rows=[0, 1, -1]):
        together = antefix.generate(base, [examples[5], examples[1], examples[0]], decoding=decoding)
    assert together[1] == alone[1]
    assert together[2] != alone[0]


def test_it_is_not_for_every_base_and_task() -> None:
    with pytest.raises(PrefixError, match="need a causal base: use prefix_tuning, or infix"):
        antefix.train(tiny_base("bart"), [antefix.Example(source="a", targets=("b",))] * 2, method="soft_infix")
    labelled = [antefix.Example(source=f"text {n}", targets=(str(n % 2),)) for n in range(8)]
    with pytest.raises(TrainingError, match="classification writes nothing: take prefix_tuning"):
        antefix.train(tiny_base("llama"), labelled, method="soft_infix", task="classification")
    with pytest.raises(PrefixError, match="several of these stand after the source; take one") as _:
        tiny_union(tiny_base("llama"))


def tiny_union(base: Base) -> MethodModule:
    from antefix.methods.union import Union

    class Twice(Union):
        members = ("soft_infix", "prefix_tuning")

    return Twice(None, [tiny_method(base, "soft_infix"), tiny_method(base, "soft_infix", seed=2)])
