"""The slots of many prefixes at one site, side by side for the rows of a batch.

Axes: U prefixes in use, B rows, P slots, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from antefix.attention.partial import KeySet, Mask
from antefix.errors import PrefixError
from antefix.parts.key_value import KeyValue, Slots
from antefix.sites import Site


def stacked(every: list[KeyValue | None], index_B: Tensor) -> list[KeySet]:
    """Slots of different lengths side by side, row by row, with a mask over what a row does not have.

    every: the slots of each attached prefix at one site. index_B: which of them a row has, below 0 for none.
    """
    used_U, place_B = torch.unique(index_B, return_inverse=True)
    slots_U = [None if n < 0 else every[n] for n in used_U.tolist()]
    some = next((s for s in slots_U if s is not None), None)
    if some is None:
        return []
    counts_U = torch.tensor([0 if s is None else s.key_GPD.shape[1] for s in slots_U], device=index_B.device)
    longest = int(counts_U.max())
    key, value = (
        torch.stack([_padded(None if s is None else s[part], some[part], longest) for s in slots_U])[place_B]
        for part in (0, 1)
    )
    visible_B11P = (torch.arange(longest, device=index_B.device) < counts_U[place_B][:, None])[:, None, None]
    return [KeySet(key, value, None if bool(visible_B11P.all()) else Mask.of(visible_B11P, key.dtype))]


def check_fits(sites: Iterable[Site], slots: Slots) -> None:
    """Raises PrefixError for slots of another base: they would fail deep inside, or worse, broadcast or be lost."""
    by_name = {site.name: site for site in sites}
    for name, of_site in slots.items():
        if name not in by_name:
            raise PrefixError(
                f"the prefix has slots at {name}, this base has no such site, but {', '.join(list(by_name)[:2])} and "
                "so on: load the base it was trained on"
            )
        if not isinstance(of_site, KeyValue):
            raise PrefixError(f"slots at {name} are of type {type(of_site).__name__}: make them a KeyValue(key, value)")
        site = by_name[name]
        G, D, E = site.num_key_value_heads, site.key_width, site.value_width
        key, value = tuple(of_site.key_GPD.shape), tuple(of_site.value_GPE.shape)
        P = key[1] if len(key) == 3 else "P"
        if (key, value) != ((G, P, D), (G, P, E)):
            raise PrefixError(
                f"the prefix has keys of shape {key} and values of shape {value} at {name}, this base takes "
                f"({G}, {P}, {D}) and ({G}, {P}, {E}), heads by slots by width: load the base it was trained on"
            )


def _padded(slots_GPD: Tensor | None, like_GPD: Tensor, longest: int) -> Tensor:
    if slots_GPD is None:
        return like_GPD.new_zeros(like_GPD.shape[0], longest, like_GPD.shape[2])
    return nn.functional.pad(slots_GPD, (0, 0, 0, longest - slots_GPD.shape[1]))
