"""The doctor: what it finds and proves in a base, what it refuses, and that it can tell a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_base, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel
from typer.testing import CliRunner

from antefix.attach import current_attachment
from antefix.base import Base
from antefix.cli import app
from antefix.doctor import Diagnosis, examine, sites_in_words
from antefix.errors import AntefixError
from antefix.sites import find_sites

NAMES = ["bare", "reference", "text", "gradients", "generation"]


def outcomes(diagnosis: Diagnosis) -> dict[str, bool | None]:
    return {p.name: p.passed for p in diagnosis.proofs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_architecture_is_proved(architecture: str, dtype: torch.dtype) -> None:
    base = tiny_base(architecture)
    base.model.to(dtype)
    before = {name: t.clone() for name, t in base.model.state_dict().items()}
    diagnosis = examine(base)
    wanted: dict[str, bool | None] = dict.fromkeys(NAMES, True)
    if architecture in ("bart", "t5", "bert", "roberta"):
        wanted["text"] = None
    if architecture in ("bert", "roberta"):
        wanted["generation"] = None
    assert outcomes(diagnosis) == wanted
    assert diagnosis.can_carry_prefix
    for proof in diagnosis.proofs:
        if proof.passed is None:
            assert proof.reason
        else:
            assert proof.measured is not None
            assert proof.tolerance is not None
            assert proof.measured <= proof.tolerance
    assert current_attachment(base.model) is None
    assert all(torch.equal(before[name], t) for name, t in base.model.state_dict().items())


def test_penalties_of_a_bases_own_generation_are_no_failure() -> None:
    base = tiny_base("bart")
    own = base.model.generation_config
    own.no_repeat_ngram_size, own.forced_bos_token_id, own.min_length, own.num_beams = 2, 7, 5, 4
    assert outcomes(examine(base))["generation"]
    assert base.model.generation_config is own


def test_a_layer_that_lets_no_gradient_through_is_found() -> None:
    base = tiny_base("llama")
    base.model.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: (out[0].detach(), *out[1:]))
    diagnosis = examine(base)
    assert outcomes(diagnosis) == {name: name != "gradients" for name in NAMES}
    assert diagnosis.proofs[3].measured == 10, "keys and values of 5 slots"
    assert not diagnosis.can_carry_prefix


def test_a_layer_that_drops_its_attention_is_found() -> None:
    base = tiny_base("llama")
    for layer in base.model.model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: (out[0] * 0.0, *out[1:]))
    proof = examine(base).proofs[1]
    assert (proof.passed, proof.reason) == (False, "the slots change nothing that the model says")


def test_a_model_that_decodes_otherwise_than_it_reads_is_found() -> None:
    base = tiny_base("gpt2")

    def like_token_7_when_alone(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if out.logits.shape[1] == 1:
            out.logits[..., 7] += 100.0
        return out

    base.model.register_forward_hook(like_token_7_when_alone, with_kwargs=True)
    diagnosis = examine(base)
    assert outcomes(diagnosis) == {name: name != "generation" for name in NAMES}


def test_scores_that_the_hook_does_not_see_are_found() -> None:
    """A model that treats an attention implementation by its name gives other logits under ours."""
    base = tiny_base("llama")

    def by_name(module: Any, args: Any, out: Any) -> Any:
        return (out[0] * (1.0 if base.model.config._attn_implementation == "sdpa" else 1.1), *out[1:])

    base.model.model.layers[0].self_attn.register_forward_hook(by_name)
    assert outcomes(examine(base))["bare"] is False


def test_sites_are_told_in_runs_of_like_layers() -> None:
    assert sites_in_words(find_sites(tiny_model("bart"))) == [
        "self, layers 0-2: 6 heads, 6 key/value heads, width 8",
        "encoder_self, layers 0-1: 4 heads, 4 key/value heads, width 12",
        "cross, layers 0-2: 6 heads, 6 key/value heads, width 8",
    ]


def bloom() -> PreTrainedModel:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(
            vocab_size=263, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    )


def folder_of(base: Base, path: Path) -> str:
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return str(path)


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *words])
    if isinstance(result.exception, AntefixError):
        return 2, str(result.exception)
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_the_command_reports_and_ends_with_0(name: str, tmp_path: Path) -> None:
    folder = folder_of(tiny_base(name), tmp_path / name)
    code, text = run(folder)
    assert code == 0, text
    lines = text.splitlines()
    assert lines[0].startswith(f"{folder}: ")
    assert lines[-1] == f"{folder}: can carry a prefix"
    assert [line.split()[1] for line in lines if line.startswith(("  passed", "  -"))] == NAMES


def test_the_command_speaks_json_and_takes_a_precision(tmp_path: Path) -> None:
    code, text = run(folder_of(tiny_base("llama"), tmp_path / "llama"), "--json", "--dtype", "bfloat16")
    found = json.loads(text)
    assert code == 0
    assert (found["model"], found["dtype"], found["can_carry_prefix"]) == ("LlamaForCausalLM", "bfloat16", True)
    assert found["sites"]["positions"] == "relative"
    assert found["sites"]["attention"][2] == {
        "layer": 2, "kind": "self", "module": "model.layers.2.self_attn", "num_heads": 6, "num_key_value_heads": 2,
        "key_width": 10, "value_width": 10, "hidden_width": 48, "layer_module": "model.layers.2",
        "output_projection": "model.layers.2.self_attn.o_proj",
    }  # fmt: skip
    assert [p["name"] for p in found["proofs"]] == NAMES


def test_a_model_that_bypasses_the_interface_ends_with_1_and_the_reason(tmp_path: Path) -> None:
    folder = folder_of(Base(bloom(), tiny_tokenizer(), "bloom"), tmp_path / "bloom")
    code, text = run(folder)
    assert code == 1
    assert text.splitlines()[1].startswith("no prefix: BloomForCausalLM cannot carry a prefix: none of its attention")
    code, text = run(folder, "--json")
    assert (code, json.loads(text)["sites"]) == (1, None)
    assert json.loads(text)["refusal"].startswith("BloomForCausalLM cannot carry a prefix")


def test_the_commands_mistakes_are_one_line(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    code, text = run(str(tmp_path / "bare"))
    assert code == 2
    assert len(text.splitlines()) == 1
    assert f"the base '{tmp_path / 'bare'}' has no tokenizer that can be loaded" in text
    usage = CliRunner().invoke(app, ["doctor", str(tmp_path / "bare"), "--dtype", "bfloat"], env={"COLUMNS": "300"})
    assert usage.exit_code == 2
    assert "'bfloat' is not one of 'float32', 'bfloat16', 'float16', 'int8', 'native', 'auto'" in usage.output


def test_a_model_that_fails_in_any_way_is_a_diagnosis() -> None:
    base = tiny_base("llama")
    base.model.model.layers[1].mlp.forward = _fail
    found = examine(base)
    assert not found.can_carry_prefix
    assert found.refusal == "running it failed: ZeroDivisionError: no such thing"


def _fail(*args: object) -> None:
    raise ZeroDivisionError("no such thing")


def test_layers_with_a_state_of_their_own_are_no_failure() -> None:
    """LFM2 has layers of convolutions between those of attention: a text's keys are not all that it remembers."""
    config = transformers.Lfm2Config(
        vocab_size=263, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=512, layer_types=["conv", "full_attention", "conv"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).requires_grad_(False).eval()
    found = examine(Base(model, tiny_tokenizer(), "lfm2"))
    text = next(proof for proof in found.proofs if proof.name == "text")
    assert (text.passed, text.reason) == (None, "some layers keep a state besides attention")
    assert found.can_carry_prefix, found
