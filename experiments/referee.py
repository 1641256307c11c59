"""Says what a prefix makes of a model, slowly, and puts the same slots into PEFT and into Antefix.

Tiny random models, built anew for every use. The referee reads whole rows, one full pass a token: no cache, no padding,
and attention is `antefix.attention.reference`, one softmax over slots and tokens. Knows nothing of single traps.

Axes: P slots, L layers, G key/value heads, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from antefix.attach import attached
from antefix.attention import reference
from antefix.methods import method_class
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.sites import Kind, find_sites

P, ROWS, LENGTH, NEW, BEAMS = 5, 4, 9, 8, 4
VOCABULARY, HEADS, WIDTH = 263, 6, 8
WINDOW = 4
START = 1
"""The token that a decoder begins with."""

Slots = Mapping[Kind, Tensor]
"""For every kind of attention a matrix as PEFT holds it, (P, L * 2 * G * D): layer 0 key, layer 0 value, ..."""
Values = dict[str, Tensor]
Build = Callable[[], PreTrainedModel]
Work = Callable[[Any], Values]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HEADS * WIDTH, "num_hidden_layers": 3, "num_attention_heads": HEADS,
    "intermediate_size": 56, "max_position_embeddings": 128,
}  # fmt: skip
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_GROUPED = {**_SHAPE, **_TOKENS, "num_key_value_heads": 2, "head_dim": WIDTH + 2}
_SEQ2SEQ = {**_TOKENS, "vocab_size": VOCABULARY, "d_model": HEADS * WIDTH, "decoder_start_token_id": START,
            "tie_word_embeddings": False}  # fmt: skip
_GPT2 = {**_TOKENS, "vocab_size": VOCABULARY, "n_positions": 128, "n_embd": HEADS * WIDTH, "n_layer": 3,
         "n_head": HEADS, "n_inner": 56, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
_BERT = {**_SHAPE, **_TOKENS}
_WIDER_AT_THE_END = {
    "sliding_window": 100, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "per_layer_config": {"02": {"head_dim": WIDTH + 8}}, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip


def _bart(layers: int) -> dict[str, Any]:
    return {**_SEQ2SEQ, "encoder_layers": layers, "decoder_layers": layers, "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "dropout": 0.0,
            "max_position_embeddings": 128, "forced_eos_token_id": None}  # fmt: skip


def _t5(layers: int) -> dict[str, Any]:
    return {**_SEQ2SEQ, "d_kv": WIDTH, "d_ff": 56, "num_layers": layers, "num_heads": HEADS, "dropout_rate": 0.0,
            "relative_attention_num_buckets": 8}  # fmt: skip


_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": WINDOW}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "query_pre_attn_scalar": 7, "sliding_window": 100,
                "attn_logit_softcapping": 2.0, "final_logit_softcapping": None}),
    "Gemma 4": ("Gemma4ForCausalLM", "Gemma4TextConfig", {**_GROUPED, **_WIDER_AT_THE_END}),
    "BART, 3 layers": ("BartForConditionalGeneration", "BartConfig", _bart(3)),
    "BART, 4 layers": ("BartForConditionalGeneration", "BartConfig", _bart(4)),
    "T5, 3 layers": ("T5ForConditionalGeneration", "T5Config", _t5(3)),
    "T5, 4 layers": ("T5ForConditionalGeneration", "T5Config", _t5(4)),
    "BERT": ("BertModel", "BertConfig", _BERT),
    "BERT, classifier": ("BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": 7}),
}  # fmt: skip


def builder(name: str) -> Build:
    """A random model, the same at every call, weights large enough that attention is far from uniform."""

    def build() -> PreTrainedModel:
        class_name, config_name, config = _MODELS[name]
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, class_name)(getattr(transformers, config_name)(**config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.25)
        return model.eval()

    return build


def random_slots(build: Build, seed: int = 0) -> dict[Kind, Tensor]:
    """Slots for every kind of attention the model has, as wide as its widest head."""
    sites, draw = find_sites(build()), torch.Generator().manual_seed(seed)
    widths = {k: sum(2 * s.num_key_value_heads * _widest(sites.of_kinds((k,))) for s in sites.of_kinds((k,)))
              for k in sites.kinds}  # fmt: skip
    return {kind: 0.9 * torch.randn(P, width, generator=draw) for kind, width in widths.items()}


def text_slots(build: Build, ids: Tensor, encoder_ids: Tensor | None = None) -> dict[Kind, Tensor]:
    """What transformers' own cache holds of a text (of a decoder's, behind an encoder's), as a matrix."""
    model = build()
    if encoder_ids is None:
        # One that keeps all of it, whatever the window: known as `cache` since transformers 5.24.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        cache: Any = DynamicCache()
        model(input_ids=ids, use_cache=True, **{name: cache})
    else:
        output = model(input_ids=encoder_ids, decoder_input_ids=ids, use_cache=True)
        cache = (output["cache"] if "cache" in output else output["past_key_values"]).self_attention_cache
    pairs = [t[0] for layer in cache.layers for t in (layer.keys, layer.values)]
    return {"self": torch.cat([t.transpose(0, 1).flatten(1) for t in pairs], dim=1)}


