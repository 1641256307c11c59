"""The slow twin of every attention path: one softmax over the union of slots and tokens.

Written for reading, in float64, with a loop over rows and heads and no cleverness shared with the paths
it pins. Equation: head = softmax(q [P_k; K]^T * scale) [P_v; V] (Li & Liang 2021, section 4; He et al. 2022,
equation 5). `at_work` puts it into a whole model, to pin what an attachment does there.

Axes: B rows, T queries, S keys, P slots, H query heads, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

RowSlots = list[tuple[Tensor, Tensor] | None]
"""For each row its keys (G, P, D) and values (G, P, E), or None for a bare row."""

_NAME = "antefix_reference"
_ATTRIBUTE = "antefix_reference_slots"


def attention(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSE: Tensor,
    visible_BTS: Tensor,
    slots: RowSlots,
    *,
    scale: float,
    softcap: float | None = None,
    position_bias_HTS: Tensor | None = None,
    sink_logits_H: Tensor | None = None,
    slots_seen_from: Sequence[int] | None = None,
) -> Tensor:
    """Attention with a prefix of its own for every row.

    visible: True where a query sees a token. slots_seen_from: in every row the first query that sees its slots; None:
    every query does.
    Returns B, H, T, E in float64; a query that sees nothing gets 0.
    """
    B, H, _, _ = query_BHTD.shape
    heads_per_group = H // key_BGSD.shape[1]
    cap: Callable[[Tensor], Tensor] = (
        (lambda s: s) if softcap is None else (lambda s: softcap * torch.tanh(s / softcap))
    )
    rows = []
    for b in range(B):
        heads = []
        for h in range(H):
            g = h // heads_per_group
            q_TD, k_SD, v_SE = query_BHTD[b, h].double(), key_BGSD[b, g].double(), value_BGSE[b, g].double()
            scores_TS = cap(q_TD @ k_SD.T * scale)
            if position_bias_HTS is not None:
                scores_TS = scores_TS + position_bias_HTS[h]
            scores, values = scores_TS.masked_fill(~visible_BTS[b], -torch.inf), v_SE
            row_slots = slots[b]
            if row_slots is not None:
                of_slots = cap(q_TD @ row_slots[0][g].double().T * scale)
                if slots_seen_from is not None:
                    sees_no_slot = torch.arange(len(q_TD), device=q_TD.device) < slots_seen_from[b]
                    of_slots = of_slots.masked_fill(sees_no_slot[:, None], -torch.inf)
                scores = torch.cat([of_slots, scores], dim=1)
                values = torch.cat([row_slots[1][g].double(), v_SE])
            if sink_logits_H is not None:
                scores = torch.cat([scores, sink_logits_H[h].double().expand(len(scores), 1)], dim=1)
                values = torch.cat([values, torch.zeros_like(values[:1])])
            sees_nothing = (scores == -torch.inf).all(dim=1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(sees_nothing, 0.0), dim=1).masked_fill(sees_nothing, 0.0)
            heads.append(weights @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@contextmanager
def at_work(
    model: PreTrainedModel, slots: Mapping[str, RowSlots], slots_seen_from: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, the model attends by `attention`, with these slots at the modules of these paths."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    modules: list[nn.Module] = [model.get_submodule(path) for path in slots]
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        for module, row_slots in zip(modules, slots.values(), strict=True):
            module.__dict__[_ATTRIBUTE] = {"slots": row_slots, "slots_seen_from": slots_seen_from}
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        for module in modules:
            module.__dict__.pop(_ATTRIBUTE, None)


def _for_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    num_rows, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    visible = torch.ones(num_rows, num_queries, num_keys, dtype=torch.bool, device=query.device)
    if mask is not None:  # eager masks: 0, or the lowest number there is
        visible = visible & (mask[:, 0, :, :num_keys] == 0)
    bias, scaling = kwargs.get("position_bias"), kwargs.get("scaling")
    out = attention(
        query, key, value, visible, **module.__dict__.get(_ATTRIBUTE, {"slots": [None] * num_rows}),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=kwargs.get("softcap"),
        position_bias_HTS=None if bias is None else bias[0, :, :, :num_keys], sink_logits_H=kwargs.get("s_aux"),
    )  # fmt: skip
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _for_transformers)
AttentionMaskInterface.register(_NAME, eager_mask)
