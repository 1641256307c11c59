"""Where the time of a training step goes: torch's profiler over two steps of 32 pairs, grouped.

    python experiments/step_profile.py path/to/e2e-dataset.zip

The loop and the settings of `antefix bench train`, SmolLM2-135M, float32. Writes `results/step_profile.json`; a minute
on two cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from antefix import atomic
from antefix.benchmarks.training import OurTraining

from units import ROOT, commit, made_with  # isort: skip

RESULT = ROOT / "results" / "step_profile.json"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "mkldnn::_linear_pointwise")
ATTENTION = ("_FusedRuns", "_FusedRunsBackward")
"""Forward and backward pass over the runs of a packed batch: gathering, kernels, scattering."""
LISTED = 12


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    data = f"{Path(sys.argv[1]).resolve()}::trainset.csv"
    training = OurTraining("smollm2-135m", data, "float32", 10, pairs_per_step=32)
    training.work(0, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        training.work(1000, 2)
    events = profiled.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    attention = sum(e.cpu_time_total for e in events if e.key in ATTENTION)
    products = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS)
    single = sorted(events, key=lambda e: -e.self_cpu_time_total)[:LISTED]
    found = {
        "share_of": {
            "matrix products": round(products / total, 3),
            "attention": round(attention / total, 3),
            "all else (norms, rotary positions, activations, the head's losses, the optimiser)": round(
                1 - (products + attention) / total, 3
            ),
        },
        "operations_by_their_own_time": {e.key: round(e.self_cpu_time_total / total, 3) for e in single},
        "commit": commit(),
        "made_with": made_with(),
    }
    atomic.write_bytes(RESULT, f"{json.dumps(found, indent=1)}\n".encode())
    print(json.dumps(found["share_of"], indent=1))


if __name__ == "__main__":
    main()
