"""`antefix bench train`: pairs a second, of ours and of the peers.

Our arm is the loop that `antefix train` runs, with its defaults. All arms take the same number of pairs an optimiser
step from the same encoded data. Each forward pass holds as many pairs as serves the arm best, found in one turn each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from antefix.attach import attached
from antefix.base import Dtype
from antefix.benchmarks.machine import description, matrix_peak_gflops
from antefix.benchmarks.peers import Pair
from antefix.benchmarks.rounds import Spread, interleave, ratio, summary
from antefix.benchmarks.worker import Worker
from antefix.benchmarks.workload import (
    Work,
    common_slots,
    load_workload,
    our_prefix,
    parameters_in_products,
    peak_mib,
)
from antefix.data.plan import Unit, microbatches, steps
from antefix.errors import BenchmarkError
from antefix.methods import method_class
from antefix.training.batch import Batch, packed_batch
from antefix.training.loop import StepReport, train_loop
from antefix.training.objectives import pair_losses
from antefix.training.recipe import TrainingRecipe

CHECKED: tuple[Pair, ...] = tuple((n, 0) for n in range(8))
"""The pairs on which arms must agree."""
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 3e-2}
RANDOM = "PEFT, random batches of 8"
FORWARD_PAIRS = (8, 16, 32, 64)
FORWARD_TOKENS = (512, 1024, 2048)
_FIRST_SEED = 1000

Watch = Callable[[int, int, str], None]
"""Called before every turn: turns done, turns in all, what is done now."""


class OurTraining:
    """The training loop of `antefix train`."""

    def __init__(self, base: str, data: str, dtype: Dtype, num_slots: int, **training: Any) -> None:
        self._base, self._data = load_workload(base, data, dtype)
        method = method_class("prefix_tuning")
        self._module = method.build(self._base, method.Config.model_validate({"num_virtual_tokens": num_slots}))
        self._num_slots = num_slots
        self._recipe = TrainingRecipe(evaluations=0, **training)

    def check_loss(self, pairs: Sequence[Pair]) -> float:
        """Mean loss of a target token over these pairs, with the slots that all arms are given."""
        model = self._base.model
        units = [Unit(n, (t,)) for n, t in pairs]
        with torch.no_grad(), attached(model, our_prefix(model, common_slots(model, self._num_slots))):
            total = pair_losses(model, packed_batch(self._data, units, model)).sum()
        return float(total) / sum(len(self._data.examples[n].targets[t]) for n, t in pairs)

    def set_forward_tokens(self, forward_tokens: int) -> None:
        """How many tokens go through the model together; a step may take several forward passes."""
        self._recipe = self._recipe.model_copy(update={"tokens_per_batch": forward_tokens})

    def work(self, seed: int, num_steps: int) -> Work:
        """Optimiser steps on pairs drawn with this seed; the time is the loop's own, without its set-up."""
        reports: list[StepReport] = []
        train_loop(
            self._base.model, self._module, self._data, None, self._drawn_with(seed, num_steps),
            learning_rate=1e-3, digest="", run_folder=None, watch=reports.append,
        )  # fmt: skip
        pairs = num_steps * self._recipe.pairs_per_step
        return Work(pairs, pairs / reports[-1].pairs_per_second)

    def useful_flop(self, seed: int, num_steps: int) -> float:
        """Of the same steps: 4 a layer weight and token that is not padding, 4 a head weight and logit row.

        Forward and, on a frozen base, backward to activations only: two products of 2 operations a weight each.
        """
        layers, head = parameters_in_products(self._base.model)
        batches = list(_batches(self, seed, num_steps))
        tokens, rows = sum(b.num_tokens for b in batches), sum(len(b.positions) for b in batches)
        return 4.0 * (layers * tokens + head * rows)

    def matrix_peak(self) -> float:
        """The best GFLOP/s of a matrix product of this model's shapes, in its precision, in this process."""
        linear = [m for m in self._base.model.modules() if isinstance(m, torch.nn.Linear)]
        shapes = {(m.in_features, m.out_features) for m in linear}
        return matrix_peak_gflops(shapes, (256, 512, 1024), self._base.model.dtype)

    def peak_mib(self, seed: int) -> float:
        """Peak memory of one optimiser step above the model."""
        return peak_mib(lambda: self.work(seed, 1))

    def bare_work(self, seed: int) -> None:
        """What nobody can do without: forward and backward to the input embeddings on the same rows, no prefix."""
        model = self._base.model
        for batch in _batches(self, seed, 1):
            ids = batch.inputs.pop("input_ids")
            batch.inputs["inputs_embeds"] = model.get_input_embeddings()(ids).requires_grad_()
            pair_losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]

    def bare_peak_mib(self, seed: int) -> float:
        """Peak memory of `bare_work` above the model."""
        return peak_mib(lambda: self.bare_work(seed))

    def _drawn_with(self, seed: int, num_steps: int) -> TrainingRecipe:
        return self._recipe.model_copy(update={"seed": seed, "max_steps": num_steps})


