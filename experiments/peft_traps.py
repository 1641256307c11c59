"""PEFT's prefix-tuning beside ours, trap by trap: the same slots, the same tiny random models, one slow referee.

    python experiments/peft_traps.py

No download, a minute on one core. What is right is computed by neither side: whole rows are read anew for every
token, without a cache, padding or packing, and attention is `antefix.attention.reference`, one softmax over slots and
tokens; or, where slots are a text's keys and values, it is the bare model that reads the text in context.

Writes `results/peft_traps.json` and `.md`. A run under another transformers adds PEFT's column for it:

    pip install --no-deps --target other transformers==5.23.0
    PYTHONPATH=other python experiments/peft_traps.py

Axes: P slots, L layers, G key/value heads, D width.
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import requires
from typing import Any, Literal

import peft
import torch
import transformers
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.attach import attached
from antefix.attention import reference
from antefix.benchmarks.peers import give_slots
from antefix.benchmarks.workload import common_slots
from antefix.methods import method_class
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.sites import KINDS, Kind, find_sites

from units import ROOT, commit, made_with  # isort: skip

RESULTS = ROOT / "results" / "peft_traps"
P, ROWS, LENGTH, NEW, BEAMS = 5, 4, 9, 8, 4
VOCABULARY, LAYERS, HEADS, WIDTH = 263, 3, 6, 8
WINDOW = 4
TOLERANCE = 1e-3
"""Logits of these models are about 10 in size; float32 rounds them in the sixth digit."""

Slots = Mapping[Kind, Tensor]
"""For every kind of attention a matrix as PEFT holds it, (P, L * 2 * G * D): layer 0 key, layer 0 value, ..."""
Values = dict[str, Tensor]
"""What is compared: `ids` row by row, everything else by its largest difference."""
Build = Callable[[], PreTrainedModel]
Work = Callable[[Any], Values]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trap on one model."""

    trap: str
    model: str
    right: str
    """What is right, in words."""
    wanted: Values
    bare: Values
    """The same without slots: shows that they matter, and whose answer a wrong one is."""
    peft: Callable[[], Values]
    antefix: Callable[[], Values]
    note: str = ""


