"""An attached base is what it should be at every site; detached it is the base; rows keep to themselves."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    DECODER_ONLY,
    ENCODER_DECODER,
    NOT_ON,
    SOURCE_COLUMNS,
    UNLIKE,
    is_output,
    tell_sources,
    tiny_base,
    tiny_batch,
    tiny_method,
    tiny_model,
    tiny_pair,
)
from torch import Tensor

from antefix.attach import attach, attached, current_attachment
from antefix.attachment import Attachment
from antefix.attention import reference
from antefix.base import Base
from antefix.errors import BaseModelError, PrefixError
from antefix.methods import METHODS, method_class
from antefix.methods.base import MethodModule
from antefix.sites import find_sites

NEAR = {"rtol": 1e-4, "atol": 1e-4}
"""Logits of the tiny models are about 10 in size."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest) -> Base:
    return tiny_base(request.param)


def name_of(base: Base) -> str:
    return base.name.removeprefix("tiny-")


def logits(base: Base, batch: dict[str, Tensor], source_columns: int = SOURCE_COLUMNS) -> Tensor:
    tell_sources(base, source_columns)
    with torch.no_grad():
        return base.model(**batch).logits


def row_slots(base: Base, modules: Sequence[MethodModule], rows: Sequence[int]) -> dict[str, reference.RowSlots]:
    """Module path -> the slots of every row, as the reference takes them."""
    slots = [m.slots() for m in modules]
    return {
        s.module: [tuple(slots[r][s.name]) if r >= 0 and s.name in slots[r] else None for r in rows]
        for s in find_sites(base.model).attention
    }


def seen_from(base: Base, module: MethodModule, num_rows: int) -> list[int] | None:
    """The first query of every row that sees the slots."""
    of_targets = module.for_targets and not base.model.config.is_encoder_decoder
    return [SOURCE_COLUMNS - 1] * num_rows if of_targets else None


def shifted(batch: dict[str, Tensor], modules: Sequence[MethodModule], rows: Sequence[int]) -> dict[str, Tensor]:
    """The batch with its tokens behind the slots of prefixes that stand before them."""
    places = [modules[r].num_virtual_tokens if r >= 0 and modules[r].positions == "shifted" else 0 for r in rows]
    if not any(places):
        return batch
    return {**batch, "position_ids": batch["position_ids"] + torch.tensor(places)[:, None]}


@pytest.mark.parametrize(
    ("rows", "padding"),
    [([0, 0, 0, 0], "left"), *(([1, -1, 0, 0], padding) for padding in ("none", "left", "right"))],
    ids=["shared-left", "mixed-none", "mixed-left", "mixed-right"],
)
def test_attached_is_the_reference_at_every_site(base: Base, method: str, rows: list[int], padding: str) -> None:
    """Logits and the gradient of every slot. What acts otherwise has its equations in test_branches.py."""
    batch, modules = tiny_batch(name_of(base), padding), tiny_pair(base, method)
    if any(m.branches() or m.encoder_rows() or m.linear_parts() or m.inserted() or m.symbols for m in modules):
        pytest.skip(f"{method} is more than slots")
    real = is_output(batch)
    results = []
    with attached(base.model, *modules, rows=rows):
        tell_sources(base)
        results.append(base.model(**batch).logits[real])
    with reference.at_work(base.model, row_slots(base, modules, rows), seen_from(base, modules[0], len(rows))):
        results.append(base.model(**shifted(batch, modules, rows)).logits[real])
    torch.testing.assert_close(*results, **NEAR)
    used = [m for n, m in enumerate(modules) if n in rows]
    parameters = [p for m in used for name, p in m.named_parameters() if not name.startswith("speaker")]
    weights = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(0))
    found, wanted = (torch.autograd.grad((r * weights).sum(), parameters) for r in results)
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        # The gradient of a single number is a sum of terms that cancel: its own size says nothing of its rounding.
        scale = float(other.abs().max()) if other.numel() > 1 else largest
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * scale)
    assert float((results[0] - logits(base, batch)[real]).detach().abs().max()) > 0.1, "the prefix says something"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_a_prefix_every_bit_is_the_bases(base: Base, method: str, implementation: str) -> None:
    model, usual = base.model, base.model.config._attn_implementation
    if (name_of(base), implementation) == ("gemma2", "sdpa"):
        pytest.skip("its soft cap is beyond SDPA, with or without a prefix")
    model.set_attn_implementation(implementation)
    padding = "right" if name_of(base) in ENCODER_DECODER else "left"
    batch, (first, second) = tiny_batch(name_of(base), padding), tiny_pair(base, method)
    bare = logits(base, batch)
    state = list(model.state_dict())
    attachment = attach(model, first, second, rows=[-1, -1, -1, -1])
    assert torch.equal(logits(base, batch), bare), "rows without a prefix take the base's own call"
    attachment.rows = [0, 1, 0, 1]
    assert not torch.equal(logits(base, batch), bare)
    attachment.detach()
    attachment.detach()
    assert torch.equal(logits(base, batch), bare)
    assert list(model.state_dict()) == state
    assert model.config._attn_implementation == implementation
    assert current_attachment(model) is None
    model.set_attn_implementation(usual)


