"""What branches give, and the gradients of it, against each method's equation (branch_references.py): at every site of
tiny models, for every query of every head, on the queries, keys and values that attention was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from branch_references import REFERENCES, Given, Query
from conftest import SOURCE_COLUMNS, tell_sources, tiny_base, tiny_batch, tiny_method
from torch import Tensor, nn

from antefix.attach import attached
from antefix.attention.hook import RecordedCall, recording
from antefix.base import Base
from antefix.methods.base import MethodModule
from antefix.sites import Site, find_sites

ROWS = 2


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bart", "bert", "t5"])
def test_attention_and_its_gradients_are_the_equations(architecture: str, case: str) -> None:
    method, equation, config = REFERENCES[case]
    base = tiny_base(architecture)
    module = kept(base, tiny_method(base, method, **config))
    batch = tiny_batch(architecture, rows=ROWS)
    draw = torch.Generator().manual_seed(4)
    sites = [s for s in find_sites(base.model).attention if named_at(module, s) and is_recorded(architecture, s)]
    with watched(base, sites, module, batch) as seen:
        for site in sites:
            call, state, behind = seen.calls[site.module], seen.states[site.name], seen.behind.get(site.name)
            own = named_at(module, site)
            got = [call.query, call.key, call.value, state]
            exact_own, exact_got = {n: exact(t) for n, t in own.items()}, [exact(t) for t in got]
            made = [
                [[equation(query, exact_own) for query in queries] for queries in of_heads]
                for of_heads in all_queries(base, site, *exact_got)
            ]
            wanted = torch.stack([torch.stack([torch.stack([x.out_E for x in qs]) for qs in heads]) for heads in made])
            wanted_behind = summed(made)
            torch.testing.assert_close(call.output.transpose(1, 2).double(), wanted, rtol=1e-4, atol=2e-5)
            weight = torch.randn(wanted.shape, generator=draw)
            loss = (call.output.transpose(1, 2) * weight).sum()
            wanted_loss = (wanted * weight.double()).sum()
            if wanted_behind is not None:
                assert behind is not None
                torch.testing.assert_close(behind.double(), wanted_behind, rtol=1e-4, atol=2e-5)
                weight = torch.randn(behind.shape, generator=draw)
                loss, wanted_loss = (
                    loss + (behind * weight).sum(),
                    wanted_loss + (wanted_behind * weight.double()).sum(),
                )
            found, pulls = gradients(loss, got), gradients(wanted_loss, exact_got)
            # What enters the layer is made into queries, keys and values too.
            through = gradients((sum((x * p).sum() for x, p in zip(got[:3], pulls[:3], strict=True))), [state])
            pulls[3] = pulls[3] + through[0]
            of_own = zip(
                gradients(loss, list(own.values())), gradients(wanted_loss, list(exact_own.values())), strict=True
            )
            for name, (gradient, right) in zip(
                ["query", "key", "value", "state", *own], [*zip(found, pulls, strict=True), *of_own], strict=True
            ):
                assert bool(right.any()) or name == "state", f"{name} gets a gradient"
                torch.testing.assert_close(
                    gradient.double(), right.double(), rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
                )


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def kept(base: Base, module: MethodModule) -> MethodModule:
    """With tensors of a file as parameters, and gates and temperatures that say something."""
    draw = torch.Generator().manual_seed(3)
    tensors = module.kept_tensors()
    for name, tensor in tensors.items():
        if name.endswith(("gate", "theta")):
            tensor += torch.randn(tensor.shape, generator=draw) * 0.3
    restored = type(module).restore(find_sites(base.model), module.config, tensors)
    return restored.requires_grad_(True)


def named_at(module: MethodModule, site: Site) -> dict[str, Tensor]:
    """The parameters at a site by what they are: `key`, `token_gate`; of tensors of a file the ones that equal them."""
    names = {n.rpartition(".")[2]: t for n, t in module.kept_tensors().items() if n.startswith(f"{site.name}.")}
    return {name: next(p for p in module.parameters() if equal(p, tensor)) for name, tensor in names.items()}


def equal(parameter: Tensor, tensor: Tensor) -> bool:
    return parameter.shape == tensor.shape and torch.equal(parameter, tensor)


def is_recorded(architecture: str, site: Site) -> bool:
    """T5's scores of tokens have a bias but in its attention to the encoder, and no record holds that."""
    return architecture != "t5" or site.kind == "cross"


