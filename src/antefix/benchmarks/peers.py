"""The peers' arms: PEFT's prefix-tuning and full fine-tuning, as their documentation shows them.

Pairs are padded on the right, the model computes every logit and its own loss. Batches are sorted by length with
transformers' own sampler, or drawn at random.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_length_grouped_indices

from antefix.base import Base, Dtype
from antefix.benchmarks.workload import Work, common_slots, finish, load_workload, peak_mib_on, with_sources
from antefix.data.encode import Encoded
from antefix.errors import BenchmarkError
from antefix.products import by_torch

_IGNORED = -100
Pair = tuple[int, int]
"""Index of an example, index of its target."""


class PaddedTraining:
    """One optimiser step after another, on padded pairs; trains PEFT's prefix, or every weight (`full`)."""

    def __init__(
        self, base: str, data: str, dtype: Dtype, trained: Literal["prefix", "full"], num_slots: int,
        pairs_per_step: int, forward_pairs: int, sort: bool, sample: int | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        self._base, data_of_file = load_workload(base, data, dtype, sample, device)
        by_torch(self._base.model)  # as transformers loads it
        self._model: Any = self._base.model
        if trained == "full":
            self._model.requires_grad_(True)
            self._train()
        else:
            self._set_slots(num_slots)
        self._pairs_per_step, self._sort, self.forward_pairs = pairs_per_step, sort, forward_pairs
        self._set_data(data_of_file)

    def _set_slots(self, num_slots: int) -> None:
        self._model, self._num_slots = peft_model(self._base, num_slots), num_slots
        self._train()

    def _train(self) -> None:
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._trained, lr=1e-3)

    def _set_data(self, data: Encoded) -> None:
        self._data = data
        self._pairs = [(n, t) for n, e in enumerate(data.examples) for t in range(len(e.targets))]

    def check_loss(self, pairs: Sequence[Pair]) -> float:
        """Mean loss of a target token over these pairs, with the slots that all arms are given."""
        if self._model is not self._base.model:
            give_slots(self._model, common_slots(self._base.model, self._num_slots))
        self._model.eval()
        with torch.no_grad():
            return float(self._model(**self._batch(pairs)).loss)

    def set_forward_size(self, forward_pairs: int) -> None:
        """How many pairs go through the model together; a step may take several forward passes."""
        self.forward_pairs = forward_pairs

    def work(self, seed: int, num_steps: int) -> Work:
        """Optimiser steps on pairs drawn with this seed."""
        self._model.train()
        drawn = self._drawn(seed, num_steps)
        started = time.perf_counter()
        for pairs in drawn:
            num_labels = self._num_labels(pairs)
            for start in range(0, len(pairs), self.forward_pairs):
                part = pairs[start : start + self.forward_pairs]
                loss = self._model(**self._batch(part)).loss * (self._num_labels(part) / num_labels)
                loss.backward()
            nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimiser.step()
            self._optimiser.zero_grad(set_to_none=True)
        finish(self._base.model.device)
        return Work(num_steps * self._pairs_per_step, time.perf_counter() - started)

    def grow(self, seed: int, num_slots: int, source_tokens: int | None, pairs_per_step: int) -> Work:
        """One step of so many pairs with so many slots, on sources of so many random tokens (None: the data's own)."""
        kept = self._data, self._pairs_per_step, self.forward_pairs
        if num_slots != self._num_slots:
            self._set_slots(num_slots)
        if source_tokens is not None:
            self._set_data(with_sources(self._data, source_tokens))
        self._pairs_per_step, self.forward_pairs = pairs_per_step, min(self.forward_pairs, pairs_per_step)
        try:
            return self.work(seed, 1)
        finally:
            data, self._pairs_per_step, self.forward_pairs = kept
            self._set_data(data)

    def peak_mib(self, seed: int) -> float:
        """Peak memory of one optimiser step above the model and the optimiser's state."""
        return peak_mib_on(self._base.model.device, lambda: self.work(seed, 1))

    def _drawn(self, seed: int, num_steps: int) -> list[list[Pair]]:
        draw, size, forward = torch.Generator().manual_seed(seed), self._pairs_per_step, self.forward_pairs
        if self._sort:
            lengths = [self._length(pair) for pair in self._pairs]
            order = get_length_grouped_indices(lengths, forward, generator=draw)  # type: ignore[no-untyped-call]
        else:
            order = torch.randperm(len(self._pairs), generator=draw).tolist()
        passes = [order[n : n + forward] for n in range(0, len(order) - forward + 1, forward)]
        passes_a_step = -(-size // forward)
        count = num_steps * passes_a_step
        if len(passes) < count:
            raise BenchmarkError(f"{num_steps} steps of {size} pairs need more than the {len(self._pairs)} pairs here")
        if self._sort:
            passes.sort(key=lambda indices: max(lengths[i] for i in indices))
            passes = _spread(passes, count, draw)
        pairs = [[self._pairs[i] for i in indices] for indices in passes[:count]]
        starts = range(0, count, passes_a_step)
        return [[p for part in pairs[n : n + passes_a_step] for p in part][:size] for n in starts]

    def _length(self, pair: Pair) -> int:
        example = self._data.examples[pair[0]]
        return len(example.source) + len(example.targets[pair[1]])

    def _num_labels(self, pairs: Sequence[Pair]) -> int:
        return sum(len(self._data.examples[n].targets[t]) for n, t in pairs)

    def _batch(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        longest = max(map(self._length, pairs))
        pad = self._base.tokenizer.pad_token_id
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for n, t in pairs:
            source, target = self._data.examples[n].source, self._data.examples[n].targets[t]
            length = len(source) + len(target)
            gap = longest - length
            rows["input_ids"].append([*source, *target, *[pad] * gap])
            rows["attention_mask"].append([1] * length + [0] * gap)
            rows["labels"].append([*[_IGNORED] * len(source), *target, *[_IGNORED] * gap])
        return {name: torch.tensor(values, device=self._base.model.device) for name, values in rows.items()}


def _spread(passes: Sequence[list[int]], count: int, draw: torch.Generator) -> list[list[int]]:
    """So many forward passes of an epoch sorted by length, to stand for all of it: of all lengths, in random order.

    Every one is taken with the same chance. The sampler's own first ones are the longest of a stretch.
    """
    first = float(torch.rand((), generator=draw))
    chosen = [passes[int((first + n) * len(passes) / count)] for n in range(count)]
    return [chosen[n] for n in torch.randperm(count, generator=draw).tolist()]


def peft_model(base: Base, num_slots: int) -> Any:
    """The base under PEFT's prefix-tuning. Raises BenchmarkError where PEFT is not installed."""
    try:
        from peft import PrefixTuningConfig, get_peft_model
    except ImportError as error:
        raise BenchmarkError("PEFT is not installed: pip install 'antefix[bench]'") from error
    return get_peft_model(base.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_slots))


def give_slots(model: Any, slots: Tensor, adapter: str = "default") -> None:
    """Put these values into a PEFT prefix."""
    with torch.no_grad():
        model.prompt_encoder[adapter].embedding.weight.copy_(slots)


def peft_generate(model: Any, input_ids: Tensor, attention_mask: Tensor, **arguments: Any) -> Tensor:
    """`generate` with a PEFT prefix: token ids (B, T + new).

    PEFT 0.21 hands its slots over as `past_key_values`, which transformers 5.24 has renamed: its own `generate` then
    writes without the prefix, and says nothing. So the cache that PEFT makes is given to the base's `generate`, after
    as many tokens that stand for it.
    """
    num_rows, num_slots = len(input_ids), model.active_peft_config.num_virtual_tokens
    stand_ins = input_ids.new_full((num_rows, num_slots), model.config.pad_token_id)
    out: Tensor = model.get_base_model().generate(
        input_ids=torch.cat([stand_ins, input_ids], dim=1),
        attention_mask=torch.cat([torch.ones_like(stand_ins), attention_mask], dim=1),
        cache=model.get_prompt(batch_size=num_rows),
        **arguments,
    )
    return out[:, num_slots:]
