"""Prefixes out of prefixes: what comes out attends as it says, and what it is not defined for is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import METHOD_CONFIGS, NOT_ON, tiny_base, tiny_method
from test_bank import run, run_json, usage_error
from test_prefix_file import IDS, logits
from torch import Tensor

from antefix.attach import attached
from antefix.attention import reference
from antefix.bank import Bank
from antefix.base import Base
from antefix.compose import average, concatenate, interpolate, subtract, truncate
from antefix.data import Example
from antefix.data.linearise import TextFormat
from antefix.errors import AntefixError, PrefixError, WrongBaseError
from antefix.methods import method_class
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.rotary import moved
from antefix.sites import find_sites, record_text
from antefix.slot_attention import slot_attention

RECORD = {"seed": 0, "steps": 1}


def kept(base: Base, method: str = "prefix_tuning", seed: int = 1, **config: Any) -> Prefix:
    """A random prefix, as it is kept; `config` changes METHOD_CONFIGS."""
    module = tiny_method(base, method, seed, **config)
    choices = method_class(method).Config.model_validate({**METHOD_CONFIGS[method], **config})
    card = Card(
        method=method, config=choices.model_dump(mode="json"), positions=module.positions, training=RECORD,
        base=BaseRecord(name=base.name, fingerprint=base.fingerprint), tags=(f"seed-{seed}",),
    )  # fmt: skip
    return Prefix(module.kept_tensors(), card)


def with_card(prefix: Prefix, **changes: Any) -> Prefix:
    return Prefix(prefix.tensors, prefix.card.model_copy(update=changes))


def base_of(method: str) -> Base:
    return tiny_base(next(name for name in ("llama", "bart", "bert") if name not in NOT_ON.get(method, ())))


def by_reference(base: Base, *prefixes: Prefix) -> Tensor:
    """Logits where attention is over the union of tokens and all slots, by the slow twin."""
    slots = {}
    for site in find_sites(base.model).attention:
        pair = [torch.cat([p.tensors[f"{site.name}.{part}"] for p in prefixes], 1) for part in ("key", "value")]
        slots[site.module] = [(pair[0], pair[1])] * len(IDS)
    with torch.no_grad(), reference.at_work(base.model, slots):  # type: ignore[arg-type]
        return base.model(input_ids=IDS).logits


# ---- concatenate


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_tokens_attend_to_the_slots_of_both(architecture: str) -> None:
    base = tiny_base(architecture)
    one, other = kept(base), kept(base, seed=2, num_virtual_tokens=2)
    both = concatenate({"one": one, "other": other})
    wanted = by_reference(base, one, other)
    assert torch.allclose(logits(base.model, both), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(base.model, one), wanted, atol=1e-2)
    card = both.card
    assert (card.parents, card.config["num_virtual_tokens"]) == (("one", "other"), 7)
    assert card.training == {"operation": "concatenate", "positions": "in_place"}
    assert (card.tags, card.scores) == (("seed-1", "seed-2"), {})


def test_shifted_prefixes_put_in_place_keep_their_distance() -> None:
    base = tiny_base("llama")
    one = kept(base, positions="shifted")
    alone = Prefix(
        {**one.tensors, **{f"{n}.key": k for n, k in moved(base.model, keys_of(one), -5).items()}},
        one.card.model_copy(update={"positions": "in_place", "config": {**one.card.config, "positions": "in_place"}}),
    )
    assert torch.allclose(logits(base.model, alone), logits(base.model, one), atol=1e-4)
    other = kept(base, seed=2, num_virtual_tokens=2)
    both = concatenate({"one": one, "other": other}, model=base.model)
    assert both.card.positions == both.card.config["positions"] == "in_place"
    assert torch.allclose(logits(base.model, both), by_reference(base, alone, other), rtol=1e-4, atol=1e-4)


def keys_of(prefix: Prefix) -> dict[str, Tensor]:
    return {n.removesuffix(".key"): t for n, t in prefix.tensors.items() if n.endswith(".key")}


def test_shifted_texts_stand_one_behind_the_other() -> None:
    """The keys and values of a text in two parts, each read from 0, make those that its parts had in their places."""
    base = tiny_base("llama")
    one, other = kept(base, positions="shifted"), kept(base, seed=2, num_virtual_tokens=2, positions="shifted")
    both = concatenate({"one": one, "other": other}, positions="shifted", model=base.model)
    assert (both.card.positions, both.card.config["positions"]) == ("shifted", "shifted")
    for site in find_sites(base.model).attention:
        key = both.tensors[f"{site.name}.key"]
        assert torch.equal(key[:, :5], one.tensors[f"{site.name}.key"]), "the first stays where it is"
        assert torch.allclose(key[:, 5:], moved(base.model, keys_of(other), 5)[site.name], atol=1e-5)
    in_place = concatenate({"other": kept(base, seed=2, num_virtual_tokens=2), "one": kept(base)}, positions="shifted",
                           model=base.model)  # fmt: skip
    key, was = (p.tensors["layers.0.self.key"][:, 2:] for p in (in_place, concatenated_plainly(base)))
    assert torch.allclose(key, moved(base.model, {"layers.0.self": was}, 7)["layers.0.self"], atol=1e-5)


def concatenated_plainly(base: Base) -> Prefix:
    return concatenate({"other": kept(base, seed=2, num_virtual_tokens=2), "one": kept(base)})


def test_what_cannot_be_concatenated() -> None:
    base, gpt2 = tiny_base("llama"), tiny_base("gpt2")
    one, other = kept(base), kept(base, seed=2)
    refused: list[tuple[dict[str, Prefix], dict[str, Any], str]] = [
        ({"one": one}, {}, "takes two prefixes or more"),
        ({"one": one, "b": kept(gpt2)}, {}, "'one' and 'b' cannot be concatenated: base is"),
        ({"one": one, "b": kept(base, "infix")}, {}, "method is prefix_tuning in one and infix in the other"),
        ({"one": one, "b": kept(base, positions="shifted")}, {}, "turns their keys: give their base's model"),
        ({"one": one, "b": other}, {"positions": "shifted"}, "turns their keys: give their base's model"),
        ({"a": kept(base, "infix"), "b": kept(base, "infix", 2)}, {"positions": "shifted", "model": base.model},
         "infix cannot be shifted: its prefixes are in_place"),
        ({"a": kept(base, "prompt_tuning"), "b": kept(base, "prompt_tuning", 2)},
         {"positions": "shifted", "model": base.model}, "prompt_tuning cannot be shifted"),
        ({"a": kept(gpt2, positions="shifted"), "b": kept(gpt2, seed=2)}, {"model": gpt2.model},
         "slots cannot change their places on this base: GPT2LMHeadModel has no rotary positions"),
        ({"one": one, "b": Prefix({**other.tensors, "head.weight": torch.ones(2, 3)}, other.card)}, {},
         "'b' cannot be concatenated: it has 'head.weight' beside keys and values"),
        ({"one": one, "b": Prefix(dict(list(other.tensors.items())[2:]), other.card)}, {}, "slots at other sites"),
    ]  # fmt: skip
    for parents, how, message in refused:
        with pytest.raises(PrefixError, match=message):
            concatenate(parents, **how)
    with pytest.raises(WrongBaseError):
        concatenate({"one": one, "b": other}, positions="shifted", model=gpt2.model)


# ---- truncate


def test_some_slots_are_kept_in_their_order() -> None:
    base = tiny_base("llama")
    prefix = kept(base)
    for keep, chosen in (("first", slice(0, 2)), ("last", slice(3, 5))):
        short = truncate({"a": prefix}, 2, keep=keep)  # type: ignore[arg-type]
        assert all(torch.equal(short.tensors[n], t[:, chosen]) for n, t in prefix.tensors.items())
        assert short.card.config["num_virtual_tokens"] == 2
        assert short.card.training == {"operation": "truncate", "keep": keep, "of": 5}
        logits(base.model, short)
    weights = {s.name: torch.tensor([0.1, 0.5, 0.0, 0.2, 0.4]) for s in find_sites(base.model).attention}
    weights["layers.1.self"] = torch.arange(5.0)
    short = truncate({"a": prefix}, 3, keep="attention", attention=weights)
    for name, tensor in prefix.tensors.items():
        assert torch.equal(short.tensors[name], tensor[:, [2, 3, 4] if "layers.1." in name else [1, 3, 4]])


def test_slots_that_stay_keep_their_distance_to_the_tokens() -> None:
    """With in-place positions that takes nothing; with shifted ones keys are turned, and logits are the same."""
    base = tiny_base("llama")
    shifted = kept(base, positions="shifted")
    short = truncate({"a": shifted}, 2, keep="last", model=base.model)
    keys = moved(base.model, keys_of(shifted), -3)
    assert all(torch.allclose(short.tensors[f"{n}.key"], k[:, 3:], atol=1e-5) for n, k in keys.items())
    in_place = moved(base.model, keys_of(shifted), -5)
    turned = {f"{n}.key": k for n, k in in_place.items()}
    as_in_place = {n: t[:, 3:] for n, t in {**shifted.tensors, **turned}.items()}
    card = kept(base, num_virtual_tokens=2).card
    assert torch.allclose(logits(base.model, short), logits(base.model, Prefix(as_in_place, card)), atol=1e-4)


def test_what_cannot_be_truncated() -> None:
    base, gpt2 = tiny_base("llama"), tiny_base("gpt2")
    prefix = kept(base)
    for number in (0, 5, 6):
        with pytest.raises(PrefixError, match="'a' has 5 slots: keep at least 1 and at most 4 of them"):
            truncate({"a": prefix}, number)
    with pytest.raises(PrefixError, match=r"the attention of 'a' is not known at layers.0.self.key: measure it first"):
        truncate({"a": prefix}, 2, keep="attention")
    with pytest.raises(PrefixError, match="give their base's model"):
        truncate({"a": kept(base, positions="shifted")}, 2)
    with pytest.raises(PrefixError, match="no rotary positions"):
        truncate({"a": kept(gpt2, positions="shifted")}, 2, model=gpt2.model)


EXAMPLES = [Example(source="ab", targets=("cd", "efg")), Example(source="xyz", targets=("u",))]


@pytest.mark.parametrize("method", ["prefix_tuning", "infix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bart"])
def test_attention_is_counted_as_it_is_given(architecture: str, method: str) -> None:
    """Slots with one key get one share, and no more is given than there is."""
    base = tiny_base(architecture)
    prefix = kept(base, method)
    found = slot_attention(base, prefix, EXAMPLES)
    assert found.keys() == {n.rpartition(".")[0] for n in prefix.tensors}
    for share in found.values():
        assert share.shape == (5,)
        assert bool((share > 0).all())
        assert float(share.sum()) < 1
    far = {n: t.clone() for n, t in prefix.tensors.items()}
    for name, tensor in far.items():
        if name.endswith("key"):
            tensor[:, 3] = tensor[:, 1]
    twins = slot_attention(base, Prefix(far, prefix.card), EXAMPLES)
    assert all(torch.allclose(share[1], share[3]) for share in twins.values())


@pytest.mark.parametrize("method", ["mam", "apt", "lora"])
def test_attention_is_measured_of_plain_slots_alone(method: str) -> None:
    base = tiny_base("llama")
    with pytest.raises(PrefixError, match="attention is measured of prefixes that write texts and are plain keys"):
        slot_attention(base, kept(base, method), EXAMPLES)


def test_attention_by_hand() -> None:
    """One layer's queries against the slots' keys, in one softmax with the tokens' own keys."""
    base = tiny_base("llama")
    prefix = kept(base)
    found = slot_attention(base, prefix, EXAMPLES[1:])["layers.0.self"]
    text = base.tokenizer("xyz", add_special_tokens=False)["input_ids"]
    text_format = TextFormat.from_dict(prefix.card.text_format)
    source = text_format.encode_source_cut(base.tokenizer, "xyz", for_encoder=False)[0]
    ids = torch.tensor([[*source, *text_format.encode_target(base.tokenizer, "u")][:-1]])
    assert text == list(source[: len(text)])
    call = next(c for site, c in record_text(base.model, ids) if site.name == "layers.0.self")
    query, key = call.query[0].double(), call.key[0].double()
    slots = prefix.tensors["layers.0.self.key"].double()
    shares = []
    for head in range(query.shape[0]):
        group = head // (query.shape[0] // key.shape[0])
        own = query[head] @ key[group].T * query.shape[-1] ** -0.5
        own = own.masked_fill(torch.ones_like(own).triu(1).bool(), -torch.inf)
        scores = torch.cat([query[head] @ slots[group].T * query.shape[-1] ** -0.5, own], dim=1)
        shares.append(torch.softmax(scores, dim=1)[:, :5].mean(0))
    assert torch.allclose(found.double(), torch.stack(shares).mean(0), atol=1e-5)


