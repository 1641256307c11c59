"""From token ids to the tensors of a forward pass.

A *packed row* is one source followed by its targets, as a tree: what targets have in common at their beginning
is fed once. Every target token sees the source and what stands before it in its own target, at the positions it
would have alone, and the last source token predicts the first token of every target. Loss and gradient equal
those of one padded row a pair, with about half the tokens. A target's last token predicts nothing and is not fed
at all. For an encoder-decoder base a source is encoded once and its targets are rows of the decoder.

Axes: B rows, T tokens of a row, N labels, M pairs, U distinct positions that are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from antefix.data.encode import Encoded
from antefix.data.plan import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes, and which of its positions are scored against what.

    inputs: the model's arguments. positions: (U,) distinct positions, of the flattened (B, T), whose logits
    are needed. row: (N,) for every label, which of these logits it is scored with. label: (N,). pair: (N,) to
    which of the `num_pairs` pairs it belongs. encoder: for an encoder-decoder base, the encoder's own
    arguments; `source_of_row` (M,) says which encoded source a decoder row reads.
    """

    inputs: dict[str, Any]
    positions: Tensor
    row: Tensor
    label: Tensor
    pair: Tensor
    num_pairs: int
    num_tokens: int
    """Tokens fed, padding included."""
    num_real_tokens: int
    """Tokens fed, without padding."""
    encoder: dict[str, Tensor] | None = None
    source_of_row: Tensor | None = None


def packed_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """Packed rows for a decoder-only model, with the mask in the form the model takes."""
    rows = [_Row.of(encoded, unit) for unit in units]
    ids, _ = _right_padded([r.ids for r in rows], _pad_id(model))
    positions, _ = _right_padded([r.positions for r in rows], 0)
    visible = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: none is blind
    for b, row in enumerate(rows):
        visible[b, : len(row.ids), : len(row.ids)] = _self_and_ancestors(row.parents)
    distance = positions[:, :, None] - positions[:, None, :]
    inputs = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": _model_masks(model, visible[:, None], distance[:, None]),
        "use_cache": False,
    }
    return _with_labels(inputs, rows)


def padded_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """One row a pair, padded on the right, with an ordinary mask: what every model takes."""
    rows = [_Row.of(encoded, Unit(u.example, (t,))) for u in units for t in u.targets]
    ids, mask = _right_padded([r.ids for r in rows], _pad_id(model))
    return _with_labels({"input_ids": ids, "attention_mask": mask, "use_cache": False}, rows)


def encoder_decoder_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """Every source once in the encoder, every target a row of the decoder."""
    start = model.config.decoder_start_token_id
    pad = _pad_id(model)
    sources = [encoded.examples[u.example].source for u in units]
    encoder_ids, encoder_mask = _right_padded(sources, pad)
    targets = [encoded.examples[u.example].targets[t] for u in units for t in u.targets]
    decoder_ids, decoder_mask = _right_padded([(start, *t[:-1]) for t in targets], pad)
    source_of_row = torch.tensor([n for n, u in enumerate(units) for _ in u.targets])
    label_positions = [b * decoder_ids.shape[1] + j for b, t in enumerate(targets) for j in range(len(t))]
    return Batch(
        inputs={"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask, "use_cache": False},
        positions=torch.tensor(label_positions),
        row=torch.arange(len(label_positions)),
        label=torch.tensor([token for t in targets for token in t]),
        pair=torch.tensor([b for b, t in enumerate(targets) for _ in t]),
        num_pairs=len(targets),
        num_tokens=encoder_ids.numel() + decoder_ids.numel(),
        num_real_tokens=int(encoder_mask.sum() + decoder_mask.sum()),
        encoder={"input_ids": encoder_ids, "attention_mask": encoder_mask},
        source_of_row=source_of_row,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One row, a tree of tokens: what stands before each (its parent), and the labels of each pair.

    parents: places in the row, -1 for the first token. labels: (place that predicts, label) for every pair.
    """

    ids: list[int]
    positions: list[int]
    parents: list[int]
    labels: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, encoded: Encoded, unit: Unit) -> _Row:
        example = encoded.examples[unit.example]
        ids = list(example.source)
        row = cls(ids, list(range(len(ids))), list(range(-1, len(ids) - 1)), [])
        last_of_source = len(ids) - 1
        places: dict[tuple[int, int], int] = {}  # (parent, token) -> its place
        for target in (example.targets[index] for index in unit.targets):
            place, labels = last_of_source, []
            for token in target[:-1]:
                labels.append((place, token))
                if (place, token) not in places:
                    places[place, token] = len(ids)
                    ids.append(token)
                    row.positions.append(row.positions[place] + 1)
                    row.parents.append(place)
                place = places[place, token]
            row.labels.append([*labels, (place, target[-1])])
        return row


def _self_and_ancestors(parents: Sequence[int]) -> Tensor:
    """Which tokens of a row a token sees: (T, T), itself and all that stands before it in its own text."""
    seen = np.eye(len(parents), dtype=bool)
    for place, parent in enumerate(parents[1:], start=1):
        seen[place] |= seen[parent]
    return torch.from_numpy(seen)


def _with_labels(inputs: dict[str, Any], rows: Sequence[_Row]) -> Batch:
    row_length = inputs["input_ids"].shape[1]
    flat = [
        (b * row_length + position, label, pair)
        for pair, (b, labels) in enumerate((b, labels) for b, row in enumerate(rows) for labels in row.labels)
        for position, label in labels
    ]
    where = torch.tensor([position for position, _, _ in flat])
    # A token with several continuations is scored against each: its logits are computed once.
    positions, row = torch.unique(where, return_inverse=True)
    return Batch(
        inputs=inputs,
        positions=positions,
        row=row,
        label=torch.tensor([label for _, label, _ in flat]),
        pair=torch.tensor([pair for _, _, pair in flat]),
        num_pairs=sum(len(row.labels) for row in rows),
        num_tokens=inputs["input_ids"].numel(),
        num_real_tokens=sum(len(row.ids) for row in rows),
    )


def _model_masks(model: PreTrainedModel, visible: Tensor, distance: Tensor) -> Tensor | Mapping[str, Tensor]:
    """The mask in the model's own form: one for each kind of layer where it has several.

    Windows count positions, not places in the row: a target stands right behind its source. Raises ValueError for
    a kind of layer that no such mask describes (chunked or linear attention).
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of the kinds {', '.join(sorted(kinds))} take no packed rows")
    if kinds == {"full_attention"}:
        window = None
    windowed = visible if window is None else visible & (distance < window)
    if len(kinds) > 1:
        forms = {"full_attention": visible, "sliding_attention": windowed}
        return {kind: _additive(model, forms[kind]) for kind in sorted(kinds)}
    return _additive(model, windowed)


def _additive(model: PreTrainedModel, visible: Tensor) -> Tensor:
    """Boolean for SDPA; the eager functions add their mask to the scores."""
    if "eager" not in str(model.config._attn_implementation):
        return visible
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, lowest)


def _right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = 1
    return ids, mask


def _pad_id(model: PreTrainedModel) -> int:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if pad is None else int(pad)
