"""The whole chain on the embedded base in minutes: measure the bare model, train a prefix, measure again.

`tables.jsonl` was written for this project, text by text: walking routes, results of local sport, plants of a
nursery. It is under the project's licence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from antefix.attach import attached
from antefix.base import Base
from antefix.data import Example, read
from antefix.data.linearise import TextFormat
from antefix.decoding import Decoding
from antefix.generation import generate_each
from antefix.metrics import score
from antefix.pace import Pace
from antefix.prefix import Prefix
from antefix.training.journal import Journal
from antefix.training.loop import StepReport
from antefix.training.prepared import prepare
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import run

TABLES = Path(__file__).with_name("tables.jsonl")
METRICS = ("bleu", "rouge_l_13a")
INSTRUCTION = "Write one or two natural sentences that say all of these facts and nothing else.\n"
BEFORE = TextFormat(linearise="table", instruction=INSTRUCTION, chat=True)
AFTER = TextFormat(linearise="table")
DECODING = Decoding(num_beams=4, max_new_tokens=60)
CONFIG = {"num_virtual_tokens": 10, "initial_text": "Describe these facts in one or two natural sentences:"}
TRAINING = TrainingRecipe(
    epochs=2, pairs_per_step=12, learning_rate=0.03, evaluations=4, targets_per_row=3, checkpoint_seconds=15
)


@dataclass(frozen=True)
class Measured:
    """Texts for the test tables and their scores."""

    texts: list[str]
    scores: dict[str, float]


def tables(split: str) -> list[Example]:
    """The demo's own tables: `train`, `dev` or `test`."""
    return read(TABLES, split=split)


def key_of_texts(base: Base, prefix: Prefix | None) -> str:
    """Tells texts that were written this way from any others."""
    parts = (base.fingerprint, _format(prefix).model_dump_json(), DECODING.model_dump_json())
    return "\n".join([*parts, "" if prefix is None else prefix.card.model_dump_json()])


def measure(
    base: Base, prefix: Prefix | None, test: Sequence[Example], watch: Callable[[Pace], None] = lambda pace: None
) -> Measured:
    """Write a text for every test table, with the prefix or with the bare base (None), and score them."""
    texts = [""] * len(test)
    pace = Pace(len(test))
    with nullcontext() if prefix is None else attached(base.model, prefix):
        for index, text in generate_each(base, test, text_format=_format(prefix), decoding=DECODING, batch_size=12):
            texts[index] = text
            pace.one_done()
            watch(pace)
    return Measured(texts, score([e.targets for e in test], texts, METRICS))


def _format(prefix: Prefix | None) -> TextFormat:
    return BEFORE if prefix is None else AFTER


class Training:
    """The demo's training run; goes on where it was interrupted."""

    def __init__(self, base: Base, run_folder: Path) -> None:
        self._folder = run_folder
        self._prepared = prepare(
            base, tables("train"), tables("dev"), method="prefix_tuning", config=dict(CONFIG), text_format=AFTER,
            decoding=DECODING, training=TRAINING, data_name="antefix demo tables",
        )  # fmt: skip
        self.num_steps = self._prepared.num_steps
        self.num_pairs = self._prepared.train_set.num_pairs

    def __call__(self, watch: Callable[[StepReport], None], stop_requested: Callable[[], bool]) -> Prefix:
        """Train; leaves a log and a curve in the run's folder."""
        journal = Journal(self._folder)

        def note(report: StepReport) -> None:
            journal.note(report)
            watch(report)

        prefix = run(self._prepared, self._folder, note, stop_requested=stop_requested, licence="Apache-2.0")
        journal.plot("antefix demo")
        return prefix