class Seen:
    """What a forward pass went through: attention's calls by module; by site what its layer was given, and what was
    added behind its output projection."""

    def __init__(self) -> None:
        self.calls: dict[str, RecordedCall] = {}
        self.states: dict[str, Tensor] = {}
        self.behind: dict[str, Tensor] = {}


@contextmanager
def watched(base: Base, sites: list[Site], module: MethodModule, batch: dict[str, Tensor]) -> Iterator[Seen]:
    model, seen, before, handles = base.model, Seen(), {}, []

    def layer(site: Site) -> Any:
        def look(_: Any, args: Any, kwargs: Any) -> None:
            seen.states[site.name] = args[0] if args else kwargs["hidden_states"]

        return look

    def before_adding(site: Site) -> Any:
        return lambda _, args, out: before.__setitem__(site.name, out)

    def after_adding(site: Site) -> Any:
        return lambda _, args, out: seen.behind.__setitem__(site.name, out - before[site.name])

    for embedding in (m for m in model.modules() if isinstance(m, nn.Embedding)):  # so that every state has a gradient
        handles.append(embedding.register_forward_hook(lambda _, args, out: out.requires_grad_(True)))
    for site in sites:
        handles.append(model.get_submodule(site.layer_module).register_forward_pre_hook(layer(site), with_kwargs=True))
        handles.append(model.get_submodule(site.output_projection).register_forward_hook(before_adding(site)))
    try:
        with attached(model, module), recording(model) as calls:
            for site in sites:
                handles.append(model.get_submodule(site.output_projection).register_forward_hook(after_adding(site)))
            tell_sources(base)
            model(**batch)
            names = {m: name for name, m in model.named_modules()}
            seen.calls = {names[call.module]: call for call in calls}
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def all_queries(
    base: Base, site: Site, query_BHTD: Tensor, key_BGSD: Tensor, value_BGSE: Tensor, state_BTC: Tensor
) -> list[list[list[Query]]]:
    """By row, head and place."""
    T, S = query_BHTD.shape[2], key_BGSD.shape[2]
    config = base.model.config
    scale, cap, window = 1.0 if config.model_type == "t5" else site.key_width**-0.5, None, S
    if config.model_type == "gemma2":
        scale, cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        window = config.sliding_window if config.layer_types[site.layer] == "sliding_attention" else S
    halves = halves_of(site.kind, config.is_encoder_decoder, T)
    if site.kind == "encoder_self":
        prompt = list(range(T))
    else:
        prompt = [0] if config.is_encoder_decoder else list(range(SOURCE_COLUMNS))
    by_row: list[list[list[Query]]] = [[[] for _ in range(site.num_heads)] for _ in range(ROWS)]
    for b, h, place in product(range(ROWS), range(site.num_heads), range(T)):
        group = h * site.num_key_value_heads // site.num_heads
        seen = slice(max(0, place + 1 - window), place + 1) if site.kind == "self" else slice(0, S)
        by_row[b][h].append(
            Query(
                q_D=query_BHTD[b, h, place], keys_SD=key_BGSD[b, group, seen], values_SE=value_BGSE[b, group, seen],
                scale=scale, cap=cap, hidden_TC=state_BTC[b], place=place, prompt=prompt, segment=halves[place],
                head=h, num_heads=site.num_heads, group=group, layer=site.layer,
            )
        )  # fmt: skip
    return by_row


def summed(made: list[list[list[Given]]]) -> Tensor | None:
    """What is added behind the projection, over heads: (B, T, C)."""
    if made[0][0][0].behind_C is None:
        return None
    return torch.stack([torch.stack([torch.stack([x.behind_C for x in qs]) for qs in heads]).sum(0) for heads in made])


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def halves_of(kind: str, is_encoder_decoder: bool, num_queries: int) -> list[int]:
    """Of every query: in which half of its part it stands (a source of five columns, targets cut at five tokens)."""
    if kind == "encoder_self":
        return [int(t * 2 // num_queries) for t in range(num_queries)]
    if is_encoder_decoder:
        return [min(t * 2 // 5, 1) for t in range(num_queries)]
    return [0, 0, 1, 1, *(min(t * 2 // 5, 1) for t in range(num_queries - 4))]
