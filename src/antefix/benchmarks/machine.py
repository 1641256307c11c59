"""What this machine can do at most, measured in the same run as what was done on it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from antefix.benchmarks.workload import finish
from antefix.products import onednn_pays, product

LIBRARIES = ("antefix", "torch", "transformers", "peft", "torchao")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_CPU = torch.device("cpu")
_AT_ONCE = 20


def description(device: str = "cpu") -> dict[str, Any]:
    """Processor, what it knows of matrices, threads, versions, and the commit where this code lies in a checkout.

    device: an accelerator is named too.
    """
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    accelerator = {} if device == "cpu" else {"accelerator": _accelerator_name(device)}
    return accelerator | {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "commit": _commit(),
    }


def matrix_peak_gflops(
    shapes: Iterable[tuple[int, int]], rows: Iterable[int], dtype: torch.dtype, seconds_each: float = 0.15,
    device: torch.device = _CPU,
) -> float:  # fmt: skip
    """The best rate of `rows x in` times `in x out` over these (in, out) shapes, in GFLOP/s.

    By torch's choice of library or, for float32 where oneDNN pays, by oneDNN: whichever is faster.
    """
    best = 0.0
    libraries: list[Callable[..., torch.Tensor]] = [torch.nn.functional.linear]
    if device == _CPU and dtype == torch.float32 and onednn_pays():
        libraries.append(product)
    for width_in, width_out in shapes:
        weight = torch.randn(width_out, width_in, device=device).to(dtype)
        for count in rows:
            x = torch.randn(count, width_in, device=device).to(dtype)
            for multiply in libraries:
                fastest = _fastest(lambda x=x, w=weight, multiply=multiply: multiply(x, w), seconds_each, device)
                best = max(best, 2 * count * width_in * width_out / fastest / 1e9)
    return best


def read_bandwidth_gb_s(mebibytes: int = 512, seconds: float = 0.5, device: torch.device = _CPU) -> float:
    """How fast memory that is in no cache is read, in GB/s: the bound of decoding one row."""
    data = torch.ones(mebibytes * 2**20 // 4, device=device)
    return data.numel() * 4 / _fastest(data.sum, seconds, device) / 1e9


def _fastest(work: Any, seconds: float, device: torch.device) -> float:
    """Seconds a time, at best; an accelerator is given several at once, since it begins late."""
    times = 1 if device == _CPU else _AT_ONCE
    work()
    finish(device)
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        for _ in range(times):
            work()
        finish(device)
        now = time.perf_counter()
        best = min(best, (now - started) / times)
        if now >= until:
            return best


def _accelerator_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _commit() -> str | None:
    """Of the checkout that this code lies in; None for an installed package."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
