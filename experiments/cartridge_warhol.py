"""A cartridge of a document beside the document itself in context: loss on held-out questions, and memory.

    python experiments/cartridge_warhol.py path/to/gum_summaries.jsonl.gz

GUM_news_warhol (about 2,200 tokens of SmolLM2-135M). The base studies it: 128 questions and answers to learn from and
32 of another seed, held out. Loss: of the held-out answers, in nats a token, with nothing in context, with the document
in context, and with cartridges of 64, 256 and 1,024 slots before and after training. Writes
`results/cartridge_warhol/`; two hours on two cores.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from antefix.attach import attached
from antefix.attention.hook import routed
from antefix.base import Base
from antefix.data.encode import Encoded, EncodedExample
from antefix.data.plan import all_units
from antefix.methods import method_class
from antefix.methods.cartridge import CartridgeConfig
from antefix.self_study import Conversation, Study
from antefix.training.cartridge import STUDY_FILE, CartridgeRun, study_file, train_cartridge
from antefix.training.recipe import TrainingRecipe

from arms import pairs_losses  # isort: skip
from smollm import smollm  # isort: skip
from units import ROOT, Unit, announce, finish  # isort: skip

RESULTS, WORK = ROOT / "results" / "cartridge_warhol", ROOT / "experiments" / "work" / "cartridge_warhol"
DOCUMENT = "GUM_news_warhol"
SLOTS = (64, 256, 1024)
CONVERSATIONS, HELD_OUT = 128, 32


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    document = written(Path(sys.argv[1]))
    studies = {
        "study": Unit(partial(study, document, "study", 0, CONVERSATIONS), 500.0),
        "held_out": Unit(partial(study, document, "held_out", 1, HELD_OUT), 130.0),
    }
    losses = {"context": Unit(partial(in_context, document), 150.0)}
    losses |= {f"slots_{n}": Unit(partial(cartridge, document, n), 500.0) for n in SLOTS}
    announce(RESULTS / "units", studies | losses)
    finish(RESULTS / "units", studies)
    found = finish(RESULTS / "units", losses)
    summary = {name: {k: v for k, v in unit.items() if k in KEPT} for name, unit in found.items()}
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(found)


KEPT = ("nothing", "document", "before", "after", "document_mib", "mib", "tokens")


def written(source: Path) -> Path:
    """The document as a text file."""
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        row = next(r for r in map(json.loads, lines) if r["id"] == DOCUMENT)
    path = WORK / "document.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(row["document"], encoding="utf-8")
    return path


def run_of(document: Path, slots: int, seed: int, conversations: int) -> CartridgeRun:
    return CartridgeRun(
        document=str(document),
        config=CartridgeConfig(num_virtual_tokens=slots, document=str(document)),
        conversations=conversations,
        study=Study(seed=seed),
        training=TrainingRecipe(epochs=2.0, pairs_per_step=8, evaluations=4),
    )


def study(document: Path, name: str, seed: int, conversations: int) -> dict[str, Any]:
    """Questions and answers into a file; it goes on where it was interrupted."""
    base = smollm()
    made = study_file(base, run_of(document, SLOTS[0], seed, conversations), WORK / name / STUDY_FILE)
    return {"conversations": len(made), "answer_tokens": sum(len(c.answer) for c in made), "precision": base.precision}


def held_out(base: Base, document: Path) -> list[Conversation]:
    return study_file(base, run_of(document, SLOTS[0], 1, HELD_OUT), WORK / "held_out" / STUDY_FILE)


def in_context(document: Path) -> dict[str, Any]:
    """With nothing in context, and with the document."""
    base = smollm()
    ids = base.tokenizer(document.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    some = held_out(base, document)
    one_slot = sum(t.numel() * 4 for t in module_of(base, document, 1).kept_tensors().values()) / 2**20
    with routed(base.model):
        nothing, document_loss = loss(base, some), loss(base, some, ids)
    return {
        "nothing": nothing,
        "document": document_loss,
        "tokens": len(ids),
        "document_mib": one_slot * len(ids),
    }


def cartridge(document: Path, slots: int) -> dict[str, Any]:
    """Before and after training."""
    base = smollm()
    some = held_out(base, document)
    module = module_of(base, document, slots)
    with attached(base.model, module):
        before = loss(base, some)
    folder = WORK / f"slots_{slots}"
    folder.mkdir(parents=True, exist_ok=True)
    study_file(base, run_of(document, SLOTS[0], 0, CONVERSATIONS), WORK / "study" / STUDY_FILE)  # where it is not there
    shutil.copy(WORK / "study" / STUDY_FILE, folder / STUDY_FILE)
    prefix = train_cartridge(base, run_of(document, slots, 0, CONVERSATIONS), folder)
    with attached(base.model, prefix):
        after = loss(base, some)
    return {"slots": slots, "before": before, "after": after, "mib": prefix.num_bytes / 2**20}


def module_of(base: Base, document: Path, slots: int) -> Any:
    """Untrained."""
    return method_class("cartridge").build(base, CartridgeConfig(num_virtual_tokens=slots, document=str(document)))


@torch.no_grad()
def loss(base: Base, conversations: list[Conversation], before: list[int] | None = None) -> float:
    """Nats a token of the answers; before: what stands in front of every question."""
    total = tokens = 0.0
    for c in conversations:
        encoded = Encoded((EncodedExample((*(before or ()), *c.prompt), (c.answer,)),), 0, 0)
        total += sum(float(loss) for loss in pairs_losses(base, encoded, all_units(encoded)))
        tokens += len(c.answer)
    return total / tokens


def plot(found: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    context, units = found["context"], [found[f"slots_{n}"] for n in SLOTS]
    for name, style in (("before", "o--"), ("after", "o-")):
        axes.plot([u["mib"] for u in units], [u[name] for u in units], style, label=f"cartridge, {name} training")
    for u in units:
        axes.annotate(f"{u['slots']} slots", (u["mib"], u["after"]), xytext=(0, -14), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.plot(context["document_mib"], context["document"], "s", color="black", label="the document in context")
    axes.axhline(context["nothing"], color="grey", linewidth=1, label="nothing in context")
    axes.set_xscale("log")
    axes.margins(y=0.12)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("keys and values, MiB")
    axes.set_ylabel("loss of held-out answers, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "loss_and_memory.png", dpi=130)


if __name__ == "__main__":
    main()
