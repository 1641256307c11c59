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
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from antefix.attention.branch import Condition
from antefix.attention.forest import forest_mask
from antefix.data.encode import Encoded
from antefix.data.plan import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NoForestError(ValueError):
    """A kind of layer that no forest describes: rows are padded."""


class Choices(NamedTuple):
    """Which example every pair of a batch is a choice of, its place there, and which of them is right.

    Axes: M pairs, E examples. right_E: -1 where it is not known.
    """

    example_M: Tensor
    place_M: Tensor
    right_E: Tensor

    @classmethod
    def of(cls, encoded: Encoded, units: Sequence[Unit]) -> Choices:
        """Of units that hold all choices of their examples."""
        counts = [len(unit.targets) for unit in units]
        example = [n for n, count in enumerate(counts) for _ in range(count)]
        place = [k for count in counts for k in range(count)]
        known = [encoded.examples[unit.example].right for unit in units]
        right = [-1 if n < 0 else unit.targets.index(n) for unit, n in zip(units, known, strict=True)]
        return cls(*(torch.tensor(values) for values in (example, place, right)))

    @property
    def is_right(self) -> Tensor:
        """Which pairs are right: (M,)."""
        return self.place_M == self.right_E[self.example_M]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes, and which of its positions are scored against what.

    inputs: the model's arguments. positions: (U,) distinct positions, of the flattened (B, T), whose logits
    are needed. row: (N,) for every label, which of these logits it is scored with. label: (N,). pair: (N,) to
    which of the `num_pairs` pairs it belongs. encoder: for an encoder-decoder base, the encoder's own
    arguments. source_of_row: (B,) which of the units a padded row, or one of the decoder, has its source of.
    """

    inputs: dict[str, Any]
    positions: Tensor
    row: Tensor
    label: Tensor
    pair: Tensor
    num_pairs: int
    num_tokens: int
    """Tokens fed, padding included."""
    source_lengths: Tensor | None = None
    """(B,) columns of source, where rows are padded; packed rows say it in their forest."""
    encoder: dict[str, Tensor] | None = None
    source_of_row: Tensor | None = None
    weight: Tensor | None = None
    """(N,) what every label's loss is multiplied by; None: 1."""
    condition: Condition | None = None
    """The second texts of the sources."""
    choices: Choices | None = None
    """Where targets are choices."""


def packed_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """All rows laid end to end without padding, their attention a forest (see `antefix.attention.forest`).

    For a decoder-only model whose attention goes through ours.
    """
    rows = [_Row.of(encoded, unit) for unit in units]
    starts = list(accumulate((len(row.ids) for row in rows), initial=0))
    parents = [p + start if p >= 0 else p for row, start in zip(rows, starts[:-1], strict=True) for p in row.parents]
    # The last token of a source predicts the first of a target: it sees what targets see.
    is_target = [place >= row.num_source - 1 for row in rows for place in range(len(row.ids))]
    inputs = {
        "input_ids": torch.tensor([[token for row in rows for token in row.ids]]),
        "position_ids": torch.tensor([[position for row in rows for position in row.positions]]),
        "attention_mask": _forest_masks(model, parents, is_target),
        "use_cache": False,
    }
    return _with_labels(inputs, rows, starts)


def padded_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """One row a pair, padded on the right, with an ordinary mask: what every model takes."""
    rows = [_Row.of(encoded, Unit(u.example, (t,))) for u in units for t in u.targets]
    ids, mask = right_padded([r.ids for r in rows], pad_id_of(model))
    starts = range(0, ids.numel(), ids.shape[1])
    batch = _with_labels({"input_ids": ids, "attention_mask": mask, "use_cache": False}, rows, starts)
    source_lengths = torch.tensor([r.num_source for r in rows])
    return replace(batch, source_lengths=source_lengths, source_of_row=_unit_of_pairs(units))