@pytest.fixture(scope="module", params=[*product(ARCHITECTURES, ["left"]), *product(UNLIKE, ["right"])], ids="-".join)
def padded_base(request: pytest.FixtureRequest) -> tuple[Base, str, dict[str, MethodModule]]:
    """A base, how its rows are padded, and a prefix of every method whose rows can differ."""
    name, padding = request.param
    base = tiny_base(name)
    found = [m for m in METHODS if name not in NOT_ON.get(m, ()) and method_class(m).acts_on_rows]
    return base, padding, {m: tiny_method(base, m) for m in found}


def test_a_batch_equals_its_rows_alone_in_any_order(
    padded_base: tuple[Base, str, dict[str, MethodModule]], method: str
) -> None:
    """Mixed with the prefixes of every other method, the last of them in the last row."""
    base, padding, of_methods = padded_base
    name = name_of(base)
    beside_the_text = (
        {"prompt_tuning", "prefix_propagation", "bbt", "bbt_v2"} if (name, padding) == ("t5", "left") else set()
    )
    if method in beside_the_text:
        pytest.skip("its rows stand right before the text, and padding must not come between")
    others = [module for m, module in of_methods.items() if m != method and m not in beside_the_text]
    modules = [*tiny_pair(base, method), *others]
    rows = [1, -1, 0, len(modules) - 1]
    if (name, padding) == ("bart", "left"):
        pytest.skip("BART's encoder counts padding as positions, with or without a prefix")
    batch = tiny_batch(name, padding)
    real = is_output(batch)
    alone = [_row_alone(base, batch, row, None if rows[row] < 0 else modules[rows[row]]) for row in range(4)]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        with attached(base.model, *modules, rows=[rows[r] for r in order]):
            together = logits(base, {key: value[order] for key, value in batch.items()})
        for place, row in enumerate(order):
            words = alone[row].shape[-1]  # further ones are new tokens of other rows
            torch.testing.assert_close(together[place][real[row], :words], alone[row], **NEAR)
            assert bool(torch.isneginf(together[place][real[row], words:]).all())


def _row_alone(base: Base, batch: dict[str, Tensor], row: int, module: MethodModule | None) -> Tensor:
    """The logits of a batch's row without the others and without padding, with a prefix or with the bare base."""
    alone = {key: value[row : row + 1] for key, value in batch.items()}
    seen = batch["attention_mask"][row].bool()
    for key in ("input_ids", "attention_mask", "position_ids"):
        if key in alone:
            alone[key] = alone[key][:, seen]
    if module is None:
        return logits(base, alone)[0]
    with attached(base.model, module):
        return logits(base, alone, int(seen[:SOURCE_COLUMNS].sum()))[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_a_bfloat16_base_carries_a_float32_prefix(name: str, method: str) -> None:
    if not method_class(method).acts_on_rows:
        pytest.skip(f"{method} trains the base's own weights, in float32")
    wide, narrow = tiny_base(name), Base(tiny_model(name, torch.bfloat16), tiny_base(name).tokenizer, name)
    module, batch = tiny_method(wide, method), tiny_batch(name, "right")
    real = is_output(batch)
    with attached(narrow.model, module), attached(wide.model, module):
        tell_sources(narrow)
        rounded, exact = narrow.model(**batch).logits[real], logits(wide, batch)[real]
    assert rounded.dtype == torch.bfloat16
    rounded.float().sum().backward()
    parameters = [p for name, p in module.named_parameters() if not name.startswith("speaker")]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
    assert float((rounded.float() - exact).detach().abs().mean()) < 0.1 * float(exact.abs().mean())


def test_a_float64_base_carries_a_float32_prefix(method: str) -> None:
    if method_class(method).weights is not MethodModule.weights:
        pytest.skip(f"{method} trains the base's own weights, in float32")
    wide, exact = tiny_base("llama"), Base(tiny_model("llama", torch.float64), tiny_base("llama").tokenizer, "llama")
    module, batch = tiny_method(wide, method), tiny_batch("llama", "right")
    real = is_output(batch)
    with attached(exact.model, module), attached(wide.model, module):
        tell_sources(exact)
        found, wanted = exact.model(**batch).logits[real], logits(wide, batch)[real]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), wanted, **NEAR)