# ---- relatives


def test_sums_of_relatives() -> None:
    base = tiny_base("llama")
    start = kept(base, seed=3)
    one, two = (with_card(kept(base, seed=n), parents=("start",)) for n in (1, 2))
    name = "layers.1.self.value"
    a, b, s = (p.tensors[name] for p in (one, two, start))
    pair = {"one": one, "two": two}
    assert torch.allclose(average(pair).tensors[name], (a + b) / 2, atol=1e-6)
    assert torch.allclose(average(pair, [3, 1]).tensors[name], (3 * a + b) / 4, atol=1e-6)
    assert torch.allclose(interpolate(pair, 0.25).tensors[name], 0.75 * a + 0.25 * b, atol=1e-6)
    less = subtract({**pair, "start": start}, weight=0.5)
    assert torch.allclose(less.tensors[name], a - 0.5 * (b - s), atol=1e-6)
    assert less.card.parents == ("one", "two", "start")
    assert less.card.training == {"operation": "subtract", "weights": [1.0, -0.5, 0.5]}
    halves = {n: t.half() for n, t in one.tensors.items()}
    assert average({"one": Prefix(halves, one.card), "two": two}).tensors[name].dtype == torch.float16
    logits(base.model, less)


def test_who_is_a_relative() -> None:
    base = tiny_base("llama")
    one, two = kept(base, seed=1), kept(base, seed=2)
    average({"one": one, "two": two})  # one config and one seed: drawn alike
    average({"one": one, "two": with_card(two, parents=("one",), training={})})
    text = {"initial": "text", "initial_text": "some words"}
    average({"one": kept(base, **text), "two": with_card(kept(base, **text), training={"seed": 9})})  # not drawn
    strangers = "neither do they have a parent in common, nor did they start from the same values"
    refused: list[tuple[Prefix, str]] = [
        (with_card(two, training={"seed": 9}), strangers),
        (with_card(two, training={}), strangers),
        (with_card(two, training={"operation": "truncate"}), strangers),
        (kept(base, initial_scale=0.5), strangers),
        (kept(base, num_virtual_tokens=2), r"tensor 'layers.0.self.key' is \(2, 2, 10\) in one and \(2, 5, 10\)"),
        (kept(base, positions="shifted"), "positions is in_place in one and shifted in the other"),
        (kept(base, "p_tuning_v2"), "method is prefix_tuning in one and p_tuning_v2 in the other"),
        (kept(tiny_base("gpt2")), "base is"),
    ]
    for other, message in refused:
        for operation in (lambda p: average(p), lambda p: interpolate(p, 0.5)):
            with pytest.raises(PrefixError, match=message):
                operation({"one": one, "other": other})
    pair = {"one": one, "two": two}
    turned_round = concatenate({"two": two, "one": one}, positions="in_place")
    both = concatenate(pair, positions="in_place")
    average({"both": both, "child": with_card(both, parents=("both",), training={"seed": 3})})
    for unlike in (
        {"both": both, "turned": turned_round},
        {"first": truncate({"one": one}, 2), "last": truncate({"one": one}, 2, keep="last")},
    ):
        with pytest.raises(PrefixError, match=strangers):
            average(unlike)
    for share in (math.nan, math.inf, 1e39):
        with pytest.raises(PrefixError, match="weights"):
            interpolate(pair, share)
    with pytest.raises(PrefixError, match="'two' was not made from 'start'"):
        subtract({"one": one, "two": two, "start": kept(base, seed=3)})
    for weights, message in (([1.0], "1 weights for 2"), ([1.0, -1.0], "give numbers from 0"), ([0, 0], "not all")):
        with pytest.raises(PrefixError, match=message):
            average({"one": one, "two": two}, weights)


