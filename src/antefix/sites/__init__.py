"""What a base offers to a prefix, found by looking: recorded forward passes, no table of architectures.

Heads and widths are read off the recorded keys and values, layer by layer; nothing divides a hidden size by heads.
"""

from antefix.sites.find import find_sites
from antefix.sites.site import KINDS, Kind, Layers, LinearSite, NormSite, PositionKind, Site, Sites, sites_of_kinds
from antefix.sites.texts import first_states, layer_inputs, read_one_token, record_rows, record_text

__all__ = [
    "KINDS",
    "Kind",
    "Layers",
    "LinearSite",
    "NormSite",
    "PositionKind",
    "Site",
    "Sites",
    "find_sites",
    "first_states",
    "layer_inputs",
    "read_one_token",
    "record_rows",
    "record_text",
    "sites_of_kinds",
]
