"""First values for key/value slots: from a text, or drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from antefix.base import Base
from antefix.errors import PrefixError
from antefix.parts.key_value import KeyValue
from antefix.sites import Site, find_sites, record_text

Positions = Literal["in_place", "shifted"]


def text_slots(base: Base, text: str, num_slots: int | None, positions: Positions) -> dict[str, KeyValue]:
    """Keys and values of real words: an exact copy of what the frozen base computes for them.

    The text is repeated or cut to `num_slots` tokens; None takes it as it is. With `in_place` positions a
    rotary base reads it at -P..-1, so that it stands right before the tokens; any other base reads it at
    0..P-1. (Li & Liang 2021, section 7.4, initialise with real words; Cartridges, arXiv 2506.06266, copy.)

    Raises PrefixError for a text of no tokens.
    """
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PrefixError("initial_text has no tokens: give a few words that say what the task is")
    if num_slots is not None:
        ids = (ids * (num_slots // len(ids) + 1))[:num_slots]
    move_back = positions == "in_place" and find_sites(base.model).positions == "relative"
    input_ids = torch.tensor([ids], device=base.model.device)
    calls = record_text(base.model, input_ids, first_position=-len(ids) if move_back else None)
    return {site.name: KeyValue(c.key[0].float().cpu(), c.value[0].float().cpu()) for site, c in calls}


def random_slots(
    sites: Iterable[Site], num_slots: int, distribution: Literal["normal", "uniform"], scale: float
) -> dict[str, KeyValue]:
    """Normal with standard deviation `scale`, or uniform between 0 and `scale`; torch's global generator."""
    draw = torch.randn if distribution == "normal" else torch.rand
    return {
        s.name: KeyValue(
            draw(s.num_key_value_heads, num_slots, s.key_width) * scale,
            draw(s.num_key_value_heads, num_slots, s.value_width) * scale,
        )
        for s in sites
    }