# ---- every method


def test_every_method_is_taken_or_refused(method: str) -> None:
    base = base_of(method)
    one, two = kept(base, method), kept(base, method, seed=2)
    parents = {"one": one, "two": two}
    folds = method_class(method).folds_to_key_value
    plain = {n.rpartition(".")[2] for n in one.tensors} == {"key", "value"}
    if folds and plain:
        both = concatenate(parents, positions=one.card.positions, model=base.model)
        short = truncate({"one": one}, 2, model=base.model)
        for made, count in ((both, 10), (short, 2)):
            assert {t.shape[1] for t in made.tensors.values()} == {count}
            made.module(base.model)
    else:
        why = "beside keys and values" if folds else "is not kept as plain keys and values"
        with pytest.raises(PrefixError, match=f"'one' cannot be concatenated: .* {why}"):
            concatenate(parents)
        with pytest.raises(PrefixError, match=f"'one' cannot be truncated: .* {why}"):
            truncate({"one": one}, 1)
    mean = average({"one": one, "two": with_card(two, parents=("one",))})
    assert all(torch.allclose(t, (one.tensors[n] + two.tensors[n]) / 2, atol=1e-6) for n, t in mean.tensors.items())
    module = mean.module(base.model)
    with attached(base.model, module):
        pass


def test_a_union_is_refused() -> None:
    base = tiny_base("llama")
    union_of = method_class("prefix_tuning+bitfit")
    module = union_of.build(base, union_of.Config.model_validate({"prefix_tuning": METHOD_CONFIGS["prefix_tuning"]}))
    card = kept(base).card.model_copy(update={"method": "prefix_tuning+bitfit", "config": {}})
    union = Prefix(module.kept_tensors(), card)
    with pytest.raises(PrefixError, match=r"'a' cannot be concatenated: prefix_tuning\+bitfit is not kept"):
        concatenate({"a": union, "b": union})