@pytest.fixture
def llama() -> Base:
    return tiny_base("llama")


def test_an_implementation_that_is_changed_under_a_prefix_is_noticed(llama: Base) -> None:
    with attached(llama.model, tiny_method(llama)):
        llama.model.set_attn_implementation("eager")
        with pytest.raises(PrefixError, match="takes the prefix off: detach it, and attach it again"):
            logits(llama, tiny_batch("llama"))
    logits(llama, tiny_batch("llama"))


def test_a_second_attachment_takes_over_and_gives_back(llama: Base) -> None:
    batch, (first, second) = tiny_batch("llama"), tiny_pair(llama)
    bare = logits(llama, batch)
    outer = attach(llama.model, first)
    with_first = logits(llama, batch)
    inner = attach(llama.model, second)
    with_second = logits(llama, batch)
    with attached(llama.model, first):
        assert torch.equal(logits(llama, batch), with_first)
    assert torch.equal(logits(llama, batch), with_second)
    outer.detach()  # out of order: the later one stays at work
    assert torch.equal(logits(llama, batch), with_second)
    inner.detach()
    assert torch.equal(logits(llama, batch), bare)


def test_an_exception_leaves_nothing_behind(llama: Base) -> None:
    batch, (first, _) = tiny_batch("llama"), tiny_pair(llama)
    bare = logits(llama, batch)
    broken = llama.model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), attached(llama.model, first):
        llama.model(**batch)
    broken.remove()
    assert torch.equal(logits(llama, batch), bare)


def test_what_cannot_go_to_work_leaves_what_was_there_at_work(llama: Base) -> None:
    def fails_once(*args: Any, **options: Any) -> None:
        del llama.model.__dict__["register_forward_pre_hook"]
        raise MemoryError

    batch, (first, second) = tiny_batch("llama"), tiny_pair(llama)
    bare = logits(llama, batch)
    with attached(llama.model, first):
        with_first = logits(llama, batch)
        waiting = Attachment(llama.model, [second], [second])
        llama.model.__dict__["register_forward_pre_hook"] = fails_once  # the last thing it asks for
        with pytest.raises(MemoryError):
            waiting.begin()
        assert torch.equal(logits(llama, batch), with_first)
        waiting.detach()
    assert torch.equal(logits(llama, batch), bare)


def test_an_interrupted_pass_is_forgotten(llama: Base) -> None:
    """Ctrl-C in a notebook: the next pass must see the slots as they are then."""
    batch, (module, _) = tiny_batch("llama"), tiny_pair(llama)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with attached(llama.model, module):
        hook = llama.model.model.layers[1].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama.model(**batch)
        hook.remove()
        before = logits(llama, batch)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        changed = logits(llama, batch)
    with attached(llama.model, module):
        assert torch.equal(logits(llama, batch), changed)
    assert not torch.equal(before, changed)


def test_a_copy_of_an_attached_model_is_attached_by_itself(llama: Base) -> None:
    batch, (module, _) = tiny_batch("llama"), tiny_pair(llama)
    bare = logits(llama, batch)
    with attached(llama.model, module):
        twin = copy.deepcopy(llama.model)
        wanted = logits(llama, batch)
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, wanted)
        attachment = current_attachment(twin)
        assert attachment is not None
        attachment.detach()
        assert torch.equal(twin(**batch).logits, bare)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_written_into_counts_anew(
    llama: Base, mode: type[torch.no_grad] | type[torch.inference_mode]
) -> None:
    module, _ = tiny_pair(llama)
    batch = tiny_batch("llama")
    with attached(llama.model, module), mode():
        mask = torch.ones(4, 1, 9, 9, dtype=torch.bool).tril()
        before = llama.model(batch["input_ids"], attention_mask=mask).logits
        mask[:, :, 5:, 2] = False
        after = llama.model(batch["input_ids"], attention_mask=mask).logits
        assert torch.equal(after, llama.model(batch["input_ids"], attention_mask=mask.clone()).logits)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_shifted_tokens_stand_p_further_on(name: str) -> None:
    base, batch = tiny_base(name), tiny_batch(name, "left")
    modules = [tiny_method(base, num_virtual_tokens=p, positions="shifted") for p in (5, 2)]
    in_place = [tiny_method(base, num_virtual_tokens=p) for p in (5, 2)]
    rows, moves = [1, -1, 0, 0], torch.tensor([2, 0, 5, 5])
    real = is_output(batch)
    with attached(base.model, *in_place, rows=rows):
        wanted = logits(base, {**batch, "position_ids": batch["position_ids"] + moves[:, None]})
    counted_for_them = {key: value for key, value in batch.items() if key != "position_ids"}
    with attached(base.model, *modules, rows=rows):
        for given in (batch, counted_for_them):
            torch.testing.assert_close(logits(base, given)[real], wanted[real], **NEAR)


