"""What branches do to attention, by hand on one query, and the special case of every method on whole models.

Every method's equation at every site, and its gradients: see test_branch_equations.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    DECODER_ONLY,
    METHOD_CONFIGS,
    is_output,
    tell_sources,
    tiny_base,
    tiny_batch,
    tiny_method,
)
from torch import Tensor, nn

from antefix.attach import attached
from antefix.attention.attend import attend_partial
from antefix.attention.branch import Acting, Attention, Branch, Call, Places, Share, Subset, acted, merged
from antefix.attention.partial import KeySet, Partial, Scores
from antefix.attention.slot_share import SlotBranch
from antefix.base import Base
from antefix.methods import method_class
from antefix.methods.apt import AptBranch
from antefix.methods.base import MethodModule
from antefix.methods.hierarchical_blocking import segments
from antefix.methods.inducer import InducerBranch, InducerConfig
from antefix.methods.llama_adapter import AdapterBranch
from antefix.methods.ntk_attention import NtkBranch
from antefix.methods.prefix_memory import MemoryOfQueries
from antefix.parts.key_value import KeyValue
from antefix.sites import find_sites

# One query 1 of width 1, keys 0 and 1, values 1 and 3: attention is 2.462117, the log of its normaliser 1.313262.
QUERY, SCORES = torch.ones(1, 1, 1, 1), Scores(scale=1.0)
TOKENS = KeySet(torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1))
HIDDEN = torch.ones(1, 1, 1)
SLOT = KeyValue(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 10.0))


def of_tokens() -> Partial:
    return attend_partial(QUERY, TOKENS, [], SCORES)


def attention_with(branch: Branch, some: Subset | None = None) -> float:
    def call(memory: dict[str, Tensor]) -> Call:
        return Call(
            query_BHTD=QUERY, scores=SCORES, tokens=of_tokens, places=lambda: pytest.fail("not asked for"),
            hidden=lambda: HIDDEN, condition=lambda: HIDDEN, memory=memory,
        )  # fmt: skip

    attention = Attention(lambda: of_tokens().out_BHTE, of_tokens)
    out, residual = acted(attention, [Acting(branch, some, {})], call)
    return float(out) + (0.0 if residual is None else float(residual))


def gates(token: float, layer: float) -> dict[str, Tensor]:
    return {"token_gate": torch.full((1, 1), token), "layer_gate": torch.tensor([layer])}


def inducer(value: float, **config: Any) -> InducerBranch:
    shape = {"value_in": (1, 1, 1), "value_in_bias": (1, 1), "value_out": (1, 1, 1)}
    tensors = {name: torch.zeros(size) for name, size in shape.items()}
    chosen = InducerConfig(key_width=0, value_extension=False, **config)
    return InducerBranch({**tensors, "value_out_bias": torch.full((1, 1), value)}, chosen)


BY_HAND: dict[str, tuple[Branch, float]] = {
    "a slot": (SlotBranch(*SLOT), 7.476626),
    "a slot of zeros keeps a share": (SlotBranch(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)), 1.940292),
    "apt, gates at one": (AptBranch(SLOT, gates(0.0, 2.0), "token"), 7.476626),
    "apt, gates at a half": (AptBranch(SLOT, gates(0.0, 1.0), "token"), 3.533913),
    "ntk-attention": (NtkBranch(torch.full((1, 1, 1), 4.0), torch.full((1, 1), 0.5)), 3.635825),
    "ntk-attention, no mass": (NtkBranch(torch.full((1, 1, 1), 4.0), torch.zeros(1, 1)), 2.462117 + 8 / 3.718282),
    "inducer": (inducer(2.0), 3.306755),
    "inducer, true share": (inducer(2.0, gating_ablation=True), (1 - 0.422319) * 2.462117 + 0.422319 * 2),
    "llama-adapter": (AdapterBranch(SLOT, torch.tanh(torch.tensor([0.5]))), 7.083289),
    "prefix memory": (MemoryOfQueries(torch.full((1, 1, 1), 4.0), "elu"), 6.462117),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    branch, wanted = BY_HAND[name]
    assert attention_with(branch) == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_where_a_row_does_not_carry_it_nothing_is_left(name: str) -> None:
    nowhere = Subset(torch.zeros(0, dtype=torch.long), of_tokens=True)
    assert attention_with(BY_HAND[name][0], nowhere) == pytest.approx(2.462117, abs=2e-6)


def test_merging_is_one_softmax_over_all() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, values = torch.randn(2, 3, 4, 9, generator=draw), torch.randn(2, 3, 9, 5, generator=draw)
    scores[0, :, 0, :] = -torch.inf  # sees nothing anywhere
    scores[1, :, 1, :4] = -torch.inf  # no token
    scores[1, :, 2, 4:] = -torch.inf  # no slot

    def part(chosen: slice) -> tuple[Tensor, Tensor]:
        seen = scores[..., chosen]
        weights = torch.softmax(seen, -1).nan_to_num(0.0)
        return weights @ values[:, :, chosen], torch.logsumexp(seen, -1)

    base = Partial(*part(slice(0, 4)))
    shares = [Share(out, torch.ones_like(lse), lse) for out, lse in (part(slice(4, 6)), part(slice(6, 9)))]
    wanted = torch.softmax(scores, -1).nan_to_num(0.0) @ values
    torch.testing.assert_close(merged(base, shares), wanted)


def logits(base: Base, batch: dict[str, Tensor], *modules: MethodModule, **attaching: Any) -> Tensor:
    with torch.no_grad(), attached(base.model, *modules, **attaching):
        tell_sources(base)
        found: Tensor = base.model(**batch).logits
        return found


def same_slots(base: Base, method: str, **config: Any) -> tuple[MethodModule, MethodModule]:
    """Prefix-tuning, and a method with the same slots."""
    plain = tiny_method(base, "prefix_tuning").eval()
    return plain, tiny_method(base, method, **config).eval()


AS_PREFIX_TUNING: dict[str, tuple[str, dict[str, Any]]] = {
    "apt, gates at one": ("apt", {}),
    "apt of the mean, gates at one": ("apt", {"gate_from": "mean"}),
    "one block": ("hierarchical_blocking", {"blocks": 1}),
    "all slots, tau 1": ("sparse_prefix", {"top_k": 5}),
    "all of the attention, tau 1": ("sparse_prefix", {"top_k": None, "top_p": 1.0}),
}


@pytest.mark.parametrize("case", AS_PREFIX_TUNING)
def test_special_cases_are_prefix_tuning(architecture: str, case: str) -> None:
    method, config = AS_PREFIX_TUNING[case]
    base = tiny_base(architecture)
    plain, other = same_slots(base, method, **config)
    batch = tiny_batch(architecture, "right")
    real = is_output(batch)
    torch.testing.assert_close(logits(base, batch, other)[real], logits(base, batch, plain)[real], rtol=1e-4, atol=2e-4)


AS_THE_BASE: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gates at zero": ("llama_adapter", {"initial_gate": 0.0}, True),
    "a memory of zeros": ("prefix_memory", {"initial_scale": 0.0}, True),
    "a memory of zeros behind": ("prefix_memory", {"initial_scale": 0.0, "place": "after_projection"}, True),
    "networks of zeros": ("inducer", {"initial_scale": 0.0}, True),
    "networks of zeros before": ("inducer", {"initial_scale": 0.0, "value_extension": False}, True),
    "no sums": ("ntk_attention", {"initial_scale": 0.0}, False),
}
"""A method, its config, and whether it is the base bit for bit."""


@pytest.mark.parametrize("case", AS_THE_BASE)
def test_special_cases_are_the_base(architecture: str, case: str) -> None:
    method, config, exactly = AS_THE_BASE[case]
    base = tiny_base(architecture)
    module = tiny_method(base, method, **config).eval()
    with torch.no_grad():
        for parameter in () if exactly else module.parameters():  # its start is near the base, not the base
            parameter.zero_()
    batch = tiny_batch(architecture, "right")
    real = is_output(batch)
    wanted = base.model(**batch).logits[real]
    found = logits(base, batch, module)[real]
    if exactly:
        assert torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)


def test_a_prompt_is_soft_tokens_in_front(architecture: str) -> None:
    """In causal bases, and in T5's encoder, which adds no positions to its embeddings."""
    if architecture not in (*DECODER_ONLY, "t5"):
        pytest.skip("positions are added to embeddings: rows enter behind that")
    if architecture in ("mistral", "gemma2", "gemma3"):
        pytest.skip("soft tokens leave a window, slots do not")
    base = tiny_base(architecture)
    module = tiny_method(base, "prompt_tuning").eval()
    rows = next(module.parameters()).detach()
    batch = tiny_batch(architecture)
    found = logits(base, batch, module)
    embedded = base.model.get_input_embeddings()(batch["input_ids"])
    num_rows, length = embedded.shape[:2]
    given: dict[str, Tensor] = {
        "inputs_embeds": torch.cat([rows.expand(num_rows, -1, -1), embedded], dim=1),
        "attention_mask": torch.ones(num_rows, len(rows) + length, dtype=torch.long),
    }
    if architecture == "t5":
        given["decoder_input_ids"] = batch["decoder_input_ids"]
    with torch.no_grad():
        wanted = base.model(**given).logits
    if architecture != "t5":
        wanted = wanted[:, len(rows) :]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "gpt_neox", "bert", "t5"])
