"""A PEFT prefix-tuning checkpoint becomes a prefix that says the same: PEFT itself writes and answers here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import DECODER_ONLY, VOCABULARY, tiny_base, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from antefix.attach import attached
from antefix.base import Base
from antefix.errors import BaseModelError, PrefixError, PrefixFileError
from antefix.interop.peft import import_peft
from antefix.prefix import Prefix
from antefix.rotary import moved
from antefix.sites import find_sites

# PEFT asks transformers in words that transformers has deprecated; that is between the two of them.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

P = 5
BATCH = {
    "input_ids": torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(3, 7, dtype=torch.long),
}
ROTARY = tuple(name for name in DECODER_ONLY if name not in ("gpt2", "opt"))
# Of the rotary bases, Mistral and the Gemmas have windows shorter than the row here: PEFT's slots leave them.
SAME_LOGITS = ("llama", "qwen3", "gpt_neox", "gpt2", "opt")


def checkpoint(
    folder: Path, name: str, config: peft.PeftConfig | None = None, model: PreTrainedModel | None = None
) -> tuple[Path, Tensor]:
    """A checkpoint that PEFT saved, and the logits that PEFT reads out of it."""
    torch.manual_seed(1)
    config = config or peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    trained = peft.get_peft_model(model or tiny_model(name), config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(folder)
    with torch.no_grad():
        return folder, trained.eval()(**BATCH).logits


def logits(base: Base, prefix: Prefix) -> Tensor:
    with torch.no_grad(), attached(base.model, prefix):
        return base.model(**BATCH).logits


def assert_same_as_pefts(base: Base, prefix: Prefix, wanted: Tensor) -> None:
    with torch.no_grad():
        bare = base.model(**BATCH).logits
    assert (bare - wanted).abs().max() > 0.1, "the prefix says nothing, so the test would say nothing"
    torch.testing.assert_close(logits(base, prefix), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("positions", ["shifted", "in_place"])
@pytest.mark.parametrize("name", SAME_LOGITS)
def test_logits_are_pefts_in_both_conventions(tmp_path: Path, name: str, positions: Any, projection: bool) -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=11
    )
    folder, wanted = checkpoint(tmp_path, name, config)
    base = tiny_base(name)
    prefix = import_peft(folder, base, positions=positions)
    assert prefix.card.positions == (positions if name in ROTARY else "shifted")
    assert_same_as_pefts(base, prefix, wanted)


@pytest.mark.parametrize("name", SAME_LOGITS)
def test_generation_says_what_pefts_forward_passes_say(tmp_path: Path, name: str) -> None:
    """Row by row: under transformers 5.24 PEFT 0.21.2's own `generate` has no slots, and its padding moves the tokens.

    PEFT hands them over as `past_key_values`, beside an empty cache under the new name `cache`, which is taken.
    """
    folder, _ = checkpoint(tmp_path, name)
    base = tiny_base(name)
    model = peft.PeftModel.from_pretrained(tiny_model(name), folder).eval()
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"].clone()
    mask[1, :3] = 0
    wanted = []
    for row, padding in ((0, 0), (1, 3), (2, 0)):
        text = ids[row : row + 1, padding:]
        for _ in range(6):
            with torch.no_grad():
                text = torch.cat([text, model(input_ids=text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        wanted.append(text[0, -6:].tolist())
    assert wanted != written(base, ids, mask), "the prefix says nothing, so the test would say nothing"
    for positions in ("shifted", "in_place"):
        with attached(base.model, import_peft(folder, base, positions=positions)):
            assert written(base, ids, mask) == wanted


def written(base: Base, ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Six tokens of transformers' `generate`, greedy; nothing ends them."""
    base.model.generation_config.eos_token_id = None
    with torch.no_grad():
        texts = base.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    found: list[list[int]] = texts[:, -6:].tolist()
    return found