def test_positions_end_where_the_learned_ones_do() -> None:
    base = tiny_base("gpt2")
    base.model.config.n_positions = 12
    module = tiny_method(base, positions="shifted")
    with attached(base.model, module):
        logits(base, {"input_ids": torch.ones(1, 7, dtype=torch.long)})
        with pytest.raises(
            PrefixError, match=r"a token would stand at position 12, the base's last one is 11: .* up to 5"
        ):
            base.model(torch.ones(1, 8, dtype=torch.long))


@pytest.mark.parametrize("name", ["bart", "t5", "roberta"])
def test_bases_that_do_not_count_from_0_refuse_to_shift(name: str) -> None:
    base = tiny_base(name)
    with pytest.raises(PrefixError, match="positions = 'shifted' needs a base that takes position_ids"):
        tiny_method(base, positions="shifted")


def test_what_does_not_fit_is_said(llama: Base) -> None:
    first, second = tiny_pair(llama)
    with pytest.raises(PrefixError, match="nothing to attach"):
        attach(llama.model)
    with attached(llama.model, first, second) as attachment:
        with pytest.raises(PrefixError, match="2 prefixes are attached: say which row carries which"):
            logits(llama, tiny_batch("llama"))
        for rows in ([0, 2], [-2], []):
            with pytest.raises(PrefixError, match=r"rows must be indices from -1 \(none\) to 1"):
                attachment.rows = rows
        attachment.rows = [0, 1, 1]
        with pytest.raises(PrefixError, match=r"the batch has 4 rows, attachment.rows has 3"):
            logits(llama, tiny_batch("llama"))
    with pytest.raises(
        PrefixError,
        match=r"keys of shape \(6, \d+, 8\) and values of shape \(6, \d+, 8\) at layers.0.self, this base takes \(2, ",
    ):
        attach(llama.model, tiny_method(tiny_base("gpt2")))
    with pytest.raises(PrefixError, match=r"slots at layers.0.encoder_self, this base has no such site, but layers"):
        attach(llama.model, tiny_method(tiny_base("bart")))
    first.slots = lambda: {"layers.0.self": tuple(second.slots()["layers.0.self"])}
    with pytest.raises(PrefixError, match=r"slots at layers.0.self are of type tuple: make them a KeyValue"):
        attach(llama.model, first)
    del first.slots
    llama.model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        BaseModelError, match="the model uses attention 'flex_attention', a prefix needs one of sdpa, eager"
    ):
        attach(llama.model, first)
    assert current_attachment(llama.model) is None


def test_scores_that_the_merge_does_not_know_are_refused(llama: Base) -> None:
    module, _ = tiny_pair(llama)
    with attached(llama.model, module), pytest.raises(BaseModelError, match="its attention takes 'sinks'"):
        llama.model(**tiny_batch("llama"), sinks=torch.zeros(1))


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


def test_a_pass_without_gradients_leaves_nothing() -> None:
    """What it was given may hold a cache."""
    base, mask = tiny_base("llama"), torch.ones(1, 3, dtype=torch.long)
    with attached(base.model, tiny_method(base)), torch.no_grad():
        given = weakref.ref(mask)
        base.model(torch.tensor([[5, 6, 7]]), attention_mask=mask)
        del mask
        assert given() is None


def test_a_step_leaves_no_graph() -> None:
    base = tiny_base("llama")
    read: list[weakref.ref[Tensor]] = []
    for name, module in base.model.named_modules():
        if name.endswith("gate_proj"):
            module.register_forward_pre_hook(lambda module, args: read.append(weakref.ref(args[0])))
    with attached(base.model, tiny_method(base, "adapter", form="parallel")):
        base.model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
        gc.collect()
        assert {states() for states in read} == {None}
