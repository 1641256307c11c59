"""Labelled texts: their batches and their losses.

Axes: B rows, T tokens, C width of hidden states, N labels, K kinds of label, M pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from antefix.attach import told
from antefix.batches.batch import Batch, pad_id_of, right_padded
from antefix.data.encode import Encoded
from antefix.data.plan import Unit
from antefix.hidden_states import states_and_logits
from antefix.parts.word_head import Head


def labelled_batch(encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """Every source a row, padded on the right; a label at each of its places, of every target."""
    examples = [encoded.examples[u.example] for u in units]
    ids, mask = right_padded([e.source for e in examples], pad_id_of(model))
    width = ids.shape[1]
    pairs = [(b, examples[b].targets[t]) for b, u in enumerate(units) for t in u.targets]
    positions = [b * width + place for b, e in enumerate(examples) for place in e.places]
    first = [sum(len(e.places) for e in examples[:b]) for b in range(len(examples))]
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask},
        positions=torch.tensor(positions),
        row=torch.tensor([first[b] + n for b, target in pairs for n in range(len(target))]),
        label=torch.tensor([label for _, target in pairs for label in target]),
        pair=torch.tensor([m for m, (_, target) in enumerate(pairs) for _ in target]),
        num_pairs=len(pairs),
        num_tokens=ids.numel(),
        source_lengths=torch.tensor([len(e.source) for e in examples]),
    )


def labelled_losses(model: PreTrainedModel, head: Head, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The summed cross-entropy of every pair's labels, (M,), float32."""
    scores_NK = label_scores(model, head, batch)
    losses_N = cross_entropy(scores_NK, batch.label, reduction="none", label_smoothing=label_smoothing)
    return of_pairs(losses_N, batch)


def hinge_losses(model: PreTrainedModel, head: Head, batch: Batch, margin: float) -> Tensor:
    """The summed hinge loss of every pair's labels, (M,): how far each wrong label comes within the margin."""
    scores_NK = label_scores(model, head, batch)
    right_N1 = scores_NK.gather(1, batch.label[:, None])
    near_NK = (scores_NK - right_N1 + margin).clamp(min=0).scatter(1, batch.label[:, None], 0.0)
    return of_pairs(near_NK.sum(dim=1), batch)


def label_scores(model: PreTrainedModel, head: Head, batch: Batch) -> Tensor:
    """The head's scores at every label's place, (N, K)."""
    num_rows, width = batch.inputs["input_ids"].shape
    # What has words for its labels has one place a row.
    place_B = batch.positions % width if head.reads_logits else torch.zeros(num_rows, dtype=torch.long)
    with told(model, source_lengths=batch.source_lengths, condition=batch.condition):
        states_BTC, logits_BV = states_and_logits(model, batch.inputs, place_B)
    scores_NK: Tensor = head(logits_BV if head.reads_logits else states_BTC.flatten(0, 1)[batch.positions])
    return scores_NK[batch.row]


def of_pairs(losses_N: Tensor, batch: Batch) -> Tensor:
    """Losses of labels summed by pair, (M,)."""
    return torch.zeros(batch.num_pairs, device=losses_N.device).index_add(0, batch.pair, losses_N)
