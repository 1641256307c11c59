"""Forms of attention over packed rows on a GPU: one compiled kernel, runs through SDPA, and padded rows.

    python experiments/forest_on_gpu.py path/to/e2e-dataset.zip BASE RESULT.json

A forward and backward pass of a prefix of 10 slots over pairs of the E2E training set, bfloat16, in steps of several
sizes; the median of ten, in turn. Before anything is timed, losses must agree. BASE: a folder (`random_base.py` makes
one). Useful operations are counted as in `antefix bench train`, tokens without padding, those of packed rows once.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from antefix.attach import attached
from antefix.attention.forest import Forest
from antefix.attention.partial import KeySet, Scores
from antefix.batches.batch import Batch
from antefix.batches.form import batch_of
from antefix.batches.head import pair_losses
from antefix.benchmarks.machine import matrix_peak_gflops
from antefix.benchmarks.workload import common_slots, load_workload, our_prefix, parameters_in_products
from antefix.data.plan import steps
from antefix.training.recipe import TrainingRecipe

from flex_forest import Ancestry  # isort: skip

STEP_PAIRS, TURNS, NUM_SLOTS = (32, 256), 10, 10
TOLERANCE = 1e-2


@contextmanager
def one_kernel() -> Iterator[None]:
    """Packed rows go through FlexAttention."""

    def attend(self: Forest, query: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Tensor:
        ancestry = self.__dict__.setdefault("ancestry", Ancestry.of(self.parents, self.is_target, self.window))
        return ancestry.attend(query, tokens, slots, scores.scale)

    by_runs = Forest.attend
    Forest.attend = attend
    try:
        yield
    finally:
        Forest.attend = by_runs


def seconds_of(work: Callable[[], Tensor]) -> tuple[float, float]:
    """Of one forward and backward pass, and its loss."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    loss = work()
    loss.backward()
    value = float(loss.detach())
    torch.cuda.synchronize()
    return time.perf_counter() - started, value


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    archive, base_name, result = sys.argv[1:]
    base, data = load_workload(base_name, f"{archive}::trainset.csv", "bfloat16", device="cuda")
    model = base.model
    module = our_prefix(model, 0.1 * common_slots(model, NUM_SLOTS)).requires_grad_(True)
    layers, head = parameters_in_products(model)
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    peak = matrix_peak_gflops(
        {(m.weight.shape[1], m.weight.shape[0]) for m in linear}, (2048, 8192, 16384), torch.bfloat16,
        device=model.device,
    )  # fmt: skip
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "base": base_name,
        "best matrix product, TFLOP/s": peak / 1e3, "steps": [],
    }  # fmt: skip
    for pairs in STEP_PAIRS:
        units = next(
            islice(steps(data, pairs_per_step=pairs, targets_per_row=TrainingRecipe().targets_per_row, seed=0), 1)
        )
        batches = {form: batch_of(form, data, units, model) for form in ("packed", "padded")}
        useful = 4e-12 * (layers * batches["packed"].num_tokens + head * len(batches["packed"].positions))

        def run(batch: Batch) -> Tensor:
            with attached(model, module):
                return pair_losses(model, batch).sum() / len(batch.label)

        def by_one_kernel(batch: Batch = batches["packed"]) -> tuple[float, float]:
            with one_kernel():
                return seconds_of(lambda: run(batch))

        forms = {
            "packed, FlexAttention": by_one_kernel,
            "packed, runs through SDPA": lambda batch=batches["packed"]: seconds_of(lambda: run(batch)),
            "padded, SDPA": lambda batch=batches["padded"]: seconds_of(lambda: run(batch)),
        }
        losses, gradients = {}, {}
        for name, form in forms.items():
            form()  # compiles
            module.zero_grad(set_to_none=True)
            losses[name] = form()[1]
            gradients[name] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        off = {name: float((g - gradients["padded, SDPA"]).norm() / g.norm()) for name, g in gradients.items()}
        if max(losses.values()) - min(losses.values()) > TOLERANCE * min(losses.values()):
            sys.exit(f"losses differ: {losses}")
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(TURNS):
            for name, form in forms.items():
                times[name].append(form()[0])
        at = {name: statistics.median(taken) for name, taken in times.items()}
        found["steps"].append({
            "pairs": pairs, "packed tokens": batches["packed"].num_tokens,
            "padded tokens": batches["padded"].num_tokens, "losses": losses,
            "gradients off those of padded rows by": off,
            "milliseconds": {name: 1e3 * taken for name, taken in at.items()},
            "pairs a second": {name: pairs / taken for name, taken in at.items()},
            "packed tokens a second": {n: batches["packed"].num_tokens / t for n, t in at.items() if "packed" in n},
            "useful share of the best product": {name: useful / taken / peak * 1e3 for name, taken in at.items()},
        })  # fmt: skip
        print(json.dumps(found["steps"][-1], indent=1), flush=True)
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
