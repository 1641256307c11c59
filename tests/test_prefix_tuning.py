"""Prefix-tuning: the paper's numbers and orders, where training starts, and what a config may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_base, tiny_batch, tiny_method
from pydantic import ValidationError

from antefix.attach import attached
from antefix.errors import PrefixError
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.initial import random_slots
from antefix.parts.key_value import DirectSlots, KeyValue, NetworkSlots
from antefix.sites import Kind, Site, find_sites, record_text


def sites_of(layers: int, heads: int, width: int, kinds: tuple[Kind, ...] = ("self",)) -> list[Site]:
    return [
        Site(n, kind, "", heads, heads, width, width, heads * width, "", None) for kind in kinds for n in range(layers)
    ]


GPT2_SMALL = transformers.GPT2Config()
GPT2_MEDIUM = transformers.GPT2Config(n_layer=24, n_embd=1024, n_head=16)
GPT2_LARGE = transformers.GPT2Config(n_layer=36, n_embd=1280, n_head=20)
BART_LARGE = transformers.BartConfig()
THREE: tuple[Kind, ...] = ("self", "encoder_self", "cross")


def counts(config: Any, slots: int, hidden: int | None, kinds: tuple[Kind, ...], embedding: int) -> tuple[int, int]:
    """Values stored, values trained; no memory is taken."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    sites = sites_of(layers, heads, config.hidden_size // heads, kinds)
    with torch.device("meta"):
        network = NetworkSlots(sites, slots, embedding, hidden)
        stored = sum(t.numel() for pair in network().values() for t in pair)
    return stored, sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("config", "slots", "hidden", "kinds", "stored", "trained"),
    [
        (GPT2_SMALL, 10, 512, ("self",), 184_320, 9_857_024),
        (GPT2_MEDIUM, 1, 512, ("self",), 49_152, 25_740_800),
        (GPT2_MEDIUM, 5, 512, ("self",), 245_760, 25_744_896),
        (GPT2_MEDIUM, 6, 512, ("self",), 294_912, 25_745_920),
        (GPT2_MEDIUM, 10, 512, ("self",), 491_520, 25_750_016),
        (GPT2_LARGE, 5, 512, ("self",), 460_800, 47_940_352),
        (GPT2_LARGE, 10, 512, ("self",), 921_600, 47_946_752),
        (BART_LARGE, 1, 800, THREE, 73_728, 61_519_200),
        (BART_LARGE, 100, 512, THREE, 7_372_800, 39_704_064),
        (BART_LARGE, 100, 800, THREE, 7_372_800, 61_823_328),
        (BART_LARGE, 200, 512, THREE, 14_745_600, 40_011_264),
        (BART_LARGE, 200, 800, THREE, 14_745_600, 62_130_528),
    ],
)
def test_as_many_values_as_the_papers_code(
    config: Any, slots: int, hidden: int, kinds: tuple[Kind, ...], stored: int, trained: int
) -> None:
    assert counts(config, slots, hidden, kinds, config.hidden_size) == (stored, trained)


def test_counts_of_single_pieces() -> None:
    assert counts(GPT2_MEDIUM, 5, None, ("self",), 512) == (245_760, 25_217_536), "the paper's formula, k = 512"
    with torch.device("meta"):
        one = NetworkSlots(sites_of(12, 16, 64), 200, 1024, 800)
    assert sum(p.numel() for p in one.networks.parameters()) == 20_505_376, "one control_trans of BART"


@pytest.mark.parametrize(("layers", "mebibytes"), [(28, 224), (32, 256)])
def test_direct_slots_of_llama_3_take_what_they_store(layers: int, mebibytes: int) -> None:
    sites = sites_of(layers, 8, 128)
    with torch.device("meta"):
        slots = DirectSlots(sites, random_slots(sites, 2048, "normal", 1.0)).to(torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in slots.parameters()) == mebibytes << 20


@pytest.mark.parametrize(
    ("config", "model_values", "slots", "percent"),
    [
        (GPT2_MEDIUM, 354_823_168, 5, 0.0693),
        (GPT2_MEDIUM, 354_823_168, 10, 0.1385),
        (GPT2_LARGE, 774_030_080, 10, 0.1191),
        (BART_LARGE, 406_291_456, 100, 1.815),
        (BART_LARGE, 406_291_456, 200, 3.629),
    ],
)
def test_the_share_of_the_bases_values(config: Any, model_values: int, slots: int, percent: float) -> None:
    is_bart = config is BART_LARGE
    with torch.device("meta"):
        model = (transformers.BartForConditionalGeneration if is_bart else transformers.GPT2LMHeadModel)(config)
    assert model.num_parameters() == model_values
    stored, _ = counts(config, slots, 512, THREE if is_bart else ("self",), config.hidden_size)
    assert 100 * stored / model_values == pytest.approx(percent, abs=6e-4)


