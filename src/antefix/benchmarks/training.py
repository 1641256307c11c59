"""`antefix bench train`: pairs a second, of ours and of the peers.

Our arm is the loop that `antefix train` runs, with its defaults. All arms take the same number of pairs an optimiser
step from the same encoded data, in all precisions in one run. A peer's forward pass holds as many pairs as serves it
best, found in one turn each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from antefix.attach import attached
from antefix.attention.hook import routed
from antefix.base import Dtype
from antefix.batches.batch import Batch
from antefix.batches.form import batch_of
from antefix.batches.head import pair_losses
from antefix.benchmarks.machine import description, matrix_peak_gflops
from antefix.benchmarks.peers import Pair
from antefix.benchmarks.record import Curve, Record
from antefix.benchmarks.rounds import Kept, Spread, Watch, interleave
from antefix.benchmarks.worker import Worker
from antefix.benchmarks.workload import (
    Work,
    common_slots,
    load_workload,
    our_prefix,
    parameters_in_products,
    peak_mib_on,
    with_sources,
)
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, microbatches, steps
from antefix.errors import BenchmarkError
from antefix.methods import method_class
from antefix.training.loop import StepReport, train_loop
from antefix.training.recipe import TrainingRecipe

CHECKED: tuple[Pair, ...] = tuple((n, 0) for n in range(8))
"""The pairs on which arms must agree."""
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 3e-2}
FORWARD_PAIRS, FORWARD_TOKENS = (8, 16, 32, 64, 128, 256), (1024, 4096, 16384)
"""What a peer's forward pass may hold, and ours on an accelerator."""
STEP_PAIRS = (8, 16, 32, 64)
SLOT_COUNTS, SOURCE_TOKENS, _GROWTH_ROUNDS = (1, 16, 128, 512, 2048), (16, 64, 256, 1024), 3
"""Of the growth curves."""
_FIRST_SEED = 1000