def test_a_cartridge_is_a_prefix(tmp_path: Path) -> None:
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=2)
    folder, wanted = checkpoint(tmp_path, "llama", config)
    base = tiny_base("llama")
    assert_same_as_pefts(base, import_peft(folder, base), wanted)


@pytest.mark.parametrize("name", ROTARY)
def test_both_conventions_are_the_same_prefix_on_every_rotary_base(tmp_path: Path, name: str) -> None:
    folder, _ = checkpoint(tmp_path, name)
    base = tiny_base(name)
    shifted, in_place = (import_peft(folder, base, positions=p) for p in ("shifted", "in_place"))
    assert not torch.equal(shifted.tensors["layers.0.self.key"], in_place.tensors["layers.0.self.key"])
    assert torch.equal(shifted.tensors["layers.0.self.value"], in_place.tensors["layers.0.self.value"])
    torch.testing.assert_close(logits(base, in_place), logits(base, shifted), rtol=1e-4, atol=1e-4)
    assert ("sliding window" in in_place.card.notes) == (name in ("mistral", "gemma2", "gemma3"))


def test_a_base_that_scales_what_it_rotates(tmp_path: Path) -> None:
    """YaRN multiplies cosine and sine: a key that is turned back must not be scaled on the way."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
                    rope_parameters={"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0,
                                     "original_max_position_embeddings": 16})
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    assert model.model.rotary_emb.attention_scaling > 1.1
    base = Base(model, tiny_base("llama").tokenizer, "yarn")
    folder, wanted = checkpoint(tmp_path, "yarn", model=model)
    prefix = import_peft(folder, base)
    assert prefix.card.positions == "in_place"
    assert_same_as_pefts(base, prefix, wanted)


def test_turned_there_and_back() -> None:
    model = tiny_model("gpt_neox")
    keys = {s.name: torch.randn(s.num_key_value_heads, 3, s.key_width) for s in find_sites(model).attention}
    there = moved(model, keys, 7)
    assert all(not torch.allclose(there[n], keys[n]) for n in keys)
    back = moved(model, there, -7)
    for name, key in keys.items():
        torch.testing.assert_close(back[name], key, rtol=0, atol=1e-5)
        assert torch.equal(there[name][..., 4:], key[..., 4:]), "only half of the width is rotary"


def test_what_the_card_says(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "peft", "llama")
    base = tiny_base("llama")
    import_peft(folder, base).save(tmp_path / "p")
    card = Prefix.load(tmp_path / "p").card
    assert (card.method, card.positions, card.base.name) == ("prefix_tuning", "in_place", "tiny-llama")
    assert card.base.fingerprint == base.fingerprint
    assert (card.config["num_virtual_tokens"], card.config["positions"]) == (P, "in_place")
    assert card.training["imported_from"] == "peft"
    assert card.training["peft_version"].startswith(peft.__version__)
    assert card.notes == "Imported from a PEFT checkpoint of the base 'None'."


def test_a_base_without_rotary_positions_keeps_them_shifted_and_says_so(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, "gpt2")
    prefix = import_peft(folder, tiny_base("gpt2"), positions="in_place")
    assert prefix.card.positions == "shifted"
    assert prefix.card.notes.endswith("Positions stay shifted: GPT2LMHeadModel has no rotary positions.")
    with pytest.raises(BaseModelError, match="GPT2LMHeadModel has no rotary positions"):
        moved(tiny_model("gpt2"), {}, -3)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What `OtherAttention`'s file says of rotation, while in truth it rotates the other way."""
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin)


class OtherAttention(LlamaAttention):
    """An attention whose file does not tell the truth about it."""


def test_a_base_that_does_not_turn_as_its_file_says_is_found_out(tmp_path: Path) -> None:
    folder, wanted = checkpoint(tmp_path, "llama")
    base = tiny_base("llama")
    base.model.model.layers[1].self_attn.__class__ = OtherAttention
    with pytest.raises(BaseModelError, match=r"at layers\.1\.self do not turn as its file says"):
        moved(base.model, {}, -P)
    prefix = import_peft(folder, base)
    assert prefix.card.positions == "shifted"
    assert_same_as_pefts(base, prefix, wanted)


