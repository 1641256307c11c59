"""Paraphrases with a given syntax: PIP beside prefix-tuning and full fine-tuning, on a small BART.

    python experiments/small_bart.py path/to/webnlg path/to/dart
    python experiments/parse_instructed.py path/to/e2e-dataset.zip

Two one-sentence references of one E2E table are a sentence and its paraphrase; what is given beside the sentence is the
paraphrase's constituent tree without words (link-grammar's), of at most 100 tokens. At most 2,000 training pairs, seen
three times, the same in every step of every arm; the learning rate is the best of some by dev loss after a quarter of
the steps; one seed. Then an easier control: the sentence itself is given with a third of its words masked, as the base
knows it from its pretraining, and its tree says what is to be filled in; there the two best rates are trained to the
end, and the lower dev loss counts, since what is best after a quarter may end badly. Beams of 4 write the paraphrases
of at most 200 test pairs: BLEU; template match (of all pairs, those whose trees cut to two levels below the root are
the same; the parser's root is S); the mean tree edit distance over outputs that the parser can parse, and how many
these are; and all of it once more for texts written with another pair's tree, which tells whether trees are read.
Beside them the sentences as they are given (of which the parser parses as many as of any good English), and the
commonest tree of the training set. Writes `results/parse_instructed/`; minutes on an accelerator, two hours on two
cores.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.attach import attached
from antefix.base import Base, load_tokenizer
from antefix.data.example import Example
from antefix.metrics import score
from antefix.training.recipe import TrainingRecipe

from constituents import edit_distance, parsed  # isort: skip
from few_labels import kept_dev_loss  # isort: skip
from small_bart import MASK, MODEL  # isort: skip
from units import ROOT, Unit, announce, best_rate, finish  # isort: skip

RESULTS, WORK = ROOT / "results" / "parse_instructed", ROOT / "experiments" / "work" / "parse_instructed"
PAIRS = {"trainset": 2000, "devset": 150, "testset_w_refs": 200}
SEEDS, EPOCHS, SLOTS, LONGEST_WORDS = (0,), 3.0, 100, 20
FULL = "full"
RATES = {
    "prefix_tuning": (2e-2, 5e-2, 1.5e-1, 0.5, 1.5),
    "pip_direct": (2e-2, 5e-2, 1.5e-1, 0.5, 1.5),
    "pip_indirect": (2e-2, 5e-2, 1.5e-1, 0.5, 1.5),
    FULL: (1e-4, 3e-4, 1e-3, 3e-3),
}
MASKED_RATES = {arm: (3e-4, 1e-3, 3e-3) if arm == FULL else (5e-2, 1.5e-1, 0.5) for arm in RATES}
FINAL_SECONDS = 450.0
"""Of a final on one core, for the estimate."""
JUDGED_WITH_ANOTHER_TREE = ("bleu", "template_match", "tree_edit_distance")
SPAN_BEGINS = 0.2
"""At how many words a masked span of one to three words begins."""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if not MODEL.exists():
        sys.exit(f"{MODEL} is missing: run experiments/small_bart.py first")
    tokenizer, _ = load_tokenizer(str(MODEL))
    data = {name: short_trees(pairs(Path(sys.argv[1]).resolve(), name), tokenizer) for name in PAIRS}
    searches = {
        f"search_{arm}_{rate:g}": Unit(partial(one, data, arm, rate, 0, is_final=False), 100.0)
        for arm, rates in RATES.items()
        for rate in rates
    }
    finals = {f"final_{arm}_seed_{seed}": Unit(dict, FINAL_SECONDS) for arm in RATES for seed in SEEDS}
    of_control = {
        f"masked_search_{arm}_{rate:g}": Unit(dict, 100.0) for arm, rates in MASKED_RATES.items() for rate in rates
    }
    announce(RESULTS / "units", searches | finals | of_control)
    print(f"and two finals an arm of the control, {2 * len(RATES) * FINAL_SECONDS / 3600:.1f} h", flush=True)
    found = finish(RESULTS / "units", searches)
    best = {arm: best_rate(found, f"search_{arm}") for arm in RATES}
    finals = {
        f"final_{arm}_seed_{seed}": Unit(partial(one, data, arm, best[arm], seed, is_final=True), FINAL_SECONDS)
        for arm in RATES
        for seed in SEEDS
    }
    floor = {"floor": Unit(partial(floors, data["trainset"], data["testset_w_refs"]), 60.0)}
    summary = summed(finish(RESULTS / "units", finals | floor))
    summary["masked"] = filled_in(data)
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def pairs(e2e: Path, name: str) -> list[Example]:
    """A sentence with the tree of one of its paraphrases; drawn and parsed once, kept in a file."""
    path = WORK / f"{name}.jsonl"
    if not path.exists():
        drawn = _drawn(e2e, name)
        trees = parsed([paraphrase for _, paraphrase in drawn])
        rows = [{"sentence": s, "paraphrase": p, "tree": str(t)} for (s, p), t in zip(drawn, trees, strict=True) if t][
            : PAIRS[name]
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text("".join(f"{json.dumps(r)}\n" for r in rows), encoding="utf-8")
        scratch.replace(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Example(
            source=f"{r['sentence']} {spaced(r['tree'])}", targets=(r["paraphrase"],), condition=spaced(r["tree"]),
            labels={"sentence": r["sentence"]},
        )
        for r in rows
    ]  # fmt: skip


def short_trees(examples: list[Example], tokenizer: Any) -> list[Example]:
    """Without trees that have more tokens than there are slots to hold them."""
    return [e for e in examples if len(tokenizer(e.condition)["input_ids"]) <= SLOTS]


def _drawn(e2e: Path, name: str) -> list[tuple[str, str]]:
    """Two references of a table, of one short sentence each; more than are needed, since not all can be parsed."""
    draw = random.Random(0)
    found = []
    for example in antefix.read(f"{e2e}::{name}.csv"):
        short = [t for t in example.targets if ". " not in t and len(t.split()) <= LONGEST_WORDS]
        if len(short) >= 2:
            draw.shuffle(short)
            found += list(zip(short[::2], short[1::2], strict=False))
    draw.shuffle(found)
    return found[: 3 * PAIRS[name] // 2]


def spaced(tree: str) -> str:
    return " ".join(tree.replace("(", " ( ").replace(")", " ) ").split())


def filled_in(data: dict[str, list[Example]]) -> dict[str, Any]:
    """The easier control, with units of its own."""
    data = {name: masked(examples) for name, examples in data.items()}
    searches = {
        f"masked_search_{arm}_{rate:g}": Unit(partial(one, data, arm, rate, 0, is_final=False), 100.0)
        for arm, rates in MASKED_RATES.items()
        for rate in rates
    }
    found = finish(RESULTS / "units", searches)
    finals = {
        f"masked_final_{arm}_{rate:g}": Unit(partial(one, data, arm, rate, 0, is_final=True), FINAL_SECONDS)
        for arm, rates in MASKED_RATES.items()
        for rate in sorted(rates, key=lambda rate, arm=arm: found[f"masked_search_{arm}_{rate:g}"]["dev_loss"])[:2]
    }
    finals["masked_base"] = Unit(partial(as_it_is, data["testset_w_refs"]), 20.0)
    done = finish(RESULTS / "units", finals)
    summary = {"base, without trees": {key: round(value, 4) for key, value in done.pop("masked_base")["test"].items()}}
    for arm in MASKED_RATES:
        units = sorted((unit for unit in done.values() if unit["arm"] == arm), key=lambda unit: unit["dev_loss"])
        figures = {"dev_loss": units[0]["dev_loss"], **units[0]["test"]}
        figures |= {
            f"{name}_with_another_tree": units[0]["with_another_tree"][name] for name in JUDGED_WITH_ANOTHER_TREE
        }
        rounded = {key: round(value, 4) for key, value in figures.items()}
        tried = {f"{unit['learning_rate']:g}": round(unit["dev_loss"], 4) for unit in units}
        summary[arm] = {"dev_loss_of_rates": tried, **rounded}
    return summary


def masked(examples: list[Example]) -> list[Example]:
    """The source is the target, spans of about a third of its words masked, and its tree."""
    draw, made = random.Random(0), []
    for example in examples:
        words, left = example.targets[0].split(), []
        while words:
            left += words[:1] if draw.random() > SPAN_BEGINS else [MASK]
            words = words[1:] if left[-1] != MASK else words[draw.randint(1, 3) :]
        if MASK not in left:
            left[draw.randrange(len(left))] = MASK
        text = " ".join(left)
        made.append(replace(example, source=f"{text} {example.condition}", labels={"sentence": text}))
    return made


def as_it_is(test: list[Example]) -> dict[str, Any]:
    """What the base fills in, without trees."""
    base = antefix.load_base(str(MODEL), device="auto")
    return {"test": judged(test, written(base, [replace(e, source=e.labels["sentence"]) for e in test]))}


def one(data: dict[str, list[Example]], arm: str, rate: float, seed: int, *, is_final: bool) -> dict[str, Any]:
    """Train; the dev loss, and at the end what is written for the test pairs."""
    base = antefix.load_base(str(MODEL), device="auto")
    train, dev, test = data.values()
    epochs = EPOCHS if is_final else EPOCHS / 4
    training = TrainingRecipe(epochs=epochs, learning_rate=rate, seed=seed, evaluations=4, tokens_per_batch=4096)
    made = {"arm": arm, "learning_rate": rate, "seed": seed}
    slots = {} if arm == FULL else {"num_virtual_tokens": SLOTS}
    prefix = antefix.train(base, train, dev=dev, method=arm, training=training, **slots)
    found = {**made, "dev_loss": kept_dev_loss(prefix), "stored_values": prefix.num_values}
    if is_final:
        with attached(base.model, prefix):
            found["texts"] = written(base, test)
            others = written(base, with_another_tree(test))
        found["test"], found["with_another_tree"] = judged(test, found["texts"]), judged(test, others)
    return found


def with_another_tree(test: Sequence[Example]) -> list[Example]:
    """Every pair with the tree of the next one."""
    turned = [*test[1:], test[0]]
    return [
        replace(e, source=f"{e.labels['sentence']} {other.condition}", condition=other.condition)
        for e, other in zip(test, turned, strict=True)
    ]


def written(base: Base, test: Sequence[Example]) -> list[str]:
    return antefix.generate(base, test, decoding=antefix.Decoding(num_beams=4, max_new_tokens=60))


def judged(test: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """BLEU against the paraphrase, and how its tree is met."""
    wanted, found = parsed([e.targets[0] for e in test]), parsed(texts)
    both = [(w, f) for w, f in zip(wanted, found, strict=True) if w and f]
    return {
        "bleu": score([e.targets for e in test], list(texts), ["bleu"])["bleu"],
        "parsed": len(both) / len(test),
        "pairs": len(test),
        "template_match": sum(w.cut(2) == f.cut(2) for w, f in both) / len(test),
        "tree_edit_distance": statistics.mean(edit_distance(w, f) for w, f in both) if both else math.nan,
        "copies_of_the_sentence": statistics.mean(
            e.labels["sentence"] == t.strip() for e, t in zip(test, texts, strict=True)
        ),
    }


def floors(train: Sequence[Example], test: Sequence[Example]) -> dict[str, Any]:
    """What the sentences to be paraphrased get, and how often the commonest tree of training is the right one."""
    trees = [str(tree.cut(2)) for tree in parsed([e.targets[0] for e in train]) if tree]
    (commonest, _), *_ = Counter(trees).most_common(1)
    wanted = [str(tree.cut(2)) for tree in parsed([e.targets[0] for e in test]) if tree]
    return {
        "sentences": judged(test, [e.labels["sentence"] for e in test]),
        "commonest_tree": {"tree": commonest, "template_match": wanted.count(commonest) / len(test)},
        "training_pairs": len(train),
    }


def summed(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of every arm the figures of its seeds."""
    summary: dict[str, Any] = {k: found["floor"][k] for k in ("sentences", "commonest_tree", "training_pairs")}
    for arm in RATES:
        units = [found[f"final_{arm}_seed_{seed}"] for seed in SEEDS]
        summary[arm] = {"dev_loss": [round(u["dev_loss"], 4) for u in units]}
        summary[arm] |= {name: [round(u["test"][name], 4) for u in units] for name in units[0]["test"]}
        for name in JUDGED_WITH_ANOTHER_TREE:
            summary[arm][f"{name}_with_another_tree"] = [round(u["with_another_tree"][name], 4) for u in units]
    return summary


if __name__ == "__main__":
    main()