class OurTraining:
    """The training loop of `antefix train`."""

    def __init__(
        self, base: str, data: str, dtype: Dtype, num_slots: int, sample: int | None = None, device: str = "cpu",
        **training: Any,
    ) -> None:  # fmt: skip
        self._base, self._data = load_workload(base, data, dtype, sample, device)
        self._set_slots(num_slots)
        self._recipe = TrainingRecipe(evaluations=0, **training)

    def _set_slots(self, num_slots: int) -> None:
        method = method_class("prefix_tuning")
        config = method.Config.model_validate({"num_virtual_tokens": num_slots, "initial": "normal"})
        self._module, self._num_slots = method.build(self._base, config), num_slots

    def check_loss(self, pairs: Sequence[Pair]) -> float:
        """Mean loss of a target token over these pairs, with the slots that all arms are given."""
        model = self._base.model
        units = [Unit(n, (t,)) for n, t in pairs]
        with torch.no_grad(), attached(model, our_prefix(model, common_slots(model, self._num_slots))):
            total = pair_losses(model, batch_of("packed", self._data, units, model)).sum()
        return float(total) / sum(len(self._data.examples[n].targets[t]) for n, t in pairs)

    def set_forward_size(self, tokens_per_batch: int) -> None:
        """How many tokens go through the model together."""
        self._recipe = self._recipe.model_copy(update={"tokens_per_batch": tokens_per_batch})

    def work(self, seed: int, num_steps: int) -> Work:
        """Optimiser steps on pairs drawn with this seed; the time is the loop's own, without its set-up."""
        return self._work_on(self._data, self._drawn_with(seed, num_steps))

    def grow(self, seed: int, num_slots: int, source_tokens: int | None, pairs_per_step: int) -> Work:
        """One step of so many pairs with so many slots, on sources of so many random tokens (None: the data's own)."""
        if num_slots != self._num_slots:
            self._set_slots(num_slots)
        data = self._data if source_tokens is None else with_sources(self._data, source_tokens)
        return self._work_on(data, self._drawn_with(seed, 1, pairs_per_step=pairs_per_step))

    def _work_on(self, data: Encoded, recipe: TrainingRecipe) -> Work:
        reports: list[StepReport] = []
        train_loop(
            self._base.model, self._module, data, None, recipe,
            learning_rate=1e-3, digest="", run_folder=None, watch=reports.append,
        )  # fmt: skip
        pairs = (recipe.max_steps or 1) * recipe.pairs_per_step
        return Work(pairs, pairs / reports[-1].pairs_per_second)

    def useful_flop_a_pair(self, seed: int, num_steps: int) -> float:
        """Of the same steps: 4 a layer weight and token fed (none is padding), 4 a head weight and logit row.

        Forward and, on a frozen base, backward to activations only: two products of 2 operations a weight each.
        """
        layers, head = parameters_in_products(self._base.model)
        batches = list(self._batches(seed, num_steps))
        tokens, rows = sum(b.num_tokens for b in batches), sum(len(b.positions) for b in batches)
        return 4.0 * (layers * tokens + head * rows) / (num_steps * self._recipe.pairs_per_step)

    def matrix_peak(self) -> float:
        """The best GFLOP/s of a matrix product of this model's shapes, in its precision, in this process."""
        layers = [m for m in self._base.model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
        shapes = {(m.weight.shape[1], m.weight.shape[0]) for m in layers}  # as multiplied, or the same transposed
        device = self._base.model.device
        rows = (256, 512, 1024) if device.type == "cpu" else (2048, 8192)
        return matrix_peak_gflops(shapes, rows, self._base.model.dtype, device=device)

    def peak_mib(self, seed: int) -> float:
        """Peak memory of one optimiser step above the model."""
        return peak_mib_on(self._base.model.device, lambda: self.work(seed, 1))

    def bare_peak_mib(self, seed: int) -> float:
        """The same of what nobody can do without: forward and backward to the input embeddings, no prefix."""
        return peak_mib_on(self._base.model.device, lambda: self._bare_work(seed))

    def _bare_work(self, seed: int) -> None:
        model = self._base.model
        with routed(model):
            for batch in self._batches(seed, 1):
                ids = batch.inputs.pop("input_ids")
                batch.inputs["inputs_embeds"] = model.get_input_embeddings()(ids).requires_grad_()
                pair_losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]

    def _drawn_with(self, seed: int, num_steps: int, **changed: Any) -> TrainingRecipe:
        return self._recipe.model_copy(update={"seed": seed, "max_steps": num_steps, **changed})

    def _batches(self, seed: int, num_steps: int) -> Iterator[Batch]:
        """The forward passes of these steps."""
        recipe, data = self._recipe, self._data
        plan = steps(data, pairs_per_step=recipe.pairs_per_step, targets_per_row=recipe.targets_per_row, seed=seed)
        for units in islice(plan, num_steps):
            for part in microbatches(data, units, recipe.tokens_per_batch, packed=True):
                yield batch_of("packed", data, part, self._base.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBench:
    """What is compared, and for how long."""

    base: str
    data: str
    precisions: tuple[Dtype, ...] = ("float32", "bfloat16")
    num_slots: int = 10
    pairs_per_step: int = 16
    sample: int | None = None
    """Train on so many pairs drawn one by one, which hardly share a source; None: on the whole file."""
    rounds: int = 15
    steps_per_round: int = 4
    device: str = "cpu"
    quick: bool = False
    """No full fine-tuning, no curves, PEFT's sorted batches at 16 pairs a forward pass."""
    curves: bool = True
    """Unless quick."""


def bench_training(bench: TrainingBench, watch: Watch, kept: Kept | None = None) -> Record:
    """Run it, from the rounds that are kept. Raises BenchmarkError where arms disagree on a loss."""
    kept = kept or Kept()
    record = Record(bench="train", settings=asdict(bench), unit="pairs/s", machine=description(bench.device))
    with ExitStack() as stack:
        arms = {name: stack.enter_context(worker()) for name, worker in _workers(bench).items()}
        for dtype in bench.precisions:
            record.figures |= _checked_losses(arms, dtype)
        for name, arm in arms.items():
            record.figures |= _best_forward(name, arm, bench, watch, kept)
        num_steps, num_turns = bench.steps_per_round, bench.rounds * len(arms)

        def turn(arm: Worker) -> Callable[[int], float]:
            return lambda number: float(arm.call("work", _FIRST_SEED + number, num_steps).per_second)

        record.rounds = interleave(
            {name: turn(arm) for name, arm in arms.items()}, bench.rounds,
            lambda n, name: watch(n, num_turns, name), kept,
        )  # fmt: skip
        for dtype in bench.precisions:
            record.figures |= _useful_work(arms[f"ours, {dtype}"], record.rounds[f"ours, {dtype}"], dtype, bench)
    _add_peaks(record, bench, watch)
    _add_ratios(record, bench)
    if bench.curves and not bench.quick:
        record.curves = _growth(bench, watch)
    return record


def _workers(bench: TrainingBench) -> dict[str, Callable[[], Worker]]:
    arms: dict[str, tuple[str, dict[str, Any]]] = {}
    for dtype in bench.precisions:
        common = {"base": bench.base, "data": bench.data, "dtype": dtype, "num_slots": bench.num_slots,
                  "sample": bench.sample, "pairs_per_step": bench.pairs_per_step, "device": bench.device}  # fmt: skip
        padded = {**common, "trained": "prefix", "forward_pairs": 16}
        arms[f"ours, {dtype}"] = ("training:OurTraining", common)
        arms[f"PEFT sorted, {dtype}"] = ("peers:PaddedTraining", {**padded, "sort": True})
        arms[f"PEFT random of 8, {dtype}"] = ("peers:PaddedTraining", {**padded, "sort": False, "forward_pairs": 8})
        if dtype == "float32" and not bench.quick:
            full = {**padded, "trained": "full", "sort": True}
            arms[f"full fine-tuning sorted, {dtype}"] = ("peers:PaddedTraining", full)
    return {
        name: lambda place=place, options=options: Worker(f"antefix.benchmarks.{place}", options)  # type: ignore[misc]
        for name, (place, options) in arms.items()
    }


def _checked_losses(arms: dict[str, Worker], dtype: Dtype) -> dict[str, float]:
    names = [name for name in arms if name.endswith(dtype) and "full" not in name]
    losses = {name: float(arms[name].call("check_loss", CHECKED)) for name in names}
    ours = losses[f"ours, {dtype}"]
    for name, loss in losses.items():
        if abs(loss - ours) > TOLERANCE[dtype] * ours:
            raise BenchmarkError(
                f"{dtype}: with the same slots and pairs ours has loss {ours:.6f}, {name} {loss:.6f}: they do not "
                "compute the same, so nothing is timed"
            )
    return {f"loss with the same slots and pairs, {name}": round(loss, 6) for name, loss in losses.items()}


def _best_forward(name: str, arm: Worker, bench: TrainingBench, watch: Watch, kept: Kept) -> dict[str, float]:
    """How much an arm's forward pass should hold, after a turn to warm up; empty where that is given."""
    watch(0, 1, f"warming up {name}")
    arm.call("work", 0, 1)
    choices = _forward_sizes(name, bench)
    if not choices:
        return {}

    def fastest() -> int:
        rates: dict[int, float] = {}
        for choice in choices:
            watch(len(rates), len(choices), f"how many at once serve {name} best")
            arm.call("set_forward_size", choice)
            arm.call("work", 1, 1)
            rates[choice] = arm.call("work", 1, 1).per_second
        return max(rates, key=rates.__getitem__)

    best = int(kept.choice(_forward_size_of(name), fastest))
    arm.call("set_forward_size", best)
    return {_forward_size_of(name): best}


def _forward_sizes(name: str, bench: TrainingBench) -> list[int]:
    if bench.quick:
        return []
    if "sorted" in name:
        return [pairs for pairs in FORWARD_PAIRS if pairs <= bench.pairs_per_step]
    return list(FORWARD_TOKENS) if name.startswith("ours") and bench.device != "cpu" else []


def _useful_work(ours: Worker, rates: Sequence[float], dtype: Dtype, bench: TrainingBench) -> dict[str, float]:
    flop = [ours.call("useful_flop_a_pair", _FIRST_SEED + n, bench.steps_per_round) / 1e9 for n in range(bench.rounds)]
    useful = Spread.of([f * rate for f, rate in zip(flop, rates, strict=True)]).median
    peak = ours.call("matrix_peak")
    return {
        f"useful GFLOP/s, ours, {dtype}": useful,
        f"best matrix product GFLOP/s, {dtype}": peak,
        f"useful share of the best, {dtype}": useful / peak,
        f"pairs/s if all were matrix products at their best, {dtype}": peak / (sum(flop) / len(flop)),
    }


def _add_peaks(record: Record, bench: TrainingBench, watch: Watch) -> None:
    """Of every arm in a fresh process: what one has freed and not given back would count for less."""
    workers = _workers(bench)
    for number, (name, worker) in enumerate(workers.items()):
        watch(number, len(workers), f"peak memory, {name}")
        with worker() as arm:
            forward_size = record.figures.get(_forward_size_of(name))
            if forward_size is not None:
                arm.call("set_forward_size", int(forward_size))
            record.peak_mib[name] = arm.call("peak_mib", _FIRST_SEED)
    for dtype in bench.precisions:
        with _workers(bench)[f"ours, {dtype}"]() as ours:
            what = f"peak MiB of a bare forward and backward on the same rows, {dtype}"
            record.figures[what] = ours.call("bare_peak_mib", _FIRST_SEED)


def _forward_size_of(name: str) -> str:
    return f"{'tokens' if name.startswith('ours') else 'pairs'} a forward pass, {name}"


def _add_ratios(record: Record, bench: TrainingBench) -> None:
    for dtype in bench.precisions:
        for other in record.rounds:
            if other.endswith(dtype) and not other.startswith("ours"):
                record.add_ratio(f"ours, {dtype}", other)
    if {"float32", "bfloat16"} <= set(bench.precisions):
        record.add_ratio("ours, bfloat16", "PEFT random of 8, float32")


def _growth(bench: TrainingBench, watch: Watch) -> list[Curve]:
    """Of ours and PEFT's sorted batches, in the last precision: over slots, the length of sources, pairs a step."""
    dtype = bench.precisions[-1]
    settings: dict[tuple[str, int], tuple[int, int | None, int]] = {
        **{("slots", n): (n, None, 16) for n in SLOT_COUNTS},
        **{("source tokens", n): (bench.num_slots, n, 8) for n in SOURCE_TOKENS},
        **{("pairs a step", n): (bench.num_slots, None, n) for n in STEP_PAIRS},
    }
    names = (f"ours, {dtype}", f"PEFT sorted, {dtype}")
    with ExitStack() as stack:
        arms = {name: stack.enter_context(_workers(replace(bench, sample=None))[name]()) for name in names}
        turns = {
            f"{name}: {axis} {n}": partial(_grown, arm, setting)
            for (axis, n), setting in settings.items()
            for name, arm in arms.items()
        }
        total = _GROWTH_ROUNDS * len(turns)
        rates = interleave(turns, _GROWTH_ROUNDS, lambda n, name: watch(n, total, f"growth: {name}"))
    return [
        Curve(
            title=f"training, {dtype}", x=axis, y="pairs/s",
            series={
                name: [(n, Spread.of(rates[f"{name}: {a} {n}"])) for a, n in settings if a == axis] for name in names
            },
        )
        for axis in dict.fromkeys(axis for axis, _ in settings)
    ]  # fmt: skip


def _grown(arm: Worker, setting: tuple[int, int | None, int], number: int) -> float:
    return float(arm.call("grow", number, *setting).per_second)