def _batches(arm: OurTraining, seed: int, num_steps: int) -> Iterator[Batch]:
    """The forward passes of these steps."""
    recipe, data = arm._recipe, arm._data
    plan = steps(data, pairs_per_step=recipe.pairs_per_step, targets_per_row=recipe.targets_per_row, seed=seed)
    for units in islice(plan, num_steps):
        for part in microbatches(data, units, recipe.tokens_per_batch, packed=True):
            yield packed_batch(data, part, arm._base.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBench:
    """What is compared, and for how long."""

    base: str
    data: str
    precisions: tuple[Dtype, ...] = ("float32", "bfloat16")
    num_slots: int = 10
    pairs_per_step: int = 32
    rounds: int = 9
    steps_per_round: int = 2
    with_full: bool = True
    """Also full fine-tuning, which no prefix can be as slow as."""
    targets_per_row: int | None = None
    """None: the recipe's default."""


def bench_training(bench: TrainingBench, watch: Watch) -> dict[str, Any]:
    """Run it; the record holds every round. Raises BenchmarkError where arms disagree on a loss."""
    found = {dtype: _at_precision(bench, dtype, watch) for dtype in bench.precisions}
    return {"bench": "train", "settings": asdict(bench), "machine": description(), "precisions": found}


def _at_precision(bench: TrainingBench, dtype: Dtype, watch: Watch) -> dict[str, Any]:
    with ExitStack() as stack:
        arms = {name: stack.enter_context(worker()) for name, worker in _workers(bench, dtype).items()}
        losses = _checked(arms, dtype)
        best = {name: _best_forward(name, arm, bench, watch) for name, arm in arms.items()}
        ours, num_steps, num_turns = arms["ours"], bench.steps_per_round, bench.rounds * len(arms)

        def turn(arm: Worker) -> Callable[[int], float]:
            return lambda number: float(arm.call("work", _FIRST_SEED + number, num_steps).per_second)

        rates = interleave(
            {name: turn(arm) for name, arm in arms.items()},
            bench.rounds,
            lambda done, name: watch(done, num_turns, f"{dtype}: {name}"),
        )
        pairs = num_steps * bench.pairs_per_step
        flop_per_pair = [ours.call("useful_flop", _FIRST_SEED + n, num_steps) / pairs for n in range(bench.rounds)]
        useful = [flop * rate / 1e9 for flop, rate in zip(flop_per_pair, rates["ours"], strict=True)]
        peak = ours.call("matrix_peak")
        return {
            "losses_with_the_same_slots": losses,
            "arms": {
                name: {**rated, "best_forward": best[name], "peak_mib": arms[name].call("peak_mib", _FIRST_SEED)}
                for name, rated in summary(rates).items()
            },
            "ratios": {f"ours / {other}": ratio(rates, "ours", other).to_dict() for other in arms if other != "ours"},
            "bare_forward_backward_peak_mib": ours.call("bare_peak_mib", _FIRST_SEED),
            "useful_gflops": Spread.of(useful).to_dict(),
            "matrix_peak_gflops": peak,
            "useful_share": Spread.of([u / peak for u in useful]).to_dict(),
        }


def _workers(bench: TrainingBench, dtype: Dtype) -> dict[str, Callable[[], Worker]]:
    common = {"base": bench.base, "data": bench.data, "dtype": dtype, "num_slots": bench.num_slots}
    packing = {} if bench.targets_per_row is None else {"targets_per_row": bench.targets_per_row}
    padded = {**common, "trained": "prefix", "pairs_per_step": bench.pairs_per_step, "forward_pairs": 16}
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "ours": ("training:OurTraining", {**common, "pairs_per_step": bench.pairs_per_step, **packing}),
        "PEFT, sorted": ("peers:PaddedTraining", {**padded, "sort": True}),
        RANDOM: ("peers:PaddedTraining", {**padded, "sort": False, "forward_pairs": 8}),
    }
    if bench.with_full:
        arms["full fine-tuning, sorted"] = ("peers:PaddedTraining", {**padded, "trained": "full", "sort": True})
    return {
        name: lambda place=place, options=options: Worker(f"antefix.benchmarks.{place}", options)  # type: ignore[misc]
        for name, (place, options) in arms.items()
    }


def _checked(arms: dict[str, Worker], dtype: Dtype) -> dict[str, float]:
    losses = {name: float(arm.call("check_loss", CHECKED)) for name, arm in arms.items() if "full" not in name}
    for name, loss in losses.items():
        if abs(loss - losses["ours"]) > TOLERANCE[dtype] * losses["ours"]:
            raise BenchmarkError(
                f"{dtype}: with the same slots and pairs ours has loss {losses['ours']:.6f}, {name} {loss:.6f}: "
                "they do not compute the same, so nothing is timed"
            )
    return losses


def _best_forward(name: str, arm: Worker, bench: TrainingBench, watch: Watch) -> int:
    """What a forward pass should hold: the fastest of those that make sense, after a turn to warm up."""
    arm.call("work", 0, 1)
    if name == RANDOM:
        return 8
    if name == "ours":
        setter, choices = "set_forward_tokens", list(FORWARD_TOKENS)
    else:
        setter, choices = "set_forward_pairs", [c for c in FORWARD_PAIRS if c <= bench.pairs_per_step]
    rates: dict[int, float] = {}
    for choice in choices:
        watch(len(rates), len(choices), f"how many at once serve {name} best")
        arm.call(setter, choice)
        rates[choice] = arm.call("work", 1, 1).per_second
    best = max(rates, key=rates.__getitem__)
    arm.call(setter, best)
    return best
