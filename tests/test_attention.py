"""Every attention path is the slow reference, in value and in every gradient; and what a merge is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from antefix.attention import reference
from antefix.attention.attend import attend
from antefix.attention.joined import joined
from antefix.attention.partial import (
    KeySet,
    Mask,
    Partial,
    Scores,
    concatenated,
    explicit,
    explicit_partial,
    fused,
    merge,
)

B, T, H, D = 3, 6, 6, 8
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
"""Largest difference to the reference, as a part of the largest number compared."""

Path = Callable[[Tensor, KeySet, list[KeySet], Scores], Tensor]
PATHS: dict[str, Path] = {
    "explicit": explicit,
    "concatenated": concatenated,
    "fused": lambda q, tokens, slots, scores: fused(q, [tokens, *slots], scores.scale),
    "attend": attend,
}


def padding(starts: list[int], ends: list[int]) -> Tensor:
    """True where a row has a token: B, 1, S."""
    places = torch.arange(T)
    return torch.stack([(places >= s) & (places < e) for s, e in zip(starts, ends, strict=True)])[:, None]


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
MASKS: dict[str, Tensor] = {  # B, T, S; True where a query sees a token
    "none": torch.ones(B, T, T, dtype=torch.bool),
    "causal": CAUSAL,
    "window": CAUSAL & ~torch.ones(T, T, dtype=torch.bool).tril(-3),
    "right padding": CAUSAL & padding([0, 0, 0], [6, 4, 1]),
    "left padding (its queries see nothing)": CAUSAL & padding([0, 3, 5], [6, 6, 6]),
    "a row that sees nothing": padding([0, 6, 2], [6, 6, 4]).expand(B, T, T),
}


class Case(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    slots: list[tuple[Tensor, Tensor] | None]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.value, *(t for pair in self.slots if pair for t in pair)]


def case(num_slots: list[int | None], *, groups: int = 2, dtype: torch.dtype = torch.float32, queries: int = T) -> Case:
    """Random numbers; `num_slots` is one count a row, None for a bare row."""
    torch.manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    slots = [None if p is None else (numbers(groups, p, D), numbers(groups, p, D)) for p in num_slots]
    return Case(numbers(B, H, queries, D), numbers(B, groups, T, D), numbers(B, groups, T, D), slots)


def key_set_of_slots(c: Case) -> list[KeySet]:
    """The slots of all rows side by side, masked where a row has fewer: as an attachment hands them over."""
    longest = max((pair[0].shape[1] for pair in c.slots if pair), default=0)
    groups, dtype = c.key.shape[1], c.key.dtype
    parts = []
    for part in (0, 1):
        rows = [torch.zeros(groups, 0, D, dtype=dtype) if pair is None else pair[part] for pair in c.slots]
        parts.append(torch.stack([torch.nn.functional.pad(r, (0, 0, 0, longest - r.shape[1])) for r in rows]))
    counts = torch.tensor([0 if pair is None else pair[0].shape[1] for pair in c.slots])
    visible = torch.arange(longest) < counts[:, None, None, None]
    return [KeySet(parts[0], parts[1], None if bool(visible.all()) else Mask.of(visible, dtype))] if longest else []


def agree(path: Path, c: Case, visible: Tensor, scores: Scores, *, is_causal: bool = False) -> None:
    """Outputs and all gradients of a path, against the reference."""
    dtype = c.query.dtype
    mask = None if is_causal or bool(visible.all()) else Mask.of(visible[:, None], dtype)
    out = path(c.query, KeySet(c.key, c.value, mask, is_causal), key_set_of_slots(c), scores)
    assert (out.dtype, out.shape) == (dtype, c.query.shape)
    wanted = reference.attention(
        c.query, c.key, c.value, visible, c.slots, scale=scores.scale, softcap=scores.softcap,
        position_bias_HTS=None if scores.position_bias is None else scores.position_bias[0],
        sink_logits_H=scores.sink_logits_H,
    )  # fmt: skip
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    more = [t for t in (scores.position_bias, scores.sink_logits_H) if t is not None]
    leaves = [t for t in (*c.leaves, *more) if t.numel()]
    gradients = torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), leaves)
    for found, expected in zip((out.detach(), *gradients), (wanted.detach(), *wanted_gradients), strict=True):
        limit = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=limit)


PLAIN = Scores(scale=0.4)


def agree_without_gradient(c: Case, visible: Tensor, slots: list[KeySet]) -> None:
    """What decoding takes, one query a row, against the reference."""
    dtype = c.query.dtype
    tokens = KeySet(c.key, c.value, None if bool(visible.all()) else Mask.of(visible[:, None], dtype))
    before = c.query.detach().clone()
    with torch.no_grad():
        out = attend(c.query, tokens, slots, PLAIN)
        again = joined(c.query, tokens, slots, PLAIN.scale)
    torch.testing.assert_close(out, again, rtol=0, atol=0, msg="attend took another path, or something was kept wrong")
    torch.testing.assert_close(c.query.detach(), before, rtol=0, atol=0)
    wanted = reference.attention(c.query, c.key, c.value, visible, c.slots, scale=PLAIN.scale).detach()
    assert (out.dtype, out.shape) == (dtype, c.query.shape)
    limit = TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(out.double(), wanted.double(), rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_slots", [[0, 0, 0], [1, 1, 1], [5, 5, 5], [5, None, 1]], ids=str)
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("path", PATHS)
def test_path_is_the_reference(
    path: str, mask: str, groups: int, num_slots: list[int | None], dtype: torch.dtype
) -> None:
    agree(PATHS[path], case(num_slots, groups=groups, dtype=dtype), MASKS[mask], PLAIN)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_causal_flag_is_a_causal_mask(path: str, dtype: torch.dtype) -> None:
    agree(PATHS[path], case([5, None, 1], dtype=dtype), CAUSAL, PLAIN, is_causal=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("path", PATHS)
def test_one_query_a_row_as_in_decoding(path: str, mask: str, groups: int, dtype: torch.dtype) -> None:
    agree(PATHS[path], case([5, None, 1], groups=groups, dtype=dtype, queries=1), MASKS[mask][:, -1:], PLAIN)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_slots", [[1, 1, 1], [5, 5, 5], [5, None, 1]], ids=str)
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("mask", MASKS)
def test_decoding_joins_slots_to_the_tokens(
    mask: str, groups: int, num_slots: list[int | None], dtype: torch.dtype
) -> None:
    c = case(num_slots, groups=groups, dtype=dtype, queries=1)
    agree_without_gradient(c, MASKS[mask][:, -1:], key_set_of_slots(c))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_sets", [1, 2])
@pytest.mark.parametrize("num_slots", [5, 100])
def test_slots_that_all_rows_share_are_one_product(num_slots: int, num_sets: int, dtype: torch.dtype) -> None:
    """Few meet all heads at once, many those of their group; two sets are one lot, in the base's precision."""
    c = case([None, None, None], dtype=dtype, queries=1)
    key, value = (torch.randn(1, 2, num_slots, D) for _ in range(2))
    cuts = [slice(0, 2), slice(2, num_slots)] if num_sets == 2 else [slice(0, num_slots)]
    of_rows = c._replace(slots=[(key[0].to(dtype), value[0].to(dtype))] * B)
    agree_without_gradient(of_rows, MASKS["causal"][:, -1:], [KeySet(key[:, :, cut], value[:, :, cut]) for cut in cuts])


