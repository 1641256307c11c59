"""Semantic parsing (TOP) from few rows: prefixes and biases with and without embeddings of symbols, LoRA, all weights.

    python experiments/top_parsing.py path/to/top_english_small

SmolLM2-135M in float32, one seed, methods at their default sizes. 200, 500 and 1,500 training rows by samples per
intent and slot (SPIS): all rows of the largest draw that fits, and some of the next one. They are seen 6, 3 and 1.5
times. The learning rate is the best of three by the loss on 100 dev rows, after 1.5 times the smallest set, and is
then used for all sets. The last step is kept.

500 test rows, the same for all, drawn from the utterances that are not in the training file: exact match, frame F1 and
the share of well-formed frames of greedy texts; and the same where only frames can be written. The labels that may be
written are those of the new tokens, where there are some, else any. A frame that has no other label, no space too many
and at most half of the tokens there are is not written again for that: every token of it was the likeliest that fits.

Writes `results/top_parsing/`; minutes on an accelerator, three hours on two cores (two
processes with one thread each).
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import antefix
from antefix.attach import attached, current_attachment
from antefix.data import sample_frames
from antefix.data.example import Example
from antefix.data.frames import brackets, parse
from antefix.metrics import score
from antefix.training.recipe import TrainingRecipe

from few_labels import kept_dev_loss, rates  # isort: skip
from smollm import READ, TRAINED, smollm  # isort: skip
from umls import drawn  # isort: skip
from units import ROOT, Unit, announce, best_rate, finish  # isort: skip

RESULTS = ROOT / "results" / "top_parsing"
ARMS = ("prefix_tuning", "prefix_tuning+special_tokens", "bitfit", "bitfit+special_tokens", "lora", "full")
EPOCHS = {200: 6.0, 500: 3.0, 1500: 1.5}
"""Training rows -> how often they are seen."""
SEARCH_ROWS, SEARCH_EPOCHS = 200, 1.5
DEV, TEST, ROWS_AT_ONCE = 100, 500, 100
FREE = antefix.Decoding(max_new_tokens=120)
FRAMES = FREE.model_copy(update={"frames": True})
METRICS = ("accuracy", "frame_f1", "well_formed")
TESTED_SECONDS = 350.0
"""Writing texts for the test rows, the second time included."""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    searches = {
        f"search_{key(arm)}_{number}": Unit(
            partial(search, folder, arm, rate), seconds(arm, SEARCH_ROWS * SEARCH_EPOCHS)
        )
        for arm in ARMS
        for number, rate in enumerate(rates(arm))
    }
    names = {f"final_{key(arm)}_{rows}": (arm, rows) for rows in EPOCHS for arm in ARMS}
    expected = {n: seconds(arm, rows * EPOCHS[rows]) + TESTED_SECONDS for n, (arm, rows) in names.items()}
    announce(RESULTS / "units", searches | {name: Unit(dict, left) for name, left in expected.items()})
    found = finish(RESULTS / "units", searches)
    finals = {
        name: Unit(partial(final, folder, arm, best_rate(found, f"search_{key(arm)}"), n), 0.0)
        for name, (arm, n) in names.items()
    }
    summary = summed(finish(RESULTS / "units", finals))
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(summary, RESULTS / "top_parsing.png")


def key(arm: str) -> str:
    return arm.replace("+", "_and_")


def seconds(arm: str, rows_seen: float) -> float:
    """Of training and the dev loss, for the estimate; a label of its own token saves six."""
    tokens = 29 if "special_tokens" in arm else 44
    return rows_seen * tokens / TRAINED * (1.5 if arm == "full" else 1.0) + DEV * tokens / READ


def data(folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
    """All training rows; dev and test rows whose utterances are not among them."""
    train, dev, test = (
        antefix.read(folder / f"{name}.tsv", source_column="utterance", target_column="semantic_parse")
        for name in ("train", "validation", "test")
    )
    known = {str(e.source).casefold() for e in train}
    dev, test = ([e for e in some if str(e.source).casefold() not in known] for some in (dev, test))
    return train, drawn(dev, DEV), drawn(test, TEST)


def few(train: list[Example], rows: int) -> tuple[list[Example], int]:
    """So many training rows, and the samples per intent and slot that all of them together hold."""
    fitting = takewhile(lambda n: len(sample_frames(train, n, 0)) <= rows, range(1, rows))
    samples = max(fitting, default=0)
    return sample_frames(train, samples + 1, 0)[:rows], samples


def trained(
    base: antefix.Base, train: list[Example], dev: list[Example], arm: str, rate: float, epochs: float
) -> antefix.Prefix:
    training = TrainingRecipe(epochs=epochs, learning_rate=rate, pairs_per_step=8, evaluations=1)
    return antefix.train(base, train, dev=dev, method=arm, training=training)


def search(folder: Path, arm: str, rate: float) -> dict[str, Any]:
    train, dev, _ = data(folder)
    prefix = trained(smollm(), few(train, SEARCH_ROWS)[0], dev, arm, rate, SEARCH_EPOCHS)
    return {"arm": arm, "learning_rate": rate, "dev_loss": kept_dev_loss(prefix)}


def final(folder: Path, arm: str, rate: float, rows: int) -> dict[str, Any]:
    """Train, and parse the test rows twice."""
    base = smollm()
    every, dev, test = data(folder)
    train, samples = few(every, rows)
    started = time.perf_counter()
    prefix = trained(base, train, dev, arm, rate, EPOCHS[rows])
    trained_at = time.perf_counter()
    with attached(base.model, prefix):
        free, frames = parses(base, test)
    references = [e.targets for e in test]
    return {
        "arm": arm,
        "rows": rows,
        "samples_per_intent_and_slot": samples,
        "epochs": EPOCHS[rows],
        "learning_rate": rate,
        "dev_loss": kept_dev_loss(prefix),
        "trained_values": prefix.card.training["trained"],
        "stored_values": prefix.num_values,
        "free": score(references, free, METRICS),
        "only_frames": score(references, frames, METRICS),
        "seconds_of_training": round(trained_at - started, 1),
        "seconds_of_parsing": round(time.perf_counter() - trained_at, 1),
    }


def parses(base: antefix.Base, test: list[Example]) -> tuple[list[str], list[str]]:
    """Texts as they come, and texts of which all are frames."""
    free = antefix.generate(base, test, decoding=FREE, batch_size=ROWS_AT_ONCE)
    again = [n for n, text in enumerate(free) if not comes_out_again(base, text)]
    if not again:
        return free, free
    frames = list(free)
    written = antefix.generate(base, [test[n] for n in again], decoding=FRAMES, batch_size=ROWS_AT_ONCE)
    for n, text in zip(again, written, strict=True):
        frames[n] = text
    return free, frames


def comes_out_again(base: antefix.Base, text: str) -> bool:
    """Whether decoding that can only write frames would have written this text."""
    root, attachment = parse(text), current_attachment(base.model)
    assert attachment is not None
    symbols = attachment.module_of(0).symbols
    labels = [symbol.removeprefix("[") for symbol in symbols if symbol.startswith("[")]
    num_tokens = len(base.tokenizer_with(symbols)(text)["input_ids"])
    return (
        root is not None
        and text == " ".join(text.split())
        and num_tokens <= FREE.max_new_tokens // 2
        and (not labels or all(label in labels for label, _, _ in brackets(root)))
    )


def summed(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Arm -> training rows -> scores."""
    summary: dict[str, Any] = {}
    for arm in ARMS:
        units = [found[f"final_{key(arm)}_{rows}"] for rows in EPOCHS]
        summary[arm] = {name: units[0][name] for name in ("learning_rate", "trained_values", "stored_values")}
        tried = rates(arm)
        summary[arm]["best_of_the_rates_at_an_end"] = units[0]["learning_rate"] in (min(tried), max(tried))
        summary[arm]["rows"] = {
            unit["rows"]: {
                "samples_per_intent_and_slot": unit["samples_per_intent_and_slot"],
                **{kind: {name: round(unit[kind][name], 4) for name in METRICS} for kind in ("free", "only_frames")},
            }
            for unit in units
        }
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    """Exact match and well-formed frames of texts as they come, by training rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for place, (name, title) in enumerate((("accuracy", "exact match"), ("well_formed", "well-formed"))):
        axes = figure.add_subplot(1, 2, place + 1)
        for arm in ARMS:
            axes.plot(list(EPOCHS), [summary[arm]["rows"][n]["free"][name] for n in EPOCHS], marker="o", label=arm)
        axes.set_xscale("log")
        axes.set_xticks(list(EPOCHS), [f"{rows:,}" for rows in EPOCHS], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("training rows")
        axes.set_ylabel(f"{title}, of {TEST} utterances")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
