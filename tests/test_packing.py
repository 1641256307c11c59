"""A packed row is its pairs: equal losses and gradients, whatever the model, its window and its attention.

The rows are longer than the windows of Mistral and Gemma (4 tokens), sources and targets of unlike lengths.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import pytest
import torch
from conftest import DECODER_ONLY, VOCABULARY, tiny_method, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from antefix.attach import attached
from antefix.attention.hook import routed
from antefix.base import Base
from antefix.batches.batch import Batch, NoForestError, packed_batch, padded_batch
from antefix.batches.head import label_logits, pair_losses
from antefix.data.encode import Encoded, EncodedExample
from antefix.data.plan import Unit, all_units
from antefix.methods.base import MethodModule
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.initial import Positions
from antefix.training.feed import Feed
from antefix.training.kept_sources import KeptSources

WINDOWED = ("mistral", "gemma2", "gemma3")


def encoded(*shapes: tuple[int, tuple[int, ...]], seed: int = 0) -> Encoded:
    """Random examples: so many source tokens, targets of these lengths."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draw).tolist())

    return Encoded(tuple(EncodedExample(ids(s), tuple(ids(t) for t in targets)) for s, targets in shapes), 0, 0)


def alike() -> EncodedExample:
    """Targets that share beginnings: all of one, most of it, its first token, nothing."""
    example = encoded((5, (8, 6)), seed=3).examples[0]
    one, other = example.targets
    return EncodedExample(example.source, (one, one[:6], (*one[:5], *other[:3]), (one[0], *other[1:])))


UNALIKE = encoded((7, (5, 1, 9)), (3, (6,)), (11, (2, 7)), (1, (4, 4, 3, 8)))
DATA = Encoded((*UNALIKE.examples, alike()), 0, 0)


def prefix_for(model: PreTrainedModel, positions: Positions) -> PrefixTuning:
    torch.manual_seed(1)
    base = Base(model, cast(PreTrainedTokenizerBase, None), "tiny")
    config = PrefixTuningConfig(num_virtual_tokens=5, initial="normal", initial_scale=0.7, positions=positions)
    return PrefixTuning.build(base, config)


def infix_for(model: PreTrainedModel) -> MethodModule:
    return tiny_method(Base(model, cast(PreTrainedTokenizerBase, None), "tiny"), "infix")


def losses_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """As in training, where attention goes through ours."""
    with routed(model):
        return pair_losses(model, batch)


