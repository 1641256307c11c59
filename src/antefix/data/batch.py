"""From examples to the tensors of a forward pass.

A *packed row* is one source followed by its targets. Every target token sees the source and its own target
only, at the positions it would have alone, and the last source token predicts the first token of every
target. Loss and gradient equal those of one padded row a pair, with about half the tokens. A target's last
token predicts nothing and is not fed at all. For an encoder-decoder base a source is encoded once and its
targets are rows of the decoder.

Which pairs make up an optimiser step is a function of the seed and the step's number alone, so that a run
can go on anywhere.

Axes: B rows, T tokens of a row, N labels, M pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.errors import DataError


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of a source and of each of its targets (end token included)."""

    source: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set as token ids, and what was cut."""

    examples: tuple[EncodedExample, ...]
    truncated_sources: int
    truncated_targets: int

    @property
    def num_pairs(self) -> int:
        """Source/target pairs."""
        return sum(len(e.targets) for e in self.examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many tokens fit."""

    context: int | None
    """Tokens the base has positions for, slots with shifted positions taken off; None: no limit known."""
    source: int | None = None
    """Cut sources to this many tokens (the end is cut); None: a source that does not fit is an error."""
    target: int | None = None
    """The same for targets."""


def encode(
    examples: Sequence[Example],
    text_format: TextFormat,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    for_encoder: bool = False,
) -> Encoded:
    """Tokenise sources and targets apart.

    Raises DataError naming the row where a pair does not fit into the context and no limit was given to cut
    it to. What is cut is counted in the result, never silent.
    """
    encoded = []
    cut_sources = cut_targets = 0
    for example in examples:
        source = text_format.encode_source(tokenizer, example.source, for_encoder=for_encoder)
        if limits.source is not None and len(source) > limits.source:
            source, cut_sources = source[: limits.source], cut_sources + 1
        targets = []
        for text in example.targets:
            target = text_format.encode_target(tokenizer, text)
            if limits.target is not None and len(target) > limits.target:
                target, cut_targets = target[: limits.target], cut_targets + 1
            _check_fits(example, len(source), len(target), limits, for_encoder)
            targets.append(tuple(target))
        if not targets:
            _check_fits(example, len(source), 0, limits, for_encoder)
        encoded.append(EncodedExample(tuple(source), tuple(targets)))
    return Encoded(tuple(encoded), cut_sources, cut_targets)


def _check_fits(example: Example, source: int, target: int, limits: Limits, for_encoder: bool) -> None:
    needed = max(source, target) if for_encoder else source + target
    if limits.context is not None and needed > limits.context:
        raise DataError(
            f"{example.where or 'an example'}: {source} source and {target} target tokens do not fit into the base's "
            f"context of {limits.context}; shorten it, or set max_source_tokens to have it cut"
        )


@dataclass(frozen=True, slots=True)
class Unit:
    """Some targets of one source, the piece that is shuffled and packed into one row."""

    example: int
    targets: tuple[int, ...]


def steps(encoded: Encoded, *, pairs_per_step: int, targets_per_row: int, seed: int) -> Iterator[list[Unit]]:
    """The units of every optimiser step, for ever: each holds exactly `pairs_per_step` pairs.

    An epoch visits every pair once, in an order drawn from the seed and the epoch. Sources are mixed: at most
    `targets_per_row` targets of one source stay together. A step may reach over the end of an epoch.
    """
    step: list[Unit] = []
    room = pairs_per_step
    epoch = 0
    while True:
        for unit in _shuffled_units(encoded, targets_per_row, f"{seed}-{epoch}"):
            targets = unit.targets
            while targets:
                step.append(Unit(unit.example, targets[:room]))
                taken = len(targets[:room])
                room, targets = room - taken, targets[taken:]
                if room == 0:
                    yield step
                    step, room = [], pairs_per_step
        epoch += 1


def _shuffled_units(encoded: Encoded, targets_per_row: int, seed: str) -> list[Unit]:
    order = random.Random(seed)
    units = []
    for index, example in enumerate(encoded.examples):
        targets = list(range(len(example.targets)))
        order.shuffle(targets)
        chunks = range(0, len(targets), targets_per_row)
        units += [Unit(index, tuple(targets[i : i + targets_per_row])) for i in chunks]
    order.shuffle(units)
    return units


def all_units(encoded: Encoded, targets_per_row: int) -> list[Unit]:
    """Every pair once, in the order of the data: for a loss over a dev set."""
    return [
        Unit(index, tuple(range(start, min(start + targets_per_row, len(example.targets)))))
        for index, example in enumerate(encoded.examples)
        for start in range(0, len(example.targets), targets_per_row)
    ]


def microbatches(encoded: Encoded, units: Sequence[Unit], token_budget: int, *, packed: bool) -> list[list[Unit]]:
    """Units sorted by length and cut into batches of at most `token_budget` tokens, padding included."""
    if not packed:
        units = [Unit(u.example, (t,)) for u in units for t in u.targets]
    rows = sorted(((_row_length(encoded, u), n, u) for n, u in enumerate(units)), key=lambda row: row[:2])
    batches: list[list[Unit]] = []
    for length, _, unit in rows:
        # Sorted upwards: the newest row is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * length <= token_budget:
            batches[-1].append(unit)
        else:
            batches.append([unit])
    return batches