def some_ids(seed: int, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- what is right ------------------------------------------------------------------------------------------


def placed(model: PreTrainedModel, rows: Sequence[Slots | None]) -> dict[str, reference.RowSlots]:
    """Module path -> the slots of every row, cut from the matrices by hand."""
    found: dict[str, reference.RowSlots] = {}
    for kind in find_sites(model).kinds:
        sites = find_sites(model).of_kinds((kind,))
        for layer, site in enumerate(sites):
            shape = (P, len(sites), 2, site.num_key_value_heads, _widest(sites))
            cuts = [None if r is None or kind not in r else r[kind].view(shape)[:, layer] for r in rows]
            found[site.module] = [
                None if c is None else (c[:, 0, :, : site.key_width].transpose(0, 1),
                                        c[:, 1, :, : site.value_width].transpose(0, 1))
                for c in cuts
            ]  # fmt: skip
    return found


def _widest(sites: Sequence[Any]) -> int:
    return max(site.key_width for site in sites)


def referee(build: Build, rows: Sequence[Slots | None], first: int = P) -> Callable[[Tensor], Tensor]:
    """Ids of whole decoder rows -> their logits; tokens count from `first`, as PEFT has them behind P slots."""
    model = build()

    def logits(ids: Tensor) -> Tensor:
        repeated = [r for r in rows for _ in range(len(ids) // len(rows))]
        positions = torch.arange(first, first + ids.shape[1])[None].expand(len(ids), -1)
        with reference.at_work(model, placed(model, repeated)):
            return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    return logits


@torch.no_grad()
def greedy(logits: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """NEW tokens, each by a full pass."""
    for _ in range(NEW):
        ids = torch.cat([ids, logits(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, -NEW:]


@torch.no_grad()
def beam_search(logits: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """The best of BEAMS beams for one row, each step by a full pass; nothing ends a beam early."""
    beams, scores = ids, torch.zeros(1)
    for _ in range(NEW):
        every = scores[:, None] + logits(beams)[:, -1].log_softmax(-1)
        scores, places = every.flatten().topk(BEAMS)
        beams = torch.cat([beams[places // VOCABULARY], places[:, None] % VOCABULARY], dim=1)
    return beams[:1, -NEW:]


# --- the two sides ------------------------------------------------------------------------------------------


def peft_model(build: Build, adapters: Mapping[str, Tensor], task: str = "CAUSAL_LM") -> Any:
    """A model under PEFT's prefix-tuning; the first adapter is at work."""
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    first, *others = adapters
    model = peft.get_peft_model(build(), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    for name, matrix in adapters.items():
        model.prompt_encoder[name].load_prompt_embeddings(matrix)
    return model.eval()


def with_peft(build: Build, slots: Slots, work: Work, task: str = "CAUSAL_LM") -> Callable[[], Values]:
    """The work, on the model under PEFT. Of several kinds of slots it has a place for one."""
    matrix = slots["self"] if "self" in slots else slots["encoder_self"]
    return lambda: work(peft_model(build, {"default": matrix}, task))


def our_prefix(model: PreTrainedModel, slots: Slots, positions: Positions = "shifted") -> MethodModule:
    """The same slots as a prefix of ours."""
    method = method_class("prefix_tuning")
    config = method.Config.model_validate({"num_virtual_tokens": P, "sites": list(slots), "positions": positions})
    by_module, tensors = placed(model, [slots]), dict[str, Tensor]()
    for site in find_sites(model).of_kinds(tuple(slots)):
        (pair,) = by_module[site.module]
        assert pair is not None
        tensors |= {f"{site.name}.key": pair[0].contiguous(), f"{site.name}.value": pair[1].contiguous()}
    return method.restore(find_sites(model), config, tensors)


def with_antefix(build: Build, slots: Slots, work: Work, positions: Positions = "shifted") -> Callable[[], Values]:
    """The work, on the model with our prefix attached."""

    def run() -> Values:
        model = build()
        with attached(model, our_prefix(model, slots, positions)):
            return work(model)

    return run


def writing(ids: Tensor, mask: Tensor | None = None, **options: Any) -> Work:
    """NEW tokens by transformers' `generate`."""
    known = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return lambda model: {"ids": model.generate(input_ids=ids, attention_mask=mask, **known)[:, -NEW:]}
