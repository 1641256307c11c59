"""Rows of hidden states that are put before a text: as slots where no row sees the text, as rows where it does.

In a causal base what stands before a text depends on nothing after it. Its keys and values are computed once a step,
whatever the batch, and are slots like any other (`as_slots`). In an encoder rows see the text, and stand in the batch.

Axes: P rows, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from antefix.parts.initial import Positions
from antefix.parts.key_value import KeyValue
from antefix.sites import Sites, record_rows


class EncoderRows(NamedTuple):
    """What enters an encoder before a text."""

    first_PC: Tensor
    """The rows at the input of the first layer, after what the base does with embeddings."""
    added: Mapping[str, Tensor]
    """By site name: (P, C), added to them at the input of that site's layer."""


def positions_of_rows(sites: Sites) -> Positions:
    """Where a causal base's tokens stand after rows: where keys know positions, rows can stand before position 0."""
    return "in_place" if sites.positions == "relative" else "shifted"


def as_slots(model: PreTrainedModel, sites: Sites, rows_PC: Tensor, added: Mapping[str, Tensor]) -> dict[str, KeyValue]:
    """Keys and values of rows before a text, at every site of a causal base; differentiable.

    added: by site name, (P, C), added to the rows at the input of that site's layer.
    """
    layers = {site.layer_module: added[site.name] for site in sites.attention if site.name in added}
    first = -len(rows_PC) if positions_of_rows(sites) == "in_place" else 0
    calls = record_rows(model, rows_PC, first, layers)
    return {site.name: KeyValue(call.key[0].float(), call.value[0].float()) for site, call in calls}