def encoder_decoder_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """Every source once in the encoder, every target a row of the decoder."""
    start = model.config.decoder_start_token_id
    pad = pad_id_of(model)
    sources = [encoded.examples[u.example].source for u in units]
    encoder_ids, encoder_mask = right_padded(sources, pad)
    targets = [encoded.examples[u.example].targets[t] for u in units for t in u.targets]
    decoder_ids, decoder_mask = right_padded([(start, *t[:-1]) for t in targets], pad)
    label_positions = [b * decoder_ids.shape[1] + j for b, t in enumerate(targets) for j in range(len(t))]
    return Batch(
        inputs={"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask, "use_cache": False},
        positions=torch.tensor(label_positions),
        row=torch.arange(len(label_positions)),
        label=torch.tensor([token for t in targets for token in t]),
        pair=torch.tensor([b for b, t in enumerate(targets) for _ in t]),
        num_pairs=len(targets),
        num_tokens=encoder_ids.numel() + decoder_ids.numel(),
        encoder={"input_ids": encoder_ids, "attention_mask": encoder_mask},
        source_of_row=_unit_of_pairs(units),
    )


def _unit_of_pairs(units: Sequence[Unit]) -> Tensor:
    return torch.tensor([n for n, unit in enumerate(units) for _ in unit.targets])


@dataclass(frozen=True, slots=True)
class _Row:
    """One row, a tree of tokens: what stands before each (its parent), and the labels of each pair.

    parents: places in the row, -1 for the first token. labels: (place that predicts, label, its weight) for every pair.
    """

    ids: list[int]
    positions: list[int]
    parents: list[int]
    labels: list[list[tuple[int, int, float]]]
    num_source: int

    @classmethod
    def of(cls, encoded: Encoded, unit: Unit) -> _Row:
        example = encoded.examples[unit.example]
        ids = list(example.source)
        positions = list(range(example.num_before, example.num_before + len(ids)))
        row = cls(ids, positions, list(range(-1, len(ids) - 1)), [], len(ids))
        last_of_source = len(ids) - 1
        places: dict[tuple[int, int], int] = {}  # (parent, token) -> its place
        for index in unit.targets:
            target = example.targets[index]
            soft = example.soft[index] if example.soft else [((token, 1.0),) for token in target]
            place, labels = last_of_source, []
            for number, (token, candidates) in enumerate(zip(target, soft, strict=True), start=1):
                labels += [(place, label, weight) for label, weight in candidates]
                if number == len(target):
                    break  # the last token predicts nothing
                if (place, token) not in places:
                    places[place, token] = len(ids)
                    ids.append(token)
                    row.positions.append(row.positions[place] + 1)
                    row.parents.append(place)
                place = places[place, token]
            row.labels.append(labels)
        return row


def _with_labels(inputs: dict[str, Any], rows: Sequence[_Row], starts: Sequence[int]) -> Batch:
    """starts: where each row begins among all places of the batch."""
    pairs = [(start, labels) for start, row in zip(starts, rows, strict=False) for labels in row.labels]
    flat = [(start + place, label, weight, n) for n, (start, some) in enumerate(pairs) for place, label, weight in some]
    where = torch.tensor([position for position, *_ in flat])
    # A token with several continuations is scored against each: its logits are computed once.
    positions, row = torch.unique(where, return_inverse=True)
    return Batch(
        inputs=inputs,
        positions=positions,
        row=row,
        label=torch.tensor([label for _, label, _, _ in flat]),
        weight=torch.tensor([weight for _, _, weight, _ in flat]) if any(w != 1 for _, _, w, _ in flat) else None,
        pair=torch.tensor([pair for *_, pair in flat]),
        num_pairs=sum(len(row.labels) for row in rows),
        num_tokens=inputs["input_ids"].numel(),
    )


def _forest_masks(
    model: PreTrainedModel, parents: Sequence[int], is_target: Sequence[bool]
) -> Tensor | Mapping[str, Tensor]:
    """The forest in the model's own form of a mask: one for each kind of layer where it has several.

    Windows count positions, not places in the row: a target stands right after its source. Raises NoForestError for
    a kind of layer that no forest describes (chunked or linear attention).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise NoForestError(f"layers of the kinds {', '.join(sorted(kinds))} take no packed rows")
    windowed = forest_mask(parents, window_of(config), is_target)
    if len(kinds) > 1:
        forms = {"full_attention": forest_mask(parents, None, is_target), "sliding_attention": windowed}
        return {kind: forms[kind] for kind in sorted(kinds)}
    return windowed


def window_of(config: Any) -> int | None:
    """How many tokens the layers of a model look back on, where some do not look back on all."""
    if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both (B, T)."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = 1
    return ids, mask


def pad_id_of(model: PreTrainedModel) -> int:
    """The token that rows are padded with."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if pad is None else int(pad)