def bias() -> Tensor:
    return torch.randn(1, H, T, T, generator=torch.Generator().manual_seed(2)).requires_grad_()


def sinks() -> Tensor:
    return torch.linspace(-1, 2, H).requires_grad_()


UNUSUAL: dict[str, tuple[list[str], Callable[[], Scores]]] = {
    "soft cap": (["explicit", "attend"], lambda: Scores(scale=0.4, softcap=1.5)),
    "sinks": (["explicit", "attend"], lambda: Scores(scale=0.4, sink_logits_H=sinks())),
    "position bias": (["explicit", "concatenated", "attend"], lambda: Scores(scale=1.0, position_bias=bias())),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", ["none", "left padding (its queries see nothing)", "a row that sees nothing"])
@pytest.mark.parametrize(("path", "term"), [(path, term) for term, (paths, _) in UNUSUAL.items() for path in paths])
def test_unusual_scores_are_the_references(path: str, term: str, mask: str, dtype: torch.dtype) -> None:
    agree(PATHS[path], case([5, None, 1], dtype=dtype), MASKS[mask], UNUSUAL[term][1]())


def test_an_additive_mask_is_its_boolean_one() -> None:
    c, visible = case([2, None, 1]), MASKS["left padding (its queries see nothing)"][:, None]
    lowest = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for path in PATHS.values():
        outs = [path(c.query, KeySet(c.key, c.value, Mask.of(m, torch.float32)), key_set_of_slots(c), PLAIN)
                for m in (visible, lowest)]  # fmt: skip
        torch.testing.assert_close(*outs)


def test_dropout_drops_and_keeps_the_mean() -> None:
    c, scores = case([5, 5, 5]), Scores(scale=0.4, dropout=0.5)
    whole = attend(c.query, KeySet(c.key, c.value), key_set_of_slots(c), PLAIN)
    for path in (explicit, concatenated):
        torch.manual_seed(3)
        draws = [path(c.query, KeySet(c.key, c.value), key_set_of_slots(c), scores) for _ in range(400)]
        assert not torch.equal(draws[0], draws[1])
        torch.testing.assert_close(torch.stack(draws).mean(0), whole, rtol=0, atol=0.5)


def test_the_worked_example_of_the_merge() -> None:
    """q = (1, 0), slot key (ln 2, 0), value 4; token keys 0, values 1 and 3: weights .5, .25, .25."""
    query = torch.tensor([[[[1.0, 0.0]]]])
    slot = KeySet(torch.tensor([[[[math.log(2), 0.0]]]]), torch.tensor([[[[4.0, 4.0]]]]))
    tokens = KeySet(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 1.0], [3.0, 3.0]]]]))
    one = Scores(scale=1.0)
    alone = explicit_partial(query, tokens, one)
    torch.testing.assert_close(alone.out_BHTE, torch.full((1, 1, 1, 2), 2.0))
    share = torch.sigmoid(explicit_partial(query, slot, one).lse_BHT - alone.lse_BHT)
    torch.testing.assert_close(share, torch.tensor([[[0.5]]]))
    for path in PATHS.values():
        torch.testing.assert_close(path(query, tokens, [slot], one), torch.full((1, 1, 1, 2), 3.0))


