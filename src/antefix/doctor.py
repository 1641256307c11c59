"""Can this base carry a prefix, and where? Looks, then proves; every proof runs the base itself.

`examine` finds the sites and proves, with slots that hold the keys and values of a few words: that a batch without
a prefix is the base's, bit by bit; that the hook is the slow reference at every site; that a text as a prefix is
that text in context; that every slot receives a gradient; and that greedy generation chooses what one full forward
pass would choose. What may differ is measured in the base's own rounding noise: how much its logits change when
nothing but the arithmetic of attention does. Knows nothing of files, training or banks; leaves the base as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from antefix.attach import attached
from antefix.attention import reference
from antefix.base import Base
from antefix.errors import BaseModelError, one_line
from antefix.methods.base import MethodModule
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.initial import Positions
from antefix.parts.key_value import DirectSlots, KeyValue
from antefix.sites import Site, Sites, find_sites, record_text

_TEXT = "A prefix is a few learned keys and values; it stands before the text, at every layer, and steers it."
_WORDS = "Say it in a few words:"
_SLOTS, _TOKENS, _NEW_TOKENS = 5, 12, 8
_MOST_NOISE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
"""More than this, relative, is no rounding: the base attends in a way that the reference does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One promise, put to the test on one base."""

    name: str
    claim: str
    passed: bool | None
    """None: the claim does not apply to this base; `reason` says why."""
    measured: float | None = None
    """A relative difference, or a count; see `claim`."""
    tolerance: float | None = None
    """The most that `measured` may be."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found in a base."""

    base: str
    model: str
    dtype: str
    attention: str
    sites: Sites | None
    """None where the base was refused."""
    refusal: str | None
    """Why no prefix can be attached at all."""
    proofs: tuple[Proof, ...]

    @property
    def can_carry_prefix(self) -> bool:
        """Whether there are sites and no proof failed."""
        return self.refusal is None and all(p.passed is not False for p in self.proofs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything above, sites layer by layer."""
        sites = None if self.sites is None else self.sites.to_dict()
        return {**asdict(replace(self, sites=None)), "sites": sites, "can_carry_prefix": self.can_carry_prefix}


def examine(base: Base) -> Diagnosis:
    """Find the sites of a base and prove that prefixes work there; see the module's first lines.

    A base that cannot carry a prefix is no error: the diagnosis says why.
    """
    model = base.model
    known = {
        "base": base.name,
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }
    try:
        bench = _Bench.of(base)
        proofs = tuple(prove(bench) for prove in _PROOFS)
    except BaseModelError as error:
        return Diagnosis(**known, sites=None, refusal=str(error), proofs=())
    except Exception as error:  # a foreign model may fail in any way; that is the diagnosis
        return Diagnosis(**known, sites=None, refusal=f"running it failed: {_in_words(error)}", proofs=())
    return Diagnosis(**known, sites=bench.sites, refusal=None, proofs=proofs)


def sites_in_words(sites: Sites) -> list[str]:
    """One line for every run of like layers: `self, layers 0-29: 9 heads, 3 key/value heads, width 64`."""
    lines = []
    for kind in sites.kinds:
        for shape, group in groupby(sites.of_kinds((kind,)), key=_shape_in_words):
            layers = [site.layer for site in group]
            where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
            lines.append(f"{kind}, {where}: {shape}")
    return lines


def _shape_in_words(site: Site) -> str:
    width = (
        f"{site.key_width}" if site.key_width == site.value_width else f"{site.key_width}, values {site.value_width}"
    )
    return f"{site.num_heads} heads, {site.num_key_value_heads} key/value heads, width {width}"


# --- the proofs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Bench:
    """What the proofs share."""

    base: Base
    sites: Sites
    batch: dict[str, Tensor]
    bare: Tensor
    """The logits of the batch without a prefix."""
    noise: float
    """The relative difference that another arithmetic of attention makes to them."""

    @classmethod
    def of(cls, base: Base) -> _Bench:
        sites = find_sites(base.model)
        batch = _batch(base, sites)
        bare = _logits(base.model, batch)
        with reference.at_work(base.model, {}):
            noise = _difference(_logits(base.model, batch), bare)
        return cls(base, sites, batch, bare, noise)

    @property
    def tolerance(self) -> float:
        return max(1e-4, 4 * self.noise)


def _prove_bare(bench: _Bench) -> Proof:
    model = bench.base.model
    with attached(model, _words(bench), rows=[-1, -1]):
        within = _logits(model, bench.batch)
    changed = int((bench.bare != within).sum()) + int((bench.bare != _logits(model, bench.batch)).sum())
    return Proof(
        name="bare", claim="without a prefix every logit is the base's, bit by bit; logits that differ",
        passed=changed == 0, measured=changed, tolerance=0,
    )  # fmt: skip


def _prove_reference(bench: _Bench) -> Proof:
    model, sites, module = bench.base.model, bench.sites, _words(bench)
    slots = module.slots()
    with attached(model, module, rows=[0, -1]):
        found = _logits(model, bench.batch)
    with reference.at_work(model, {s.module: [slots[s.name], None] for s in sites.attention}):
        wanted = _logits(model, bench.batch)
    difference, effect = _difference(found, wanted), _difference(wanted[:1], bench.bare[:1])
    reason = ""
    if bench.noise > _MOST_NOISE[model.dtype]:
        reason = f"the base attends in a way that the reference does not know (difference {bench.noise:.2g})"
    elif effect <= bench.tolerance:
        reason = "the slots change nothing that the model says"
    return Proof(
        name="reference", claim="slots at every site act as the slow reference says; relative difference",
        passed=difference <= bench.tolerance and not reason, measured=difference, tolerance=bench.tolerance,
        reason=reason,
    )  # fmt: skip


def _prove_text(bench: _Bench) -> Proof:
    name, claim = "text", "a text's keys and values, as a prefix, are that text in context; relative difference"
    base, sites = bench.base, bench.sites
    half = min(_SLOTS, _window(base) // 2)
    does_not_apply = {
        "for decoder-only models": sites.kinds != ("self",),
        "the model takes no position_ids": sites.positions == "none",
        "the model's window is a single token": half == 0,
        "some layers keep a state besides attention": len(sites.attention) < _num_layers(base),
    }
    for reason, holds in does_not_apply.items():
        if holds:
            return Proof(name=name, claim=claim, passed=None, reason=reason)
    ids = _ids(base, _TEXT, 2 * half)
    whole = _logits(base.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, half:]
    rest = ids[:, half:]
    with attached(base.model, _text_slots(base, sites, ids[:, :half], "shifted")):
        found = _logits(base.model, {"input_ids": rest, "attention_mask": torch.ones_like(rest)})
    difference = _difference(found, whole)
    return Proof(
        name=name, claim=claim, passed=difference <= bench.tolerance, measured=difference, tolerance=bench.tolerance
    )


def _prove_gradients(bench: _Bench) -> Proof:
    module = _words(bench).requires_grad_(True)
    with attached(bench.base.model, module), torch.enable_grad():
        bench.base.model(**bench.batch).logits.float().square().mean().backward()
    slots = [t.grad for pair in module.slots().values() for t in pair]
    reached = [(g.abs().sum(dim=(0, 2)) > 0) & g.isfinite().all(dim=2).all(dim=0) for g in slots if g is not None]
    without = _SLOTS * len(slots) - sum(int(r.sum()) for r in reached)
    return Proof(
        name="gradients", claim="every slot of every site receives a gradient; slots without one",
        passed=without == 0, measured=without, tolerance=0,
    )  # fmt: skip


def _prove_generation(bench: _Bench) -> Proof:
    name = "generation"
    claim = "greedy generation chooses what one full forward pass would; relative lead of a token not chosen"
    if bench.sites.kinds == ("encoder_self",):
        return Proof(name=name, claim=claim, passed=None, reason="the model does not generate")
    if bench.sites.is_encoder_decoder and _start_token(bench.base.model) is None:
        return Proof(name=name, claim=claim, passed=None, reason="the model says no decoder_start_token_id")
    model, batch = bench.base.model, {k: v for k, v in bench.batch.items() if k != "decoder_input_ids"}
    own = model.generation_config  # would be mixed in, with forced tokens and penalties
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=_NEW_TOKENS, do_sample=False, num_beams=1, eos_token_id=None,
        pad_token_id=bench.base.tokenizer.pad_token_id, decoder_start_token_id=_start_token(model),
    )  # fmt: skip
    try:
        with attached(model, _words(bench), rows=[0, -1]), torch.no_grad():
            ids = model.generate(**batch)  # type: ignore[operator]
            logits = _logits(model, _forced(batch, ids, bench.sites))[:, -_NEW_TOKENS - 1 : -1]
    finally:
        model.generation_config = own
    chosen = logits.gather(-1, ids[:, -_NEW_TOKENS:, None])[..., 0]
    lead = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
    return Proof(name=name, claim=claim, passed=lead <= bench.tolerance, measured=lead, tolerance=bench.tolerance)


_PROOFS: tuple[Callable[[_Bench], Proof], ...] = (
    _prove_bare,
    _prove_reference,
    _prove_text,
    _prove_gradients,
    _prove_generation,
)


# --- what the proofs are made of ----------------------------------------------------------------------------


def _ids(base: Base, text: str, count: int) -> Tensor:
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BaseModelError(f"the tokenizer of '{base.name}' makes no tokens of a plain English text")
    return torch.tensor([(ids * count)[:count]], device=base.model.device)


def _batch(base: Base, sites: Sites) -> dict[str, Tensor]:
    """Two rows, the second with padding: on the left, where a decoder goes on at the right."""
    ids = _ids(base, _TEXT, 2 * _TOKENS).reshape(2, _TOKENS)
    mask = torch.ones_like(ids)
    if sites.kinds == ("self",):
        mask[1, :3] = 0
    else:
        mask[1, -3:] = 0
    pad = base.tokenizer.pad_token_id or 0
    batch = {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
    if sites.is_encoder_decoder:
        return {**batch, "decoder_input_ids": ids[:, :4]}
    return batch


def _forced(batch: dict[str, Tensor], ids: Tensor, sites: Sites) -> dict[str, Tensor]:
    """The generated tokens, to be read in one pass."""
    if sites.is_encoder_decoder:
        return {**batch, "decoder_input_ids": ids}
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - _TOKENS), value=1)
    forced = {"input_ids": ids, "attention_mask": mask}
    if sites.positions != "none":
        forced["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return forced


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(**batch, use_cache=False).logits
    if (mask := batch["attention_mask"]).shape[1] == out.shape[1] and "decoder_input_ids" not in batch:
        out = out * mask[..., None]
    return out.float()


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The length of the difference, as a part of how much the wanted logits vary over the vocabulary."""
    return float((found - wanted).norm() / (wanted - wanted.mean(-1, keepdim=True)).norm())


def _words(bench: _Bench) -> MethodModule:
    """A prefix of real words: slots of any other size would drive a deep model where rounding is all it says."""
    return _text_slots(bench.base, bench.sites, _ids(bench.base, _WORDS, _SLOTS), "in_place")


def _text_slots(base: Base, sites: Sites, ids: Tensor, positions: Positions) -> MethodModule:
    slots = {site.name: KeyValue(call.key[0], call.value[0]) for site, call in record_text(base.model, ids)}
    config = PrefixTuningConfig(num_virtual_tokens=None, positions=positions)
    module = PrefixTuning(config, DirectSlots(sites.attention, slots), None)
    return cast(MethodModule, module.requires_grad_(False).eval())


def _window(base: Base) -> int:
    """The fewest tokens that any layer looks back on."""
    config = base.model.config.get_text_config()
    known = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((int(n) for n in known if n), default=2 * _SLOTS)


def _num_layers(base: Base) -> int:
    return int(getattr(base.model.config.get_text_config(), "num_hidden_layers", 0))


def _in_words(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 300)


def _start_token(model: PreTrainedModel) -> int | None:
    start = getattr(model.config, "decoder_start_token_id", None)
    return getattr(model.generation_config, "decoder_start_token_id", None) if start is None else int(start)