def test_propagated_rows_are_added_to_at_every_layer(architecture: str) -> None:
    base = tiny_base(architecture)
    module = tiny_method(base, "prefix_propagation").eval()
    batch = tiny_batch(architecture)
    found = logits(base, batch, module)
    kind = "self" if architecture in DECODER_ONLY else "encoder_self"
    sites = find_sites(base.model).of_kinds((kind,))
    added = [p.detach() for p in module.parameters()]
    num_rows, P = len(batch["input_ids"]), len(added[0])
    handles = []
    is_first = architecture == "bert"  # positions are added to its embeddings: its rows enter at the first layer

    def adder(offset: Tensor, place: int) -> Any:
        def add(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if is_first and place == 0:
                states = torch.cat([states.new_zeros(num_rows, P, states.shape[2]), states], dim=1)
            states = torch.cat([states[:, :P] + offset, states[:, P:]], dim=1)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return add

    for place, (site, offset) in enumerate(zip(sites, added, strict=True)):
        layer = base.model.get_submodule(site.layer_module)
        handles.append(layer.register_forward_pre_hook(adder(offset, place), with_kwargs=True))
    given = {k: v for k, v in batch.items() if k in ("decoder_input_ids",)}
    embedded = base.model.get_input_embeddings()(batch["input_ids"])
    zeros = embedded.new_zeros(num_rows, P, embedded.shape[2])
    with torch.no_grad():
        if is_first:
            states = base.model.bert.embeddings(input_ids=batch["input_ids"])
            encoded = base.model.bert.encoder(states)[0]
            wanted = base.model.cls(encoded)[:, P:]
        else:
            wanted = base.model(inputs_embeds=torch.cat([zeros, embedded], dim=1), **given).logits
            wanted = wanted if architecture == "t5" else wanted[:, P:]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-4)


