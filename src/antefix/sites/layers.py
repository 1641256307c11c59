"""What blocks are made of, found by another recorded forward pass.

What feeds attention's queries, keys and values is asked of autograd, so that fused projections (GPT-2, GPT-NeoX) need
no table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from antefix.attention.hook import RecordedCall, bare
from antefix.hooks import while_hooked
from antefix.sites.reading import DECODER_TOKENS, ENCODER_TOKENS, recorded, some_ids
from antefix.sites.site import Layers, LinearSite, NormSite, Role, Site

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True, slots=True)
class _Used:
    """A linear layer at work: how many attention calls were made before, and its output, open to gradients."""

    module: nn.Module
    calls_before: int
    output: Tensor


@torch.inference_mode(mode=False)
@torch.enable_grad()
def look_at_layers(model: PreTrainedModel, attention: Sequence[Site]) -> Layers:
    """The layers of a model whose attention sites are known."""
    encoder_ids, decoder_ids = (some_ids(model, count) for count in (ENCODER_TOKENS, DECODER_TOKENS))
    used: list[_Used] = []
    later: list[nn.Module] = []
    feeds: dict[nn.Module, nn.Module] = {}
    names = {module: name for name, module in model.named_modules()}
    blocks = tuple(dict.fromkeys(_block_of(site.module) for site in attention))
    of_base = [module for name, module in model.base_model.named_modules() if not _is_unread(name)]
    embeddings = model.get_input_embeddings()
    width = int(embeddings.weight.shape[1])  # type: ignore[index]
    norms = [m for m in of_base if isinstance(w := getattr(m, "weight", None), nn.Parameter) and w.shape == (width,)]
    with bare(), _watching_norms(model, norms, feeds):
        calls = recorded(
            model, encoder_ids, decoder_ids, None, lambda calls: _watching(model, calls, used, later, len(attention))
        )
    return Layers(
        linear=_linear_sites(used, calls, attention, names),
        norms=tuple(
            NormSite(
                names[m],
                width,
                _bias_of(m) is not None,
                _block_of(names[m]) in blocks,
                names[feeds[m]] if m in feeds else None,
            )
            for m in norms
        ),
        embeddings=names[embeddings],
        biased={names[m]: len(bias) for m in of_base if (bias := _bias_of(m)) is not None},
        blocks=blocks,
        after_blocks=tuple(
            names[m] for m in dict.fromkeys(later) if m in set(of_base) and _block_of(names[m]) not in blocks
        ),
        weights={
            name: tuple(p.shape)
            for name, p in model.named_parameters()
            if not (name.startswith("antefix.") or _is_unread(name))
        },
    )


def _is_unread(name: str) -> bool:
    """Whether it pools BERT's last hidden states: labels are read off these themselves, before it."""
    return "pooler" in name.split(".")


def _bias_of(module: nn.Module) -> nn.Parameter | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, nn.Parameter) and bias.ndim == 1 else None


def _linear_sites(
    used: Sequence[_Used], calls: Sequence[RecordedCall], attention: Sequence[Site], names: Mapping[nn.Module, str]
) -> tuple[LinearSite, ...]:
    found: dict[int, LinearSite] = {}
    feed_forward: dict[str, list[int]] = {}
    for place, one in enumerate(used):
        name = names[one.module]
        inside = next((n for n, site in enumerate(attention) if name.startswith(f"{site.module}.")), None)
        if inside is not None and (columns := _columns(one, calls[inside])) is not None:
            found[place] = _site(one, name, attention[inside], "attention_in", columns)
        elif (of := next((s for s in attention if s.output_projection == name), None)) is not None:
            found[place] = _site(one, name, of, "attention_out")
        elif inside is None and one.calls_before > 0:
            block = _block_of(attention[one.calls_before - 1].module)
            if name.startswith(f"{block}."):
                feed_forward.setdefault(block, []).append(place)
    for block, places in feed_forward.items():
        site = next(s for s in attention if s.kind != "cross" and s.module.startswith(f"{block}."))
        for place in places:
            role: Role = "feed_forward_out" if place == places[-1] else "feed_forward_in"
            found[place] = _site(used[place], names[used[place].module], site, role)
    return tuple(found[place] for place in sorted(found))


@contextmanager
def _watching(
    model: PreTrainedModel, calls: list[RecordedCall], used: list[_Used], later: list[nn.Module], num_calls: int
) -> Iterator[None]:
    """used: filled with linear layers; later: with what has weights and is called when attention is over."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]

    def open_to_gradients(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        opened = output + torch.zeros_like(output, requires_grad=True)
        used.append(_Used(module, len(calls), opened))
        return opened

    def keep_later(module: nn.Module, args: Any) -> None:
        if len(calls) == num_calls:
            later.append(module)

    layers = [m for m in model.modules() if isinstance(m, LINEAR) and m is not head]
    handles = [m.register_forward_hook(open_to_gradients) for m in layers]
    with_weights = [m for m in model.modules() if m is not head and any(True for _ in m.parameters(recurse=False))]
    handles += [m.register_forward_pre_hook(keep_later) for m in with_weights]
    with while_hooked(handles):
        yield


@contextmanager
def _watching_norms(model: nn.Module, norms: Sequence[nn.Module], feeds: dict[nn.Module, nn.Module]) -> Iterator[None]:
    """feeds: filled with the first linear layer that is given what a norm gives."""
    given: list[tuple[nn.Module, Tensor]] = []  # kept to the end, so that no memory is used twice

    def look(module: nn.Module, args: Any) -> None:
        for norm, output in given:
            if args and args[0].untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
                feeds.setdefault(norm, module)

    handles = [m.register_forward_hook(lambda norm, args, output: given.append((norm, output))) for m in norms]
    handles += [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, LINEAR)]
    with while_hooked(handles):
        yield


def _columns(one: _Used, call: RecordedCall) -> tuple[tuple[int, ...], ...] | None:
    """Which outputs of a layer feed queries, keys and values; None: it feeds nothing of this call."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for states in (call.query, call.key, call.value):
        if not states.requires_grad:
            found.append(())
            continue
        weights = torch.randn(states.shape, generator=draw).to(states)
        (gradient,) = torch.autograd.grad((states * weights).sum(), one.output, retain_graph=True, allow_unused=True)
        moved = None if gradient is None else gradient.flatten(0, -2).ne(0).any(0)
        found.append(() if moved is None else tuple(moved.nonzero().flatten().tolist()))
    return tuple(found) if any(found) else None


def _site(
    one: _Used, name: str, of: Site, role: Role, columns: tuple[tuple[int, ...], ...] = ((), (), ())
) -> LinearSite:
    weight = one.module.weight
    assert isinstance(weight, Tensor)
    width_in, width_out = weight.shape if isinstance(one.module, Conv1D) else weight.shape[::-1]
    return LinearSite(
        name=name,
        layer=of.layer,
        kind=of.kind,
        role=role,
        width_in=int(width_in),
        width_out=int(width_out),
        has_bias=one.module.bias is not None,
        query=columns[0],
        key=columns[1],
        value=columns[2],
    )


def _block_of(module: str) -> str:
    """The outermost numbered piece that a module stands in."""
    parts = module.split(".")
    first = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: first + 1])