# --- models and slots ---------------------------------------------------------------------------------------

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HEADS * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 56, "max_position_embeddings": 128,
}  # fmt: skip
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_GROUPED = {**_SHAPE, **_TOKENS, "num_key_value_heads": 2, "head_dim": WIDTH + 2}
_SEQ2SEQ = {**_TOKENS, "decoder_start_token_id": 1, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
_GEMMA2 = {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None}
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {**_TOKENS, "vocab_size": VOCABULARY, "n_positions": 128,
              "n_embd": HEADS * WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 56}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": WINDOW}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, **_GEMMA2, "sliding_window": 100}),
    "BART": ("BartForConditionalGeneration", "BartConfig", {**_SEQ2SEQ, "d_model": HEADS * WIDTH,
             "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
             "decoder_attention_heads": HEADS, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56,
             "max_position_embeddings": 128, "forced_eos_token_id": None}),
    "T5": ("T5ForConditionalGeneration", "T5Config", {**_SEQ2SEQ, "d_model": HEADS * WIDTH, "d_kv": WIDTH, "d_ff": 56,
           "num_layers": LAYERS, "num_heads": HEADS, "relative_attention_num_buckets": 8}),
    "BERT": ("BertModel", "BertConfig", {**_SHAPE, **_TOKENS}),
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
    """Slots for every kind of attention the model has."""
    model = build()
    kinds = find_sites(model).kinds
    parts = (3 * common_slots(model, P, seed)).chunk(len(kinds), dim=1)  # the layers of a kind are as many and as wide
    return dict(zip(kinds, parts, strict=True))


def some_ids(seed: int, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- what is right ------------------------------------------------------------------------------------------


def placed(model: PreTrainedModel, rows: Sequence[Slots | None]) -> dict[str, reference.RowSlots]:
    """Module path -> the slots of every row, cut from the matrices by hand."""
    found: dict[str, reference.RowSlots] = {}
    for kind in find_sites(model).kinds:
        sites = find_sites(model).of_kinds((kind,))
        for layer, site in enumerate(sites):
            G = site.num_key_value_heads
            cut = [None if r is None or kind not in r else r[kind].view(P, len(sites), 2, G, -1)[:, layer] for r in rows]
            found[site.module] = [None if c is None else (c[:, 0].transpose(0, 1), c[:, 1].transpose(0, 1)) for c in cut]
    return found


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


def with_peft(build: Build, slots: Slots, work: Work, task: str = "CAUSAL_LM") -> Callable[[], Values]:
    """The work, on the model under PEFT. Of several kinds of slots it can take only one."""
    matrix = slots["self"] if "self" in slots else slots["encoder_self"]
    return lambda: work(peft_model(build, {"default": matrix}, task))


def peft_model(build: Build, adapters: Mapping[str, Tensor], task: str) -> Any:
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    first, *others = adapters
    model = peft.get_peft_model(build(), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    for name, matrix in adapters.items():
        give_slots(model, matrix, name)
    return model.eval()


def with_antefix(build: Build, slots: Slots, work: Work, positions: Positions = "shifted") -> Callable[[], Values]:
    """The work, on the model with our prefix attached."""

    def run() -> Values:
        model = build()
        with attached(model, our_prefix(model, slots, positions)):
            return work(model)

    return run


def our_prefix(model: PreTrainedModel, slots: Slots, positions: Positions) -> MethodModule:
    method = method_class("prefix_tuning")
    config = method.Config.model_validate({"num_virtual_tokens": P, "sites": list(slots), "positions": positions})
    by_module, tensors = placed(model, [slots]), {}
    for site in find_sites(model).of_kinds(tuple(slots)):
        (pair,) = by_module[site.module]
        assert pair is not None
        tensors |= {f"{site.name}.key": pair[0].contiguous(), f"{site.name}.value": pair[1].contiguous()}
    return method.restore(find_sites(model), config, tensors)


def both(build: Build, slots: Slots, work: Work) -> dict[str, Callable[[], Values]]:
    """The same work on either side, for a decoder."""
    return {"peft": with_peft(build, slots, work), "antefix": with_antefix(build, slots, work)}


def writing(ids: Tensor, mask: Tensor | None = None, **options: Any) -> Work:
    """NEW tokens by transformers' `generate`."""
    known = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return lambda model: {"ids": model.generate(input_ids=ids, attention_mask=mask, **known)[:, -NEW:]}


# --- the traps ----------------------------------------------------------------------------------------------


def reading() -> Iterator[Case]:
    for name in ("Llama", "GPT-2", "Gemma 2"):
        build, ids = builder(name), some_ids(1)
        slots = random_slots(build)
        work: Work = lambda model, ids=ids: {"logits": model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits}
        yield Case(
            trap="forward pass" + (", soft caps" if name == "Gemma 2" else ""), model=name,
            right="one softmax over slots and tokens",
            wanted={"logits": referee(build, [slots] * ROWS)(ids)},
            bare={"logits": referee(build, [None] * ROWS)(ids)}, **both(build, slots, work),
        )  # fmt: skip
    for name in ("Llama", "GPT-2", "Gemma 2"):
        build, whole = builder(name), behind_a_text(some_ids(2))
        rest, slots = whole[:, P:], text_slots(build, whole[:1, :P])
        work = lambda model, ids=rest: {"logits": model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits}
        yield Case(
            trap="a text's keys and values as slots", model=name, right="the bare model reading that text in context",
            wanted={"logits": build()(whole, use_cache=False).logits[:, P:]},
            bare={"logits": build()(rest).logits}, **both(build, slots, work),
        )  # fmt: skip


def behind_a_text(rest: Tensor) -> Tensor:
    """The same P tokens before every row."""
    return torch.cat([some_ids(13, 1, P).expand(len(rest), -1), rest], dim=1)


def text_slots(build: Build, ids: Tensor, encoder_ids: Tensor | None = None) -> dict[Kind, Tensor]:
    """What transformers' own cache holds of a text (of a decoder's, behind an encoder's), as a matrix."""
    model = build()
    if encoder_ids is None:
        cache = cache_of(model(input_ids=ids, use_cache=True))
    else:
        cache = cache_of(model(input_ids=encoder_ids, decoder_input_ids=ids, use_cache=True)).self_attention_cache
    pairs = [t[0] for layer in cache.layers for t in (layer.keys, layer.values)]
    return {"self": torch.cat([t.transpose(0, 1).flatten(1) for t in pairs], dim=1)}


def cache_of(output: Any) -> Any:
    """transformers 5.24 calls it by another name."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def decoding() -> Iterator[Case]:
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "no cache": {"use_cache": False},
    }
    for name in ("Llama", "GPT-2"):
        build, ids = builder(name), some_ids(3)
        slots = random_slots(build)
        wanted = {"ids": greedy(referee(build, [slots] * ROWS), ids)}
        bare = {"ids": greedy(referee(build, [None] * ROWS), ids)}
        for way, options in ways.items():
            yield Case(
                trap=f"generation, {way}", model=name, right="every token by a full pass",
                wanted=wanted, bare=bare, **both(build, slots, writing(ids, **options)),
            )  # fmt: skip


def prompt_lookup() -> Iterator[Case]:
    ids = some_ids(4, ROWS, 6).repeat(1, 3)

    def work(model: Any) -> Values:
        rows = [writing(row, prompt_lookup_num_tokens=3)(model)["ids"] for row in ids.split(1)]
        return {"ids": torch.cat(rows)}

    for name in ("Llama", "GPT-2"):  # the latter repeats itself, so that guesses come true
        build = builder(name)
        slots = random_slots(build)
        yield Case(
            trap="generation, prompt lookup", model=name, right="every token by a full pass",
            wanted={"ids": greedy(referee(build, [slots] * ROWS), ids)},
            bare={"ids": greedy(referee(build, [None] * ROWS), ids)}, **both(build, slots, work),
        )  # fmt: skip


def beams() -> Iterator[Case]:
    build, ids = builder("Llama"), some_ids(5)
    slots = random_slots(build)
    yield Case(
        trap=f"generation, {BEAMS} beams", model="Llama", right="beam search over full passes, each row alone",
        wanted={"ids": torch.cat([beam_search(referee(build, [slots]), row) for row in ids.split(1)])},
        bare={"ids": torch.cat([beam_search(referee(build, [None]), row) for row in ids.split(1)])},
        **both(build, slots, writing(ids, num_beams=BEAMS)),
    )  # fmt: skip


def training() -> Iterator[Case]:
    for name in ("Llama", "GPT-2"):
        build = builder(name)
        slots = random_slots(build)
        wanted, bare = right_step(build, slots), right_step(build, None)

        def checkpointed(build: Build = build) -> PreTrainedModel:
            model = build()
            model.gradient_checkpointing_enable()
            return model

        def enabled_late(model: Any) -> None:
            model.gradient_checkpointing_enable()

        for trap, made, prepare, options in (
            ("training", build, None, {}),
            ("training, use_cache=False", build, None, {"use_cache": False}),
            ("training, checkpointing switched on before", checkpointed, None, {}),
            ("training, checkpointing switched on after", build, enabled_late, {}),
        ):
            yield Case(
                trap=trap, model=name, right="loss and slots' gradient of a full pass", wanted=wanted, bare=bare,
                peft=lambda m=made, p=prepare, o=options, s=slots: peft_step(m, s, p, o),
                antefix=lambda m=made, p=prepare, o=options, s=slots: our_step(m, s, p, o),
            )  # fmt: skip


def right_step(build: Build, slots: Slots | None) -> Values:
    ids = some_ids(6)
    matrix = None if slots is None else slots["self"].clone().requires_grad_()
    row: Slots | None = None if matrix is None else {"self": matrix}
    with torch.enable_grad():
        logits = referee(build, [row] * ROWS)(ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    if matrix is None:
        return {"loss": loss.detach()}
    (gradient,) = torch.autograd.grad(loss, matrix)
    return {"loss": loss.detach(), "gradient": gradient}


def step(model: Any, prepare: Callable[[Any], None] | None, options: dict[str, Any]) -> Tensor:
    """Forward and backward, in training mode; the loss."""
    ids = some_ids(6)
    model.train()
    if prepare is not None:
        prepare(model)
    with torch.enable_grad():
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **options).loss
        loss.backward()
    return loss.detach()


def peft_step(build: Build, slots: Slots, prepare: Callable[[Any], None] | None, options: dict[str, Any]) -> Values:
    model = peft_model(build, {"default": slots["self"]}, "CAUSAL_LM")
    weight = model.prompt_encoder["default"].embedding.weight
    loss = step(model, prepare, options)
    return {"loss": loss, "gradient": torch.zeros_like(weight) if weight.grad is None else weight.grad}


def our_step(build: Build, slots: Slots, prepare: Callable[[Any], None] | None, options: dict[str, Any]) -> Values:
    model = build().requires_grad_(False)
    module = our_prefix(model, slots, "shifted").requires_grad_(True)
    with attached(model, module):
        loss = step(model, prepare, options)
    gradients = [t.grad for pair in module.slots().values() for t in pair]
    assert all(g is not None for g in gradients)
    return {"loss": loss, "gradient": torch.cat([g.transpose(0, 1).flatten(1) for g in gradients], dim=1)}


def left_padding() -> Iterator[Case]:
    build, ids = builder("Llama"), some_ids(7)
    slots = random_slots(build)
    gaps = torch.arange(ROWS)
    mask = (torch.arange(LENGTH) >= gaps[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = [row[:, gap:] for row, gap in zip(ids.split(1), gaps.tolist(), strict=True)]

    def by_rows(row_slots: Slots | None, first: int = P) -> Values:
        logits = referee(build, [row_slots], first)
        return {"logits": torch.cat([logits(row)[0] for row in alone])}

    def reading(**options: Tensor) -> Work:
        batch = {"input_ids": ids * mask, "attention_mask": mask, **options}
        return lambda model: {"logits": model(**batch).logits[mask.bool()]}

    right = "each row alone, without padding"
    for trap, options in (("mask alone", {}), ("mask and position_ids", {"position_ids": positions})):
        yield Case(
            trap=f"left padding, forward pass, {trap}", model="Llama", right=right, wanted=by_rows(slots),
            bare=by_rows(None), **both(build, slots, reading(**options)),
        )  # fmt: skip
    written = [greedy(referee(build, [slots]), row) for row in alone]
    yield Case(
        trap="left padding, generation", model="Llama", right=right, wanted={"ids": torch.cat(written)},
        bare={"ids": torch.cat([greedy(referee(build, [None]), row) for row in alone])},
        **both(build, slots, writing(ids * mask, mask)),
    )  # fmt: skip


def sliding_window() -> Iterator[Case]:
    build = builder("Mistral")
    ids, slots = some_ids(8), random_slots(build)
    options = {"attention_mask": torch.ones_like(ids)}
    work: Work = lambda model: {"logits": model(input_ids=ids, **options).logits}
    right = f"slots in sight of every token, tokens {WINDOW} back"
    wanted, bare = referee(build, [slots] * ROWS), referee(build, [None] * ROWS)
    yield Case(
        trap="sliding window, forward pass", model="Mistral", right=right, wanted={"logits": wanted(ids)},
        bare={"logits": bare(ids)}, **both(build, slots, work),
    )  # fmt: skip
    yield Case(
        trap="sliding window, generation", model="Mistral", right=right, wanted={"ids": greedy(wanted, ids)},
        bare={"ids": greedy(bare, ids)}, **both(build, slots, writing(ids)),
    )  # fmt: skip
    rest, model = some_ids(9, ROWS, 3), build()
    whole = behind_a_text(rest)
    slots = text_slots(build, whole[:1, :P])
    right = f"slots leave the window as a text's tokens do, {WINDOW} back"
    text: Work = lambda model: {"logits": model(input_ids=rest, attention_mask=torch.ones_like(rest)).logits}
    yield Case(
        trap="sliding window, a text's keys and values as slots, forward pass", model="Mistral", right=right,
        wanted={"logits": model(whole, use_cache=False).logits[:, P:]}, bare={"logits": model(rest).logits},
        **both(build, slots, text),
    )  # fmt: skip
    yield Case(
        trap="sliding window, a text's keys and values as slots, generation", model="Mistral", right=right,
        wanted={"ids": greedy(lambda ids: model(ids, use_cache=False).logits, whole)},
        bare={"ids": greedy(lambda ids: model(ids, use_cache=False).logits, rest)},
        **both(build, slots, writing(rest)),
    )  # fmt: skip


def mixed() -> Iterator[Case]:
    build, ids = builder("Llama"), some_ids(10)
    one, other = random_slots(build, 0), random_slots(build, 1)
    names = ["one", "other", "one", "other"]
    rows: list[Slots | None] = [{"one": one, "other": other}[name] for name in names]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def under_peft(work: Work) -> Callable[[], Values]:
        return lambda: work(peft_model(build, {"one": one["self"], "other": other["self"]}, "CAUSAL_LM"))

    def under_ours(work: Work) -> Callable[[], Values]:
        def run() -> Values:
            model = build()
            prefixes = [our_prefix(model, slots, "shifted") for slots in (one, other)]
            with attached(model, *prefixes, rows=[0, 1, 0, 1]):
                return work(model)

        return run

    wanted, bare = referee(build, rows), referee(build, [None] * ROWS)
    right = "each row alone under its own prefix"
    yield Case(
        trap="two prefixes in one batch, forward pass", model="Llama", right=right, wanted={"logits": wanted(ids)},
        bare={"logits": bare(ids)},
        peft=under_peft(lambda model: {"logits": model(**batch, adapter_names=names).logits}),
        antefix=under_ours(lambda model: {"logits": model(**batch).logits}),
    )  # fmt: skip
    yield Case(
        trap="two prefixes in one batch, generation", model="Llama", right=right, wanted={"ids": greedy(wanted, ids)},
        bare={"ids": greedy(bare, ids)}, peft=under_peft(writing(ids, adapter_names=names)),
        antefix=under_ours(writing(ids)),
    )  # fmt: skip


def encoder_decoder() -> Iterator[Case]:
    for name in ("BART", "T5"):
        build, source = builder(name), some_ids(11)
        yield from own_slots_everywhere(name, build, source)
        yield from decoder_text(name, build, source[:1])


def own_slots_everywhere(name: str, build: Build, source: Tensor) -> Iterator[Case]:
    slots, target, model = random_slots(build), some_ids(12, ROWS, 4), build()

    def right(row: Slots | None, ids: Tensor) -> Any:
        with reference.at_work(model, placed(model, [row] * ROWS)):
            return model(input_ids=source, decoder_input_ids=ids, use_cache=False)

    def values(found: Any) -> Values:
        return {"encoder": found.encoder_last_hidden_state, "logits": found.logits}

    work: Work = lambda model: values(model(input_ids=source, decoder_input_ids=target))
    start = torch.full((ROWS, 1), 1)
    words = "slots of their own in the encoder, the decoder and the cross-attention"
    prompt = peft_model(build, {"default": slots["self"]}, "SEQ_2_SEQ_LM").get_prompt(1)
    lengths = [c.get_seq_length() for c in (prompt.self_attention_cache, prompt.cross_attention_cache)]
    yield Case(
        trap="encoder-decoder, forward pass", model=name, right=words, wanted=values(right(slots, target)),
        bare=values(right(None, target)), peft=with_peft(build, slots, work, "SEQ_2_SEQ_LM"),
        antefix=with_antefix(build, slots, work, "in_place"),
        note=f"PEFT's get_prompt: {lengths[0]} slots for the decoder's self-attention, {lengths[1]} for the "
        "cross-attention, none for the encoder; one matrix",
    )  # fmt: skip
    work = writing(source)
    yield Case(
        trap="encoder-decoder, generation", model=name, right=words,
        wanted={"ids": greedy(lambda ids: right(slots, ids).logits, start)},
        bare={"ids": greedy(lambda ids: right(None, ids).logits, start)},
        peft=with_peft(build, slots, work, "SEQ_2_SEQ_LM"), antefix=with_antefix(build, slots, work, "in_place"),
    )  # fmt: skip


def decoder_text(name: str, build: Build, source: Tensor) -> Iterator[Case]:
    model, start = build(), torch.ones(1, 1, dtype=torch.long)
    whole = behind_a_text(torch.cat([start, some_ids(14, 1, 4)], dim=1))
    slots, rest = text_slots(build, whole[:, :P], source), whole[:, P:]

    def bare(ids: Tensor) -> Tensor:
        return model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits

    work: Work = lambda model: {"logits": model(input_ids=source, decoder_input_ids=rest).logits}
    right = "the bare model reading that text in context"
    yield Case(
        trap="encoder-decoder, a decoder text's keys and values as slots, forward pass", model=name, right=right,
        wanted={"logits": bare(whole)[:, P:]}, bare={"logits": bare(rest)},
        peft=with_peft(build, slots, work, "SEQ_2_SEQ_LM"), antefix=with_antefix(build, slots, work, "in_place"),
    )  # fmt: skip
    if name == "BART":  # this one writes the same, text or no text
        return
    work = writing(source)
    yield Case(
        trap="encoder-decoder, a decoder text's keys and values as slots, generation", model=name, right=right,
        wanted={"ids": greedy(bare, whole[:, : P + 1])}, bare={"ids": greedy(bare, whole[:, P : P + 1])},
        peft=with_peft(build, slots, work, "SEQ_2_SEQ_LM"), antefix=with_antefix(build, slots, work, "in_place"),
    )  # fmt: skip


def encoder_only() -> Iterator[Case]:
    build, ids = builder("BERT"), some_ids(15)
    slots, model = random_slots(build), build()

    def right(row: Slots | None) -> Values:
        with reference.at_work(model, placed(model, [row] * ROWS)):
            return {"hidden": model(ids, position_ids=torch.arange(P, P + LENGTH)[None]).last_hidden_state}

    work: Work = lambda model: {
        "hidden": model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    }
    yield Case(
        trap="encoder alone", model="BERT", right="one softmax over slots and tokens", wanted=right(slots),
        bare=right(None), peft=with_peft(build, slots, work, "FEATURE_EXTRACTION"),
        antefix=with_antefix(build, slots, work),
    )  # fmt: skip


TRAPS: tuple[Callable[[], Iterator[Case]], ...] = (
    reading, training, decoding, prompt_lookup, beams, left_padding, sliding_window, mixed, encoder_decoder,
    encoder_only,
)  # fmt: skip


# --- what was seen ------------------------------------------------------------------------------------------


def seen(run: Callable[[], Values], case: Case) -> dict[str, Any]:
    """What a side gave, beside what is right."""
    try:
        found = run()
    except Exception as error:
        return {"verdict": kind_of(error), "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    values = {name: comparison(found[name], wanted) for name, wanted in case.wanted.items()}
    seen = {"verdict": "right" if all(v["right"] for v in values.values()) else "wrong", "values": values}
    as_bare = all(comparison(found[name], bare)["right"] for name, bare in case.bare.items())
    return {**seen, "as_without_slots": as_bare}


def comparison(found: Tensor, wanted: Tensor) -> dict[str, Any]:
    if wanted.is_floating_point():
        difference = float((found - wanted).abs().max())
        return {"right": difference <= TOLERANCE, "largest_difference": difference}
    equal = [bool(torch.equal(one, other)) for one, other in zip(found, wanted, strict=True)]
    return {"right": all(equal), "equal_rows": sum(equal), "rows": len(equal)}


def kind_of(error: Exception) -> Literal["refused", "crash"]:
    """Refused: a library said so. A crash is an error that nobody raised with a word of his own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = any(f"/{name}/" in last.filename for name in ("peft", "transformers", "antefix"))
    return "refused" if said and (last.line or "").lstrip().startswith("raise ") else "crash"


def examined(case: Case, with_ours: bool) -> dict[str, Any]:
    """A row of the table."""
    effect = {name: comparison(case.wanted[name], bare) for name, bare in case.bare.items()}
    assert not any(e["right"] for e in effect.values()), f"{case.trap}: the slots say nothing, nor would the row"
    row = {"trap": case.trap, "model": case.model, "right": case.right, "note": case.note, "slots_change": effect}
    row["peft"] = seen(case.peft, case)
    if with_ours:
        row["antefix"] = seen(case.antefix, case)
    return row


def cases() -> Iterator[Case]:
    for trap in TRAPS:
        yield from trap()


def is_supported(version: str) -> bool:
    """Whether Antefix is made for this transformers."""
    wanted = next(r for r in map(Requirement, requires("antefix") or ()) if r.name == "transformers")
    return wanted.specifier.contains(version)


# --- the table ----------------------------------------------------------------------------------------------


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "error" in found:
        return f"{found['verdict']}: `{found['error']}`"
    parts = [in_words(name, value) for name, value in found["values"].items()]
    return "; ".join(parts) + (" (as without slots)" if found["as_without_slots"] else "")


def in_words(name: str, value: dict[str, Any]) -> str:
    if "rows" in value:
        return "right" if value["right"] else f"wrong: {value['equal_rows']} of {value['rows']} rows are as they should be"
    figure = f"{value['largest_difference']:.2g}"
    return f"{name} right ({figure})" if value["right"] else f"{name} wrong by {figure}"


def table(runs: Mapping[str, Any]) -> str:
    """Markdown: a row a trap, a column of PEFT's for every transformers that was run."""
    versions = sorted(runs, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    newest = next(v for v in versions if all("antefix" in row for row in runs[v]["rows"]))
    columns = [f"PEFT {runs[v]['made_with']['peft']}, transformers {v}" for v in versions]
    head = ["trap", "model", "what is right", *columns, f"Antefix, transformers {newest}"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    known = {v: {(r["trap"], r["model"]): r for r in runs[v]["rows"]} for v in versions}
    for row in runs[newest]["rows"]:
        key = (row["trap"], row["model"])
        pefts = [cell(known[v].get(key, {}).get("peft")) for v in versions]
        lines.append(f"| {' | '.join([row['trap'], row['model'], row['right'], *pefts, cell(row['antefix'])])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    version = transformers.__version__
    with torch.no_grad():
        rows = [examined(case, is_supported(version)) for case in cases()]
    path = RESULTS.with_suffix(".json")
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs[version] = {"commit": commit(), "made_with": {**made_with(), "transformers": version}, "rows": rows}
    path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    written = table(runs)
    RESULTS.with_suffix(".md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