def test_the_networks_output_is_ordered_as_the_papers() -> None:
    """(layer l, key or value s, head h, dimension j) stands at ((2l + s) * H + h) * width + j."""
    layers, heads, width, slots = 3, 2, 4, 5
    network = NetworkSlots(sites_of(layers, heads, width), slots, 6, 7)
    flat = network.networks["self"](network.embeddings["self"].weight)
    for name, pair in network().items():
        layer = int(name.split(".")[1])
        for s, tensor in enumerate(pair):
            for h in range(heads):
                for j in range(width):
                    assert torch.equal(tensor[h, :, j], flat[:, ((2 * layer + s) * heads + h) * width + j])


def test_the_three_prefixes_of_an_encoder_decoder_are_independent() -> None:
    base = tiny_base("bart")
    module = tiny_method(base, parametrisation="network", hidden_width=9, initial="normal")
    network = module.get_submodule("_slots")
    assert isinstance(network, NetworkSlots)
    assert set(network.networks) == set(network.embeddings) == set(THREE)
    with torch.no_grad():
        before = module.kept_tensors()
        network.networks["cross"][0].weight.add_(1.0)
        after = module.kept_tensors()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".cross." in name}
    only_decoder = tiny_method(base, sites=("self",))
    assert {name.split(".")[2] for name in only_decoder.slots()} == {"self"}


