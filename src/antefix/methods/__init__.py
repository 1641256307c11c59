"""The table of methods: a name and where its class lives. Adding a method is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from antefix.errors import RecipeError, nearest

if TYPE_CHECKING:
    from antefix.methods.base import MethodModule

METHODS: dict[str, str] = {
    "adapter": "antefix.methods.adapter:Adapter",
    "apt": "antefix.methods.apt:Apt",
    "bbt": "antefix.methods.bbt:Bbt",
    "bbt_v2": "antefix.methods.bbt_v2:BbtV2",
    "bitfit": "antefix.methods.bitfit:BitFit",
    "cartridge": "antefix.methods.cartridge:Cartridge",
    "full": "antefix.methods.full:Full",
    "hierarchical_blocking": "antefix.methods.hierarchical_blocking:HierarchicalBlocking",
    "ia3": "antefix.methods.ia3:IA3",
    "inducer": "antefix.methods.inducer:Inducer",
    "infix": "antefix.methods.infix:Infix",
    "llama_adapter": "antefix.methods.llama_adapter:LlamaAdapter",
    "lora": "antefix.methods.lora:Lora",
    "mam": "antefix.methods.mam:Mam",
    "ntk_attention": "antefix.methods.ntk_attention:NtkAttention",
    "p_tuning_v2": "antefix.methods.p_tuning_v2:PTuningV2",
    "palt": "antefix.methods.palt:Palt",
    "pip_direct": "antefix.methods.pip_direct:PipDirect",
    "pip_indirect": "antefix.methods.pip_indirect:PipIndirect",
    "prefix_memory": "antefix.methods.prefix_memory:PrefixMemory",
    "prefix_propagation": "antefix.methods.prefix_propagation:PrefixPropagation",
    "prefix_tuning": "antefix.methods.prefix_tuning:PrefixTuning",
    "prompt_tuning": "antefix.methods.prompt_tuning:PromptTuning",
    "soft_infix": "antefix.methods.soft_infix:SoftInfix",
    "sparse_prefix": "antefix.methods.sparse_prefix:SparsePrefix",
    "special_tokens": "antefix.methods.special_tokens:SpecialTokens",
    "top_layers": "antefix.methods.top_layers:TopLayers",
}


UNION = "+"
"""Between the names of methods that act together."""


def method_class(name: str) -> type[MethodModule]:
    """The class of a method, or of a union of several (`a+b`).

    Raises RecipeError for an unknown name, with the nearest known one.
    """
    if UNION in name:
        from antefix.methods.union import union_of

        return union_of(tuple(name.split(UNION)))
    if name not in METHODS:
        raise RecipeError(f"unknown method '{name}': {nearest(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[MethodModule] = getattr(import_module(module), attribute)
    return found