def places(is_target: list[int], index: list[int], source_length: int) -> Places:
    target = torch.tensor([is_target]).bool()
    return Places(
        is_source=~target, is_target=target, index=torch.tensor([index]),
        source_length=torch.full((1, len(index)), source_length), text=torch.zeros(1, len(index), dtype=torch.long),
        num_texts=1, begins=True,
    )  # fmt: skip


def test_segments_are_equal_parts_of_a_source_and_fixed_ones_of_a_target() -> None:
    where = places([0] * 6 + [1] * 6, [*range(6), *range(6)], source_length=6)
    assert segments(where, 2, 4).tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]]
    assert segments(where, 3, 6).tolist() == [[0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("architecture", DECODER_ONLY)
def test_a_block_is_seen_by_its_own_segment_alone(architecture: str) -> None:
    """The source of five columns is four tokens of its own; of its last two sees the second block, then the target's
    second half: no logit before a segment moves with its block."""
    base = tiny_base(architecture)
    batch = tiny_batch(architecture)
    config = {"blocks": 2, "blocked_layers": 1.0, "target_tokens": 4, "num_virtual_tokens": 4}
    module = tiny_method(base, "hierarchical_blocking", **config).eval()
    before = logits(base, batch, module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[:, 2:] += 1.0  # the second block
    moved = (logits(base, batch, module) - before).abs().amax(dim=(0, 2)) > 1e-5
    assert moved.tolist() == [False, False, True, True, True, True, True, True, True]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[:, :2] += 1.0  # the first block: it is in sight from the first token on
    assert bool(((logits(base, batch, module) - before).abs().amax(dim=(0, 2)) > 1e-5).all())


def test_only_the_most_seen_slots_are_left() -> None:
    """Top-k by hand: slots that no token looks at can be anything."""
    base = tiny_base("llama")
    batch = tiny_batch("llama")
    module = tiny_method(base, "sparse_prefix", top_k=1, soft=False).eval()
    plain = tiny_method(base, "prefix_tuning").eval()
    assert not torch.allclose(logits(base, batch, module), logits(base, batch, plain))
    few, many = (tiny_method(base, "sparse_prefix", top_k=None, top_p=p, soft=False).eval() for p in (0.01, 0.999999))
    torch.testing.assert_close(logits(base, batch, few), logits(base, batch, module))
    torch.testing.assert_close(logits(base, batch, many), logits(base, batch, plain), rtol=1e-4, atol=2e-4)


def test_a_temperature_sharpens_scores_of_slots() -> None:
    base = tiny_base("llama")
    module = tiny_method(base, "sparse_prefix", top_k=None).eval()
    plain = tiny_method(base, "prefix_tuning").eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "_own" in name:
                parameter.fill_(-0.5)
        for name, parameter in plain.named_parameters():
            if "keys" in name:
                parameter *= torch.exp(torch.tensor(0.5))
    batch = tiny_batch("llama")
    torch.testing.assert_close(logits(base, batch, module), logits(base, batch, plain), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("method", "count"), [("apt", 5 * 2 * 2 * 10 + 48 * 5 + 1), ("ntk_attention", 6 * (100 + 10)),
                                               ("prefix_memory", 6 * 100), ("prefix_propagation", 5 * 48),
                                               ("llama_adapter", 5 * 48 + 6)])  # fmt: skip
def test_what_is_trained_at_a_layer_is_as_many_values_as_the_papers_count(method: str, count: int) -> None:
    """llama: 6 heads of width 10 in 2 groups, hidden width 48."""
    module = tiny_method(tiny_base("llama"), method)
    assert sum(p.numel() for p in module.parameters()) == 3 * count


def test_ntk_attention_trains_from_its_start(architecture: str) -> None:
    """k at exactly 0 would never move."""
    base = tiny_base(architecture)
    found = method_class("ntk_attention")
    module = found.build(base, found.Config())
    with attached(base.model, module):
        base.model(**tiny_batch(architecture)).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_the_sweep_knows_every_method() -> None:
    assert {m for m, _ in AS_PREFIX_TUNING.values()} | {m for m, _, _ in AS_THE_BASE.values()} <= METHOD_CONFIGS.keys()