def gradients(model: PreTrainedModel, batch: Batch, prefix: nn.Module | None) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the gradients of a sum that weighs every pair differently."""
    learned = [model.get_input_embeddings().weight] if prefix is None else list(prefix.parameters())
    losses = losses_of(model, batch)
    weights = torch.linspace(0.5, 1.5, batch.num_pairs)
    return losses.detach(), list(torch.autograd.grad((losses * weights).sum(), learned))


@pytest.mark.parametrize("kind", ["bare", "in_place", "shifted", "for targets"])
@pytest.mark.parametrize(
    ("name", "attention"),
    # Gemma 2 caps its scores, which transformers' SDPA cannot.
    [(n, a) for n in DECODER_ONLY for a in ("eager", "sdpa") if (n, a) != ("gemma2", "sdpa")],
)
def test_packed_rows_are_padded_rows(name: str, kind: str, attention: str) -> None:
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    prefix: MethodModule | None = None
    if kind == "for targets":
        prefix = infix_for(model.requires_grad_(False))
    elif kind != "bare":
        prefix = prefix_for(model.requires_grad_(False), kind)
    units = all_units(DATA, targets_per_row=4)
    with nullcontext() if prefix is None else attached(model, prefix):
        packed, packed_gradients = gradients(model, packed_batch(DATA, units, model), prefix)
        padded, padded_gradients = gradients(model, padded_batch(DATA, units, model), prefix)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    largest = max(float(g.abs().max()) for g in padded_gradients)
    assert largest > 1e-3, "nothing would be compared"
    for ours, theirs in zip(packed_gradients, padded_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODER_ONLY)
def test_kept_sources_are_sources_that_are_fed(name: str, dtype: torch.dtype) -> None:
    """And each is read once, by the bare base, whatever comes in between."""
    model = tiny_model(name, dtype).requires_grad_(False)
    if hasattr(model.config, "sliding_window"):
        model.config.sliding_window = 40
    module, units = infix_for(model), all_units(DATA, targets_per_row=2)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    with attached(model, module) as attachment:
        fed = Feed(model, DATA, "packed", 1024)
        kept = replace(fed, kept=KeptSources(model, attachment, DATA, tokens_per_batch=12))
        num_read = 0

        def count(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
            nonlocal num_read
            mask = kwargs["attention_mask"]
            if isinstance(mask, Tensor) and mask.ndim == 2:  # no forest: a source that is read
                num_read += int(mask.sum())

        handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        for part in (units[:3], units, units[2:]):
            wanted, wanted_gradients = gradients(model, fed.batch(part), module)
            batch = kept.batch(part)
            assert batch.num_tokens < fed.batch(part).num_tokens
            losses, found = gradients(model, batch, module)
            torch.testing.assert_close(losses, wanted, **near)
            largest = max(float(g.abs().max()) for g in wanted_gradients)
            for one, other in zip(found, wanted_gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=near["rtol"], atol=near["atol"] * largest)
        handle.remove()
    assert num_read == sum(len(e.source) - 1 for e in DATA.examples)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_count_positions(name: str) -> None:
    """The last target stands right behind its source: a window that counted places in the row would hide it."""
    model = tiny_model(name)
    data = encoded((3, (9, 9, 6)))
    whole = losses_of(model, packed_batch(data, [Unit(0, (0, 1, 2))], model))
    alone = losses_of(model, packed_batch(data, [Unit(0, (2,))], model))
    torch.testing.assert_close(whole[2:], alone, rtol=1e-5, atol=1e-5)
    model.config.sliding_window = 100
    blind = losses_of(model, packed_batch(data, [Unit(0, (0, 1, 2))], model))
    assert (blind - whole).abs().max() > 1e-3, "the window is at work in this test"


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama").requires_grad_(False)


def test_what_targets_have_in_common_is_fed_and_scored_once(llama: PreTrainedModel) -> None:
    batch = packed_batch(Encoded((alike(),), 0, 0), [Unit(0, (0, 1, 2, 3))], llama)
    # The source, the whole first target but its last token, three tokens of the third that leave it after five
    # (the last is only predicted), and four of the fourth that leave it after one.
    assert batch.num_tokens == 5 + 7 + 2 + 4
    assert len(batch.positions) == 1 + 7 + 2 + 4
    assert len(batch.label) == 8 + 6 + 8 + 6


def test_a_target_does_not_see_another(llama: PreTrainedModel) -> None:
    first, other = encoded((4, (5, 5)), seed=0), encoded((4, (5, 5)), seed=1)
    mixed = Encoded(
        (EncodedExample(first.examples[0].source, (other.examples[0].targets[0], first.examples[0].targets[1])),), 0, 0
    )
    units = [Unit(0, (0, 1))]
    (before, kept), (after, still) = (losses_of(llama, packed_batch(d, units, llama)) for d in (first, mixed))
    assert before != after
    assert kept == still


def test_a_row_does_not_see_its_neighbours(llama: PreTrainedModel) -> None:
    units = all_units(DATA, targets_per_row=4)
    together = losses_of(llama, packed_batch(DATA, units, llama))
    alone = torch.cat([losses_of(llama, packed_batch(DATA, [unit], llama)) for unit in units])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_models_own_loss_is_the_same(llama: PreTrainedModel) -> None:
    """transformers' loss of one pair, with the source's labels ignored."""
    losses = losses_of(llama, packed_batch(DATA, [Unit(0, (0, 1, 2))], llama))
    example = DATA.examples[0]
    for target, loss in zip(example.targets, losses, strict=True):
        ids = torch.tensor([[*example.source, *target]])
        labels = torch.tensor([[-100] * len(example.source) + list(target)])
        mean = llama(input_ids=ids, labels=labels).loss
        torch.testing.assert_close(loss, mean * len(target), rtol=1e-5, atol=1e-5)


def test_the_last_source_token_predicts_every_targets_first(llama: PreTrainedModel) -> None:
    """Several labels at one position, whose logits are computed once."""
    batch = packed_batch(DATA, [Unit(0, (0, 1, 2)), Unit(2, (1,))], llama)
    sources, targets = DATA.examples[0], DATA.examples[2]
    last, row_length = len(sources.source) - 1, 7 + 4 + 0 + 8
    first_labels = [t[0] for t in sources.targets]
    at_last = batch.positions[batch.row] == last
    assert batch.label[at_last].tolist() == first_labels
    assert batch.pair[at_last].tolist() == [0, 1, 2]
    assert len(batch.positions) == len(batch.positions.unique()) == len(batch.label) - 2
    with routed(llama):
        assert label_logits(llama, batch).shape == (len(batch.positions), VOCABULARY)
    assert batch.positions[-1] == row_length + len(targets.source) - 1 + len(targets.targets[1]) - 1


def test_a_packed_row_feeds_less(llama: PreTrainedModel) -> None:
    """A source is fed once, and no target's last token at all."""
    units = [Unit(0, (0, 1, 2))]
    assert packed_batch(DATA, units, llama).num_tokens == 7 + 4 + 0 + 8
    assert padded_batch(DATA, units, llama).num_tokens == 3 * (7 + 8)


def test_layers_that_no_mask_describes_are_refused(llama: PreTrainedModel) -> None:
    llama.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(NoForestError, match="layers of the kinds chunked_attention, full_attention take no"):
        packed_batch(DATA, [Unit(0, (0,))], llama)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_half_precision(name: str) -> None:
    model = tiny_model(name, torch.bfloat16)
    units = all_units(DATA, targets_per_row=4)
    packed, padded = (losses_of(model, make(DATA, units, model)) for make in (packed_batch, padded_batch))
    torch.testing.assert_close(packed, padded, rtol=2e-2, atol=2e-2)
