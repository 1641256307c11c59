"""What a base offers is found by looking: kinds, heads and widths layer by layer, and how it counts positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, GROUPS, HEADS, LAYERS, WIDTH, tiny_batch, tiny_model
from transformers import PreTrainedModel

from antefix.attach import attached
from antefix.attention import reference
from antefix.errors import BaseModelError
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.initial import random_slots
from antefix.parts.key_value import DirectSlots
from antefix.sites import find_sites, record_text

GROUPED = ("llama", "qwen3", "mistral", "gemma2", "gemma3")
POSITIONS = {
    "gpt2": "absolute", "llama": "relative", "qwen3": "relative", "mistral": "relative", "gemma2": "relative",
    "gemma3": "relative", "opt": "absolute", "gpt_neox": "relative", "bart": "none", "t5": "none", "bert": "absolute",
    "roberta": "none",
}  # fmt: skip


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, int, int, int]]:
    return {
        s.name: (s.num_heads, s.num_key_value_heads, s.key_width, s.value_width) for s in find_sites(model).attention
    }


def test_every_decoder_layer_is_a_site_with_its_own_heads_and_widths(architecture: str) -> None:
    groups, width = (GROUPS, WIDTH + 2) if architecture in GROUPED else (HEADS, WIDTH)
    one = (HEADS, groups, width, width)
    wanted = {
        "bart": {f"layers.{n}.encoder_self": (4, 4, 12, 12) for n in range(2)}
        | {f"layers.{n}.{kind}": one for n in range(LAYERS) for kind in ("self", "cross")},
        "t5": {f"layers.{n}.encoder_self": one for n in range(LAYERS)}
        | {f"layers.{n}.{kind}": one for n in range(2) for kind in ("self", "cross")},
        "bert": {f"layers.{n}.encoder_self": one for n in range(LAYERS)},
        "roberta": {f"layers.{n}.encoder_self": one for n in range(LAYERS)},
    }.get(architecture, {f"layers.{n}.self": one for n in range(LAYERS)})
    model = tiny_model(architecture)
    assert shapes(model) == wanted
    modules = dict(model.named_modules())
    assert len({modules[s.module] for s in find_sites(model).attention}) == len(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_positions_count_is_seen_in_every_precision(architecture: str, dtype: torch.dtype) -> None:
    assert find_sites(tiny_model(architecture, dtype)).positions == POSITIONS[architecture]


def test_looking_leaves_no_trace(architecture: str) -> None:
    model = tiny_model(architecture)
    model.train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    state, implementation = dict(model.state_dict()), model.config._attn_implementation
    before = {name: t.clone() for name, t in state.items()}
    find_sites(model)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_recorded_text_is_what_the_cache_would_hold() -> None:
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    recorded = record_text(model, ids)
    for layer, (site, call) in enumerate(recorded):
        assert site.name == f"layers.{layer}.self"
        assert torch.equal(call.key, cache.layers[layer].keys)
        assert torch.equal(call.value, cache.layers[layer].values)
    moved = record_text(model, ids, first_position=-4)
    assert torch.equal(moved[0][1].value, recorded[0][1].value)
    assert not torch.allclose(moved[0][1].key, recorded[0][1].key, atol=1e-2)


def test_keys_and_values_of_unlike_width() -> None:
    """DeepSeek's latent attention: no kernel takes it, the slots still do."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=50, hidden_size=24, intermediate_size=20, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=6, v_head_dim=7, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    assert shapes(model) == {f"layers.{n}.self": (4, 4, 10, 7) for n in range(2)}
    sites = find_sites(model).attention
    module = PrefixTuning(PrefixTuningConfig(), DirectSlots(sites, random_slots(sites, 3, "normal", 1.0)), None)
    batch = {key: value % 50 for key, value in tiny_batch("llama", "left").items()}
    with torch.no_grad():
        with attached(model, module):
            found = model(**batch).logits
        slots = module.slots()
        with reference.at_work(model, {s.module: [tuple(slots[s.name])] * 4 for s in sites}):
            wanted = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)


def bloom() -> PreTrainedModel:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2))


def gpt_neo() -> PreTrainedModel:
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=20, hidden_size=16, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def mpt() -> PreTrainedModel:
    return transformers.MptForCausalLM(transformers.MptConfig(vocab_size=20, d_model=16, n_layers=2, n_heads=2))


@pytest.mark.parametrize("model", [bloom, gpt_neo, mpt])
def test_models_that_bypass_the_attention_interface_are_refused(model: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(
        BaseModelError, match=r"cannot carry a prefix: none of its attention passes transformers' attention"
    ):
        find_sites(model())


def test_layers_that_share_a_module_are_refused() -> None:
    albert = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(
            vocab_size=20, hidden_size=16, embedding_size=8, num_attention_heads=2, intermediate_size=8
        )
    )
    with pytest.raises(BaseModelError, match="its layers share attention modules"):
        find_sites(albert)


def test_only_transformers_models_have_sites() -> None:
    with pytest.raises(BaseModelError, match="Linear is no transformers model"):
        find_sites(torch.nn.Linear(2, 2))


def test_every_architecture_of_the_fixtures_is_covered() -> None:
    assert set(POSITIONS) == set(ARCHITECTURES)
