"""A bench's record for people: a page of tables, a picture of the ratios."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antefix import atomic

UNITS = {"train": "pairs/s", "generate": "new tokens/s"}


def write_report(record: dict[str, Any], folder: Path) -> Path:
    """`record.json`, `report.md` and `ratios.png` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(folder / "record.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    atomic.write_bytes(folder / "report.md", markdown(record).encode())
    _plot(record, folder / "ratios.png")
    return folder


def markdown(record: dict[str, Any]) -> str:
    """Machine, arms, ratios, and what else was measured."""
    machine = record["machine"]
    lines = [
        f"# antefix bench {record['bench']}",
        "",
        f"{machine['processor']}, {machine['threads']} threads ({', '.join(machine['features'])}); "
        + ", ".join(f"{name} {found}" for name, found in machine["versions"].items()),
        "",
        "Settings: " + ", ".join(f"{name} {_plain(value)}" for name, value in record["settings"].items()),
    ]
    for dtype, found in record["precisions"].items():
        rates = [
            (name, f"{arm['median']:.2f}", f"{arm['low']:.2f} to {arm['high']:.2f}", f"{arm['peak_mib']:,.0f}")
            for name, arm in found["arms"].items()
        ]
        ratios = [
            (name, f"{spread['median']:.3f}", f"{spread['low']:.3f} to {spread['high']:.3f}")
            for name, spread in found["ratios"].items()
        ]
        lines += [
            "", f"## {dtype}",
            "", *_table(("arm", UNITS[record["bench"]], "quartiles", "peak memory, MiB"), rates),
            "", *_table(("ratio within a round", "median", "quartiles"), ratios),
            "", *_REMARKS[record["bench"]](found),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    written = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return [f"| {' | '.join(row)} |" for row in written]


def _about_training(found: dict[str, Any]) -> list[str]:
    losses = ", ".join(f"{name} {loss:.6f}" for name, loss in found["losses_with_the_same_slots"].items())
    return [
        f"Useful work of ours: {found['useful_gflops']['median']:.0f} GFLOP/s, "
        f"{100 * found['useful_share']['median']:.0f} % of this model's best matrix product "
        f"({found['matrix_peak_gflops']:.0f} GFLOP/s). The bare base's forward and backward on the same rows takes "
        f"{found['bare_forward_backward_peak_mib']:,.0f} MiB at the peak.",
        "",
        f"Losses with the same slots on the same pairs: {losses}.",
    ]


def _about_decoding(found: dict[str, Any]) -> list[str]:
    differences = ", ".join(f"{value:.2g} with {n} slots" for n, value in found["largest_difference_of_logits"].items())
    return [
        f"The bare base reads weights at {found['weights_read_gb_s']['median']:.1f} GB/s, the memory gives "
        f"{found['memory_read_gb_s']:.1f} GB/s.",
        "",
        f"Largest difference between the logits of ours and of PEFT: {differences}.",
    ]


_REMARKS = {"train": _about_training, "generate": _about_decoding}


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _plot(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    bars = [
        (f"{name}, {dtype}", spread)
        for dtype, found in record["precisions"].items()
        for name, spread in found["ratios"].items()
    ][::-1]
    figure = Figure(figsize=(8, 1 + 0.4 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    medians = [found["median"] for _, found in bars]
    spread = [[m - f["low"] for m, (_, f) in zip(medians, bars, strict=True)],
              [f["high"] - m for m, (_, f) in zip(medians, bars, strict=True)]]  # fmt: skip
    axes.barh([name for name, _ in bars], medians, xerr=spread, color="#4c72b0", ecolor="#222222", capsize=3)
    axes.axvline(1.0, color="#888888", linewidth=1)
    for row, median in enumerate(medians):
        axes.text(0.02, row, f"{median:.2f}", va="center", color="white", fontweight="bold")
    axes.set_xlabel(f"times as many {UNITS[record['bench']]}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