def test_nothing_seen_is_neutral_in_a_merge_on_either_side() -> None:
    something = Partial(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2))
    nothing = Partial(torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -torch.inf))
    for merged in (merge(something, nothing), merge(nothing, something)):
        assert torch.equal(merged.out_BHTE, something.out_BHTE)
        assert torch.equal(merged.lse_BHT, something.lse_BHT)
    both = merge(nothing, nothing)
    assert torch.equal(both.out_BHTE, nothing.out_BHTE)
    assert torch.equal(both.lse_BHT, nothing.lse_BHT)


def test_a_slot_of_zeros_is_not_neutral() -> None:
    """It has mass exp(0): only what is not seen changes nothing."""
    c = case([None] * B)
    zero = KeySet(torch.zeros(1, 2, 1, D), torch.zeros(1, 2, 1, D))
    tokens = KeySet(c.key, c.value)
    assert not torch.allclose(attend(c.query, tokens, [zero], PLAIN), attend(c.query, tokens, [], PLAIN), atol=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_a_prefix_leaves_the_ratios_between_token_weights_alone(path: str) -> None:
    """With one-hot values an output is the weights themselves."""
    c = case([5, 5, 5])
    one_hot = torch.eye(D)[:T].expand(B, 2, T, D)
    slot_key, _, *_ = key_set_of_slots(c)[0]
    slots = KeySet(slot_key, torch.zeros_like(slot_key))
    with_prefix = PATHS[path](c.query, KeySet(c.key, one_hot), [slots], PLAIN)[..., :T]
    bare = PATHS[path](c.query, KeySet(c.key, one_hot), [], PLAIN)[..., :T]
    assert bool((with_prefix.sum(-1) < 0.99 * bare.sum(-1)).all()), "the prefix takes weight"
    ratios = [w / w.sum(-1, keepdim=True) for w in (with_prefix, bare)]
    torch.testing.assert_close(ratios[0], ratios[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", [0, 1])
def test_slots_that_are_written_into_are_joined_anew(part: int) -> None:
    """What decoding keeps of slots is not what they were."""
    c = case([None, None, None], queries=1)
    slots = [torch.randn(1, 2, 5, D) for _ in range(2)]
    with torch.no_grad():
        before = joined(c.query, KeySet(c.key, c.value), [KeySet(slots[0], slots[1])], PLAIN.scale)
        slots[part].mul_(-2)
        after = joined(c.query, KeySet(c.key, c.value), [KeySet(slots[0], slots[1])], PLAIN.scale)
        fresh = joined(c.query, KeySet(c.key, c.value), [KeySet(slots[0].clone(), slots[1].clone())], PLAIN.scale)
    torch.testing.assert_close(after, fresh)
    assert (after - before).abs().max() > 0.01