@pytest.mark.parametrize("parametrisation", ["direct", "network"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_frozen_sink_keeps_every_bit(parametrisation: str, weight_decay: float) -> None:
    base = tiny_base("llama")
    module = tiny_method(base, freeze_first=True, parametrisation=parametrisation, hidden_width=9).train()
    before = module.kept_tensors()
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=weight_decay)
    with attached(base.model, module):
        base.model(**tiny_batch("llama")).logits.square().mean().backward()
    optimiser.step()
    for name, after in module.kept_tensors().items():
        assert torch.equal(after[:, 0], before[name][:, 0])
        assert bool((after[:, 1:] != before[name][:, 1:]).flatten(2).any(dim=2).all()), "all others moved"


@pytest.mark.parametrize(
    ("name", "first"), [("llama", -6), ("gpt2", None), ("bart", None), ("t5", None), ("bert", None)]
)
def test_word_slots_are_exactly_what_the_base_computes(name: str, first: int | None) -> None:
    base = tiny_base(name)
    module = tiny_method(base, initial="text", initial_text="menu: ", num_virtual_tokens=None)
    ids = torch.tensor([base.tokenizer("menu: ")["input_ids"]])
    for site, call in record_text(base.model, ids, first):
        key, value = module.slots()[site.name]
        assert torch.equal(key, call.key[0])
        assert torch.equal(value, call.value[0])
    assert module.num_virtual_tokens == 6


def test_words_are_repeated_or_cut_to_the_number_of_slots() -> None:
    base = tiny_base("gpt2")

    def value_of(text: str, count: int | None) -> torch.Tensor:
        module = tiny_method(base, initial="text", initial_text=text, num_virtual_tokens=count)
        return module.slots()["layers.0.self"].value_GPE

    assert torch.equal(value_of("abc", 8), value_of("abcabcab", None))
    assert torch.equal(value_of("abcdef", 2), value_of("ab", None))
    with pytest.raises(PrefixError, match="initial_text has no tokens"):
        value_of("", 3)


def test_the_network_is_fitted_to_the_words() -> None:
    base = tiny_base("llama")
    words = tiny_method(base, initial="text").kept_tensors()

    def distance(**config: Any) -> float:
        kept = tiny_method(base, parametrisation="network", hidden_width=64, **config).kept_tensors()
        return sum(float((kept[name] - words[name]).square().sum()) for name in words)

    assert distance(initial="text") < 0.8 * distance(initial="normal")


def test_a_kept_prefix_can_be_where_training_starts(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = tiny_base("llama")
    start = tiny_method(base).kept_tensors()
    save_file(start, tmp_path / "prefix.safetensors")
    again = tiny_method(base, initial="prefix", initial_prefix=str(tmp_path), num_virtual_tokens=None)
    assert all(torch.equal(t, start[name]) for name, t in again.kept_tensors().items())
    with pytest.raises(PrefixError, match="has 5 slots, num_virtual_tokens is 3"):
        tiny_method(base, initial="prefix", initial_prefix=str(tmp_path), num_virtual_tokens=3)
    named = PrefixTuningConfig.model_validate({"initial_prefix": str(tmp_path)})
    assert named.initial == "prefix"
    with pytest.raises(ValueError, match="initial = 'normal' another: leave one out"):
        PrefixTuningConfig.model_validate({"initial_prefix": str(tmp_path), "initial": "normal"})
    with pytest.raises(PrefixError, match="needs initial_prefix"):
        tiny_method(base, initial="prefix")
    with pytest.raises(PrefixError, match=r"has nothing for site layers.0.encoder_self"):
        tiny_method(tiny_base("bart"), initial="prefix", initial_prefix=str(tmp_path))


def test_random_slots_are_as_wide_as_asked() -> None:
    base = tiny_base("llama")
    normal = torch.cat(
        [t.flatten() for t in tiny_method(base, num_virtual_tokens=200, initial_scale=0.3).kept_tensors().values()]
    )
    uniform = torch.cat(
        [t.flatten() for t in tiny_method(base, initial="uniform", initial_scale=2.0).kept_tensors().values()]
    )
    assert float(normal.std()) == pytest.approx(0.3, rel=0.05)
    assert 0 <= float(uniform.min()) < float(uniform.max()) <= 2
    with pytest.raises(PrefixError, match="num_virtual_tokens is needed with initial = 'normal'"):
        tiny_method(base, num_virtual_tokens=None)


def test_dropout_acts_on_slots_while_training_only() -> None:
    module = tiny_method(tiny_base("llama"), dropout=0.5)
    kept = module.kept_tensors()["layers.0.self.key"]
    module.train()
    dropped = module.slots()["layers.0.self"].key_GPD
    zeros = dropped == 0
    assert 0.2 < float(zeros.float().mean()) < 0.8
    torch.testing.assert_close(dropped[~zeros], 2 * kept[~zeros])
    assert torch.equal(module.kept_tensors()["layers.0.self.key"], kept)
    assert module.training, "keeping leaves the mode alone"
    assert torch.equal(module.eval().slots()["layers.0.self"].key_GPD, kept)


def test_direct_slots_are_learned_relative_to_their_size() -> None:
    """Ten times as large a start moves ten times as far (to a power of two), and is kept to the last bit."""
    base = tiny_base("llama")
    sites = find_sites(base.model).attention
    start = random_slots(sites, 4, "normal", 1.0)
    sizes = {s.name: 10.0 ** (n - 1) for n, s in enumerate(sites)}
    start = {name: KeyValue(k * sizes[name], v / sizes[name]) for name, (k, v) in start.items()}
    slots = DirectSlots(sites, start, relative=True)
    for name, pair in slots().items():
        assert all(torch.equal(found, wanted) for found, wanted in zip(pair, start[name], strict=True))
    optimiser = torch.optim.Adam(slots.parameters(), lr=1e-2)
    sum(t.sum() for pair in slots().values() for t in pair).backward()
    optimiser.step()
    for name, pair in slots().items():
        for found, before, size in zip(pair, start[name], (sizes[name], 1 / sizes[name]), strict=True):
            moved = float((before - found).detach().mean())
            assert 0.6e-2 * size < moved < 1.7e-2 * size


def test_the_learning_rate_fits_the_parametrisation() -> None:
    rates = {
        p: PrefixTuning.default_learning_rate(PrefixTuningConfig(parametrisation=p)) for p in ("direct", "network")
    }
    assert rates == {"direct": 5e-2, "network": 5e-5}


@pytest.mark.parametrize(
    "wrong", [{"num_virtual_tokens": 0}, {"dropout": 1.0}, {"initial": "zeros"}, {"sites": ["head"]}, {"slots": 3}]
)
def test_a_wrong_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrefixTuningConfig.model_validate(wrong)


def test_tensors_that_do_not_fit_are_named() -> None:
    base = tiny_base("llama")
    sites, kept = find_sites(base.model), tiny_method(base).kept_tensors()

    def restored(change: dict[str, Any]) -> PrefixTuning:
        tensors = {name: t for name, t in {**kept, **change}.items() if t is not None}
        return PrefixTuning.restore(sites, PrefixTuningConfig(), tensors)

    with pytest.raises(
        PrefixError, match=r"tensor 'layers.9.self.key' belongs to no site of this base \(layers.0.self"
    ):
        restored({"layers.9.self.key": kept["layers.0.self.key"]})
    with pytest.raises(PrefixError, match=r"tensor 'layers.1.self.value' is missing beside 'layers.1.self.key'"):
        restored({"layers.1.self.value": None})
    with pytest.raises(PrefixError, match=r"tensor 'layers.1.self.key' is missing beside 'layers.1.self.value'"):
        restored({"layers.1.self.key": None})
    with pytest.raises(PrefixError, match=r"has nothing for layers.2.self of this base"):
        restored({"layers.2.self.key": None, "layers.2.self.value": None})
    with pytest.raises(PrefixError, match=r"has shape \(2, 5, 9\), this base has 2 key/value heads of width 10"):
        restored({"layers.1.self.value": kept["layers.1.self.value"][..., :9]})
    with pytest.raises(PrefixError, match=r"no site of kind cross: it has self"):
        tiny_method(base, sites=("cross",))


@pytest.mark.parametrize("method", ["prefix_tuning", "apt"])
def test_the_network_runs_once_a_pass_and_never_to_learn_a_length(method: str) -> None:
    base, ran = tiny_base("llama"), []
    module = tiny_method(base, method, parametrisation="network", hidden_width=9)
    (network,) = (m for m in module.modules() if isinstance(m, NetworkSlots))
    network.register_forward_hook(lambda *_: ran.append(1))
    assert module.num_virtual_tokens == 5
    assert ran == []
    module.train()
    module.slots(), module.branches()
    assert ran == [1]
