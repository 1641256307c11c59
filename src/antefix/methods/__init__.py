"""The table of methods: a name and where its class lives. Adding a method is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from antefix.errors import RecipeError, nearest

if TYPE_CHECKING:
    from antefix.methods.base import MethodModule

METHODS: dict[str, str] = {
    "apt": "antefix.methods.apt:Apt",
    "cartridge": "antefix.methods.cartridge:Cartridge",
    "hierarchical_blocking": "antefix.methods.hierarchical_blocking:HierarchicalBlocking",
    "inducer": "antefix.methods.inducer:Inducer",
    "infix": "antefix.methods.infix:Infix",
    "llama_adapter": "antefix.methods.llama_adapter:LlamaAdapter",
    "ntk_attention": "antefix.methods.ntk_attention:NtkAttention",
    "p_tuning_v2": "antefix.methods.p_tuning_v2:PTuningV2",
    "pip_direct": "antefix.methods.pip_direct:PipDirect",
    "pip_indirect": "antefix.methods.pip_indirect:PipIndirect",
    "prefix_memory": "antefix.methods.prefix_memory:PrefixMemory",
    "prefix_propagation": "antefix.methods.prefix_propagation:PrefixPropagation",
    "prefix_tuning": "antefix.methods.prefix_tuning:PrefixTuning",
    "prompt_tuning": "antefix.methods.prompt_tuning:PromptTuning",
    "sparse_prefix": "antefix.methods.sparse_prefix:SparsePrefix",
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
