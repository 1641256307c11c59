"""The fingerprint tells bases apart, and only bases."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from timing import at_best
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from antefix.attach import attached
from antefix.fingerprint import fingerprint
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.initial import random_slots
from antefix.parts.key_value import DirectSlots
from antefix.sites import find_sites


def test_equal_for_equal_weights_and_unlike_for_others(architecture: str) -> None:
    first = fingerprint(tiny_model(architecture))
    assert first == fingerprint(tiny_model(architecture))
    assert first != fingerprint(tiny_model(architecture, seed=1))
    assert len(first) == 16
    assert int(first, 16) >= 0


def test_it_is_what_the_page_of_the_format_says(architecture: str) -> None:
    model = tiny_model(architecture)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        for i, row in enumerate(parameter.detach()):
            value = row.flatten()[i * 2654435761 % row.numel()]
            digest.update(value.to(torch.bfloat16).view(torch.uint16).item().to_bytes(2, "little"))
    assert fingerprint(model) == digest.hexdigest()[:16]


def test_precision_does_not_count_down_to_bfloat16(architecture: str) -> None:
    assert fingerprint(tiny_model(architecture)) == fingerprint(tiny_model(architecture, torch.bfloat16))


def test_every_changed_row_is_noticed(architecture: str) -> None:
    model = tiny_model(architecture)
    seen = {fingerprint(model)}
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            row = parameter[parameter.shape[0] // 2]
            row.add_(1.0)
            seen.add(fingerprint(model))
    assert len(seen) == len(parameters) + 1


@pytest.mark.parametrize("change", ["added behind torch's back", "exchanged", "loaded", "turned bfloat16 and back"])
def test_a_remembered_fingerprint_follows_the_weights(change: str) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    before = fingerprint(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    if change == "added behind torch's back":
        version = weight._version
        weight.data.add_(0.1)
        assert weight._version == version
    elif change == "exchanged":
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight + 0.1)
    elif change == "loaded":
        model.load_state_dict(other.state_dict())
    else:
        model.to(torch.bfloat16).to(torch.float32)
        assert fingerprint(model) == before
        return
    assert fingerprint(model) != before
    fresh = tiny_model("llama")
    fresh.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(fresh)


def test_tied_weights_count_once() -> None:
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, pad_token_id=0, tie_word_embeddings=True)  # fmt: skip
    tied = LlamaForCausalLM(config)
    untied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": False}))
    untied.load_state_dict(tied.state_dict())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert fingerprint(tied) != fingerprint(untied), "the same values, but the head may be another one tomorrow"
    without_head = {n for n, _ in tied.named_parameters()}
    assert "lm_head.weight" not in without_head


def test_survives_saving(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == fingerprint(model)


def test_an_attached_prefix_does_not_count(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = find_sites(model)
    before = fingerprint(model)
    slots = random_slots(sites.attention, 2, "normal", 1.0)
    trainable = PrefixTuning(PrefixTuningConfig.model_validate({}), DirectSlots(sites.attention, slots), None)
    with attached(model, trainable):
        assert any(name.startswith("antefix.") for name, _ in model.named_parameters())
        assert fingerprint(model) == before
    assert fingerprint(model) == before


def test_parameters_without_rows_or_columns() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.nothing = nn.Parameter(torch.zeros(3, 0))
    before = fingerprint(model)
    with torch.no_grad():
        model.scale.add_(1)
    assert fingerprint(model) != before


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny_model("gpt2")
        assert fingerprint(model) == fingerprint(tiny_model("gpt2"))


def test_asking_again_is_cheap() -> None:
    model = nn.ModuleList(nn.Linear(8, 20_000, bias=False) for _ in range(20))
    first = at_best(lambda: fingerprint(model), times=1)
    assert at_best(lambda: fingerprint(model)) < first / 5