# ---- what is refused


def refusal(folder: Path, base: Base) -> str:
    with pytest.raises(PrefixError) as refused:
        import_peft(folder, base)
    message = str(refused.value)
    assert message.isprintable(), "one line"
    return message


def test_another_base(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, "llama")
    assert "has 2 key/value heads of width 10, the base 'tiny-gpt2' has 6 of width 8" in refusal(
        folder, tiny_base("gpt2")
    )
    assert "'tiny-bart' is no decoder-only model" in refusal(folder, tiny_base("bart"))
    assert "'tiny-bert' is no decoder-only model" in refusal(folder, tiny_base("bert"))
    shallow = LlamaForCausalLM(LlamaConfig(**{**tiny_model("llama").config.to_dict(), "num_hidden_layers": 2})).eval()
    base = Base(shallow, tiny_base("llama").tokenizer, "shallow")
    assert "has 3 layers, the base 'shallow' 2: name the base it was trained on" in refusal(folder, base)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    ],
    ids=["lora", "prompt tuning"],
)
def test_another_peft_type(tmp_path: Path, config: peft.PeftConfig) -> None:
    folder, _ = checkpoint(tmp_path, "llama", config)
    assert (
        f"peft type '{config.peft_type.value}' cannot become a prefix: only PREFIX_TUNING and CARTRIDGE can"
        in refusal(folder, tiny_base("llama"))
    )


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, "llama")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    message = refusal(folder, tiny_base("llama"))
    assert "holds a pickle (adapter_model.bin), which can run code when read and is never opened" in message
    assert message.endswith("save it with safe_serialization=True")


def test_broken_checkpoints(tmp_path: Path) -> None:
    base = tiny_base("llama")
    assert "adapter_config.json: no such file; a PEFT checkpoint is a folder" in refusal(tmp_path / "gone", base)
    folder, _ = checkpoint(tmp_path / "p", "llama")
    config_file, tensors_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(tensors_file)

    for content, message in (
        ({**config, "num_virtual_tokens": 4}, "'prompt_embeddings' has shape (5, 120), adapter_config.json says (4,"),
        ({**config, "token_dim": -1}, "token_dim: Input should be greater than or equal to 1"),
        ({**config, "token_dim": config["token_dim"] + 1}, "is no multiple of"),
        ({**config, "num_layers": "three"}, "num_layers: Input should be a valid integer"),
        ({k: v for k, v in config.items() if k != "token_dim"}, "token_dim: Field required"),
        ({**config, "num_attention_heads": 4}, "has 4 key/value heads of width 5"),
        ({"peft_type": None}, "peft_type: Input should be a valid string"),
        ([], "no JSON object"),
    ):
        config_file.write_text(json.dumps(content))
        assert message in refusal(folder, base)
    config_file.write_text("{" * 100_000)
    assert "adapter_config.json: not a readable PEFT config" in refusal(folder, base)
    config_file.write_text(json.dumps(config))

    for broken, message in (
        ({"prompt_embeddings": tensors["prompt_embeddings"].T.contiguous()}, "has shape (120, 5)"),
        ({"prompt_embeddings": tensors["prompt_embeddings"] * float("inf")}, "holds NaN or infinity"),
        ({"prompt_embeddings": torch.ones(5, 120), "score.weight": torch.ones(2)}, "holds 'score.weight' beside"),
        ({"lora_A": torch.ones(2)}, "has no tensor 'prompt_embeddings'"),
    ):
        save_file(broken, tensors_file)
        assert message in refusal(folder, base)
    tensors_file.write_bytes(b"{}")
    assert "adapter_model.safetensors: not a readable safetensors file" in refusal(folder, base)
    tensors_file.unlink()
    with pytest.raises(PrefixFileError, match=r"adapter_model\.safetensors: no such file"):
        import_peft(folder, base)
