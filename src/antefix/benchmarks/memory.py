"""`antefix bench memory`: peak memory of one optimiser step above the loaded model, by pairs a step.

Ours takes its default tokens a forward pass, a peer all pairs at once, 16 or 8 at a time, whichever takes least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from antefix.base import Dtype
from antefix.benchmarks.record import Curve, Record
from antefix.benchmarks.rounds import Spread, Watch
from antefix.benchmarks.worker import Worker

_SEED = 1000
_OURS = "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBench:
    """What is compared."""

    base: str
    data: str
    precision: Dtype = "float32"
    num_slots: int = 10
    pairs_per_step: tuple[int, ...] = (8, 16, 32, 64)


def bench_memory(bench: MemoryBench, watch: Watch) -> Record:
    """Run it: every figure in a process of its own, after a step to warm up."""
    record = Record(bench="memory", settings=asdict(bench), unit="")
    series: dict[str, list[tuple[float, Spread]]] = {}
    done, arms = 0, _arms()
    total = len(arms) * len(bench.pairs_per_step)
    for pairs in bench.pairs_per_step:
        found: dict[str, float] = {}
        for name, measure in arms.items():
            watch(done, total, f"{name}, {pairs} pairs a step")
            done += 1
            found[name] = measure(bench, pairs)
            series.setdefault(name, []).append((pairs, Spread.of([found[name]])))
            record.figures[f"MiB, {name}, {pairs} pairs a step"] = found[name]
        for name in arms:
            if name != _OURS:
                record.figures[f"{_OURS} / {name}, {pairs} pairs a step"] = found[_OURS] / found[name]
    record.curves = [
        Curve(title=f"one optimiser step, {bench.precision}", x="pairs a step", y="MiB above the model", series=series)
    ]
    return record


def _arms() -> dict[str, Callable[[MemoryBench, int], float]]:
    return {
        "bare forward and backward": lambda bench, pairs: _ours(bench, pairs, "bare_peak_mib"),
        _OURS: lambda bench, pairs: _ours(bench, pairs, "peak_mib"),
        "ours, activation checkpointing": lambda bench, pairs: _ours(
            bench, pairs, "peak_mib", activation_checkpointing=True
        ),
        "PEFT": lambda bench, pairs: _padded(bench, pairs, "prefix"),
        "full fine-tuning": lambda bench, pairs: _padded(bench, pairs, "full"),
    }


def _common(bench: MemoryBench, pairs: int) -> dict[str, Any]:
    return {"base": bench.base, "data": bench.data, "dtype": bench.precision, "num_slots": bench.num_slots,
            "pairs_per_step": pairs}  # fmt: skip


def _ours(bench: MemoryBench, pairs: int, call: str, **training: Any) -> float:
    with Worker("antefix.benchmarks.training:OurTraining", {**_common(bench, pairs), **training}) as arm:
        return float(arm.call(call, _SEED))


def _padded(bench: MemoryBench, pairs: int, trained: str) -> float:
    peaks = []
    for forward_pairs in sorted({min(8, pairs), min(16, pairs), pairs}):
        options = {**_common(bench, pairs), "trained": trained, "forward_pairs": forward_pairs, "sort": True}
        with Worker("antefix.benchmarks.peers:PaddedTraining", options) as arm:
            peaks.append(float(arm.call("peak_mib", _SEED)))
    return min(peaks)
