"""Draws docs/images/result.png from results/e2e_1000: what a prefix makes of the bare base. Run from the repository."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
ARMS = {
    "bare": ("bare base, chat template and instruction", "#9aa5b1"),
    "prefix": ("with the prefix, 450 KiB", "#1f6f8b"),
}
SCORES = {"BLEU": ("scores", "bleu"), "METEOR": ("scores", "meteor"), "ROUGE-L": ("scores", "rouge_l"),
          "values left out": ("fields", "missing_share"), "values made up": ("fields", "added_share")}  # fmt: skip


def main() -> None:
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for offset, (arm, (label, colour)) in zip((-0.19, 0.19), ARMS.items(), strict=True):
        found = json.loads((ROOT / "results" / "e2e_1000" / f"{arm}.json").read_text(encoding="utf-8"))
        heights = [100 * found[part][name] for part, name in SCORES.values()]
        bars = axis.bar([n + offset for n in range(len(SCORES))], heights, 0.36, label=label, color=colour)
        axis.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    axis.set_xticks(range(len(SCORES)), list(SCORES))
    axis.set_ylabel("%")
    axis.set_ylim(0, 80)
    axis.axvline(2.5, color="#d0d5da", linewidth=1)
    axis.annotate("more is better", (1, 75), ha="center", color="#5b6570")
    axis.annotate("less is better", (3.5, 75), ha="center", color="#5b6570")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axis.set_title("630 test tables of the E2E challenge, SmolLM2-135M, 1,000 training pairs", fontsize=11)
    figure.savefig(ROOT / "docs" / "images" / "result.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
