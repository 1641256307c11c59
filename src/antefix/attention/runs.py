"""Stretches of a forest's tokens that follow each other, in groups of like lengths.

A *run*'s queries look at one row of keys, the run's ancestors and the run itself.

Axes: R runs of a group, Q queries of a run, S keys of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1
"""The parent of a tree's first token."""


@dataclass(frozen=True)
class Runs:
    """Runs of like lengths, padded to the longest."""

    queries: Tensor
    """(R, Q) tokens; padding names token 0."""
    is_query: Tensor
    """(R, Q) False for padding."""
    keys: Tensor
    """(R, S) tokens; padding names token 0."""
    trees: Tensor
    """(R,)"""
    additive: Tensor
    """(R, 1, Q, S) 0 where a query sees a key, else -inf; float32."""

    @classmethod
    def of(cls, members: list[tuple[list[int], int]], trees: list[int], window: int, device: torch.device) -> Runs:
        """From every run's keys, of which the last so many are its queries too."""
        Q, S = max(q for _, q in members), max(len(keys) for keys, _ in members)
        num_keys = torch.tensor([len(keys) for keys, _ in members])[:, None]
        num_queries = torch.tensor([q for _, q in members])[:, None]
        place_RQ = num_keys - num_queries + torch.arange(Q)  # of a query in its row of keys
        distance_RQS = place_RQ[:, :, None] - torch.arange(S)
        # A query that is padding sees what is left of the keys: never nothing, which kernels do not agree on.
        visible = (distance_RQS >= 0) & ((distance_RQS < window) | (torch.arange(Q) >= num_queries)[:, :, None])
        additive = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        return cls(
            queries=torch.tensor([keys[-q:] + [0] * (Q - q) for keys, q in members], device=device),
            is_query=(torch.arange(Q) < num_queries).to(device),
            keys=torch.tensor([keys + [0] * (S - len(keys)) for keys, _ in members], device=device),
            trees=torch.tensor([trees[keys[-1]] for keys, _ in members], device=device),
            additive=additive[:, None].to(device),
        )


def groups_of(parents: Sequence[int], trees: list[int], window: int, device: torch.device) -> list[Runs]:
    """The runs of a forest, those of like lengths together. trees: of every token."""
    groups: dict[tuple[int, int], list[tuple[list[int], int]]] = {}
    for keys, num_queries in _runs(parents):
        groups.setdefault((_rung(len(keys)), _rung(num_queries)), []).append((keys, num_queries))
    return [Runs.of(members, trees, window, device) for _, members in sorted(groups.items())]


def _runs(parents: Sequence[int]) -> list[tuple[list[int], int]]:
    """Every run as the tokens that it sees, itself last, and its own length."""
    runs: list[tuple[list[int], int]] = []
    chains: list[list[int]] = []  # of every token: its ancestors and itself, shared along a run
    depths: list[int] = []
    for token, parent in enumerate(parents):
        if parent == token - 1 and parent != ROOT:
            chain = chains[parent]
            runs[-1] = (chain, runs[-1][1] + 1)
        else:
            chain = [] if parent == ROOT else chains[parent][: depths[parent]]
            runs.append((chain, 1))
        chain.append(token)
        chains.append(chain)
        depths.append(len(chain))
    return runs


def _rung(length: int) -> int:
    """Lengths that are computed together: up to the next multiple of 16, of an eighth for longer ones."""
    width = max(16, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // width) * width