def _row_length(encoded: Encoded, unit: Unit) -> int:
    example = encoded.examples[unit.example]
    return len(example.source) + sum(len(example.targets[t]) - 1 for t in unit.targets)


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
    encoder: dict[str, Tensor] | None = None
    source_of_row: Tensor | None = None


def packed_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """Packed rows for a decoder-only model, with the mask in the form the model takes."""
    rows = [_Row.of(encoded, unit) for unit in units]
    B, T = len(rows), max(len(r.ids) for r in rows)
    ids = torch.full((B, T), _pad_id(model))
    positions = torch.zeros(B, T, dtype=torch.long)
    segments = torch.full((B, T), -1)  # 0 the source, 1.. its targets, -1 padding
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids[b, :n], positions[b, :n], segments[b, :n] = row.tensors()
    own, other = segments[:, :, None], segments[:, None, :]
    order = torch.arange(T)
    visible = ((own == other) | (other == 0)) & (order[:, None] >= order[None, :]) & (own >= 0) & (other >= 0)
    visible |= torch.eye(T, dtype=torch.bool)  # padding sees itself: no query may be blind
    distance = positions[:, :, None] - positions[:, None, :]
    inputs = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": _model_masks(model, visible[:, None], distance[:, None]),
        "use_cache": False,
    }
    return _with_labels(inputs, rows, T, B * T)


def padded_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """One row a pair, padded on the right, with an ordinary mask: what every model takes."""
    rows = [_Row.of(encoded, Unit(u.example, (t,))) for u in units for t in u.targets]
    B, T = len(rows), max(len(r.ids) for r in rows)
    ids = torch.full((B, T), _pad_id(model))
    mask = torch.zeros(B, T, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
        mask[b, : len(row.ids)] = 1
    return _with_labels({"input_ids": ids, "attention_mask": mask, "use_cache": False}, rows, T, B * T)


def encoder_decoder_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """Every source once in the encoder, every target a row of the decoder."""
    start = model.config.decoder_start_token_id
    pad = _pad_id(model)
    sources = [encoded.examples[u.example].source for u in units]
    encoder_ids, encoder_mask = _right_padded(sources, pad)
    targets = [encoded.examples[u.example].targets[t] for u in units for t in u.targets]
    decoder_ids, decoder_mask = _right_padded([(start, *t[:-1]) for t in targets], pad)
    source_of_row = torch.tensor([n for n, u in enumerate(units) for _ in u.targets])
    T = decoder_ids.shape[1]
    label_positions = [b * T + j for b, t in enumerate(targets) for j in range(len(t))]
    return Batch(
        inputs={"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask, "use_cache": False},
        positions=torch.tensor(label_positions),
        row=torch.arange(len(label_positions)),
        label=torch.tensor([token for t in targets for token in t]),
        pair=torch.tensor([b for b, t in enumerate(targets) for _ in t]),
        num_pairs=len(targets),
        num_tokens=encoder_ids.numel() + decoder_ids.numel(),
        encoder={"input_ids": encoder_ids, "attention_mask": encoder_mask},
        source_of_row=source_of_row,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One row: its tokens, their positions and segments, and (position in row, label) of each of its pairs."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    labels: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, encoded: Encoded, unit: Unit) -> _Row:
        example = encoded.examples[unit.example]
        ids = list(example.source)
        last_of_source = len(ids) - 1
        positions = list(range(len(ids)))
        segments = [0] * len(ids)
        labels = []
        for number, target_index in enumerate(unit.targets, start=1):
            target = example.targets[target_index]
            first = len(ids)
            ids += target[:-1]
            positions += range(last_of_source + 1, last_of_source + len(target))
            segments += [number] * (len(target) - 1)
            predicting = [last_of_source, *range(first, first + len(target) - 1)]
            labels.append(list(zip(predicting, target, strict=True)))
        return cls(ids, positions, segments, labels)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(self.ids), torch.tensor(self.positions), torch.tensor(self.segments)


def _with_labels(inputs: dict[str, Any], rows: Sequence[_Row], T: int, num_tokens: int) -> Batch:
    flat = [
        (b * T + position, label, pair)
        for pair, (b, labels) in enumerate((b, labels) for b, row in enumerate(rows) for labels in row.labels)
        for position, label in labels
    ]
    where = torch.tensor([position for position, _, _ in flat])
    # The last source token is scored once for every target: its logits are computed once.
    positions, row = torch.unique(where, return_inverse=True)
    return Batch(
        inputs=inputs,
        positions=positions,
        row=row,
        label=torch.tensor([label for _, label, _ in flat]),
        pair=torch.tensor([pair for _, _, pair in flat]),
        num_pairs=sum(len(row.labels) for row in rows),
        num_tokens=num_tokens,
    )


def _model_masks(model: PreTrainedModel, visible: Tensor, distance: Tensor) -> Tensor | Mapping[str, Tensor]:
    """The mask in the model's own form: one for each kind of layer where it has several.

    Windows count positions, not places in the row: a target stands right behind its source.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds <= {"full_attention"} and kinds:
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
    pad = model.config.get_text_config().pad_token_id
    return 0 if pad is None else int(pad)
