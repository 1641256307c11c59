"""The E2E challenge on 1,000 training pairs: a prefix against the bare base with its chat template.

    python experiments/e2e_1000.py path/to/e2e-dataset.zip

Runs Antefix's own commands in `experiments/work/e2e_1000` and writes figures, never texts, to
`results/e2e_1000/`. Every finished piece is kept: the same command goes on after an interruption. The bare base
gets the best of three written instructions, chosen by BLEU on the first dev sources. It decodes greedily, which is
five times faster; what beams of 5 would change is measured on the same dev sources.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import antefix

HERE = Path(__file__).resolve().parent
WORK = HERE / "work" / "e2e_1000"
RESULTS = HERE.parent / "results" / "e2e_1000"
RECIPE = HERE.parent / "recipes" / "e2e_1000.toml"
COMMIT_FILE = WORK / "commit.txt"
"""Of Antefix when the work was begun: the code that trained."""
BASE = "smollm2-135m"
DEV_SOURCES = 32
INSTRUCTIONS = (
    "Describe this restaurant in one or two sentences, using all of these facts and nothing else:\n",
    "Write one fluent English sentence for a restaurant guide that says exactly the following.\n",
    "Turn the data into a short text. Mention every value once and do not add anything.\nData: ",
)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    data = Path(sys.argv[1]).resolve()
    train, dev, test = (f"{data}::{name}.csv" for name in ("trainset", "devset", "testset_w_refs"))
    WORK.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)

    if not COMMIT_FILE.exists():
        COMMIT_FILE.write_text(commit(), encoding="utf-8")
    prefix = WORK / "bank" / "e2e_1000"
    if not prefix.is_dir():
        command("train", str(RECIPE), f"data.train={train}", f"data.dev={dev}")
    keep("prefix", prefix_texts(prefix, test), test)
    keep_card(prefix)

    dev_bleu = {
        instruction: bare_dev_bleu(f"bare_dev_{number}.jsonl", instruction, dev)
        for number, instruction in enumerate(INSTRUCTIONS)
    }
    best = max(dev_bleu, key=dev_bleu.__getitem__)
    with_beams = bare_dev_bleu("bare_dev_beams.jsonl", best, dev, num_beams=5)
    tried = {"dev_sources": DEV_SOURCES, "dev_bleu": dev_bleu, "best": best, "best_with_beams_of_5": with_beams}
    write("instructions", tried)
    keep("bare", bare_texts("bare_test.jsonl", best, test), test)


def prefix_texts(prefix: Path, test: str) -> Path:
    """Beam 5, as the prefix's card says."""
    texts = WORK / "prefix_test.jsonl"
    if not texts.exists():
        command("generate", "--prefix", str(prefix), "--input", test, "--output", str(texts))
    return texts


def bare_dev_bleu(name: str, instruction: str, dev: str, num_beams: int = 1) -> float:
    texts = bare_texts(name, instruction, dev, num_beams, DEV_SOURCES)
    references = WORK / "dev_references.jsonl"
    rows = (json.dumps({"references": e.targets}) + "\n" for e in antefix.read(dev)[:DEV_SOURCES])
    references.write_text("".join(rows), encoding="utf-8")
    found = command_json("eval", "--references", str(references), "--hypotheses", str(texts), "--metrics", "bleu")
    return float(found["scores"]["bleu"])


def bare_texts(name: str, instruction: str, data: str, num_beams: int = 1, limit: int | None = None) -> Path:
    """The bare base with its chat template."""
    texts = WORK / name
    if not texts.exists():
        command(
            "generate", "--base", BASE, "--input", data, "--output", str(texts), "--set", f"num_beams={num_beams}",
            "--text", "chat=true", "--text", f"instruction={json.dumps(instruction)}",
            *(() if limit is None else ("--limit", str(limit))),
        )  # fmt: skip
    return texts


def keep(name: str, texts: Path, references: str) -> None:
    """Score all five metrics and the fields, and keep the figures."""
    found = command_json("eval", "--references", references, "--hypotheses", str(texts), "--fields")
    found["fields"].pop("texts")
    found |= {"references": references.rpartition("/")[2], "hypotheses": texts.name}
    about = {"commit": COMMIT_FILE.read_text(encoding="utf-8"), "python": platform.python_version()}
    write(name, found | about | {"machine": platform.machine()})


def keep_card(prefix: Path) -> None:
    card = json.loads((prefix / "card.json").read_text(encoding="utf-8"))
    card["training"]["data"] = "e2e-dataset.zip::trainset.csv"
    write("card", card)
    shutil.copy(WORK / "runs" / "e2e_1000" / "curve.png", RESULTS / "curve.png")


def write(name: str, content: dict[str, Any]) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def commit() -> str:
    """Of Antefix."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def command(*words: str) -> None:
    subprocess.run(["antefix", *words], cwd=WORK, check=True)


def command_json(*words: str) -> dict[str, Any]:
    done = subprocess.run(["antefix", *words, "--json"], cwd=WORK, check=True, stdout=subprocess.PIPE, text=True)
    content: dict[str, Any] = json.loads(done.stdout)
    return content


if __name__ == "__main__":
    main()
