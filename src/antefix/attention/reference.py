"""The slow twin of every attention path: one softmax over the union of slots and tokens.

Written for reading, in float64, with a loop over rows and heads and no cleverness shared with the paths
it pins. Equation: head = softmax(q [P_k; K]^T * scale) [P_v; V] (Li & Liang 2021, section 4; He et al. 2022,
equation 5).

Axes: T queries, S keys, P slots, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSE: Tensor,
    visible_BTS: Tensor,
    slots: list[tuple[Tensor, Tensor] | None],
    *,
    scale: float,
    softcap: float | None = None,
    position_bias_HTS: Tensor | None = None,
    sink_logits_H: Tensor | None = None,
) -> Tensor:
    """Attention with a prefix of its own for every row.

    slots: for each row its keys (G, P, D) and values (G, P, E), or None for a bare row.
    visible: True where a query sees a token; slots are seen by every query.
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
                scores = torch.cat([cap(q_TD @ row_slots[0][g].double().T * scale), scores], dim=1)
                values = torch.cat([row_slots[1][g].double(), v_SE])
            if sink_logits_H is not None:
                scores = torch.cat([scores, sink_logits_H[h].double().expand(len(scores), 1)], dim=1)
                values = torch.cat([values, torch.zeros_like(values[:1])])
            sees_nothing = (scores == -torch.inf).all(dim=1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(sees_nothing, 0.0), dim=1).masked_fill(sees_nothing, 0.0)
            heads.append(weights @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)