# ---- the commands


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    base, bank = tiny_base("llama"), Bank(tmp_path / "bank")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    bank.add("start", kept(base, seed=3))
    for n, name in enumerate(("one", "two"), 1):
        bank.add(name, with_card(kept(base, seed=n), parents=("start",)))
    return bank


def test_the_commands(bank: Bank, tmp_path: Path) -> None:
    where = ("--bank", str(bank.folder))
    base = ("--base", str(tmp_path / "base"))
    said = run("concatenate", "one", "two", "--as", "both", *where)
    assert said == f"both is in {bank.folder / 'both'}, made from one, two\n"
    assert run_json("concatenate", "one", "two", "--as", "behind", "--positions", "shifted", *base, *where) == {
        "name": "behind", "folder": str(bank.folder / "behind"), "parents": ["one", "two"],
        "operation": "concatenate", "positions": "shifted", "num_virtual_tokens": 10,
    }  # fmt: skip
    assert run_json("truncate", "both", "--slots", "3", "--as", "short", *where)["num_virtual_tokens"] == 3
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"source": "ab", "target": t}) for t in ("cd", "efg")))
    words = ("--slots", "2", "--keep", "attention", "--data", str(data), "--as", "seen", *base, *where)
    assert run_json("truncate", "one", *words)["keep"] == "attention"
    assert run_json("average", "one", "two", "--as", "mean", *where)["weights"] == [0.5, 0.5]
    assert run_json("interpolate", "one", "two", "--share", "0.25", "--as", "mix", *where)["weights"] == [0.75, 0.25]
    assert run_json("subtract", "one", "two", "--from", "start", "--as", "less", *where)["operation"] == "subtract"
    assert [e["name"] for e in run_json("list", "--parent", "two", *where)] == ["behind", "both", "less", "mean", "mix"]
    for words_, message in (
        (("concatenate", "one", "one", "--as", "x"), "'one' is named twice"),
        (("truncate", "one", "--slots", "2", "--as", "x", "--keep", "attention"), "--data go together"),
        (("average", "one", "both", "--as", "x"), "are no relatives"),
    ):
        with pytest.raises(AntefixError, match=message):
            run(*words_, *where)
    said = usage_error("concatenate", "one", "two", "--as", "x", "--positions", "up", *where)
    assert "'up' is not one of 'in_place', 'shifted'" in said
    said = usage_error("truncate", "one", "--slots", "2", "--as", "x", "--keep", "best", *where)
    assert "'best' is not one of 'first', 'last', 'attention'" in said
    assert "x" not in bank
