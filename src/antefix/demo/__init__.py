"""The whole chain on the embedded base in minutes: measure the bare model, train a prefix, measure again.

`tables.jsonl` was written for this project, text by text: walking routes, results of local sport, plants of a
nursery. It is under the project's licence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from antefix.attach import attached
from antefix.base import Base
from antefix.data import Example, read
from antefix.data.linearise import TextFormat
from antefix.generation import Decoding, generate_each
from antefix.metrics import score
from antefix.pace import Pace
from antefix.prefix import Prefix
from antefix.training.journal import Journal
from antefix.training.loop import StepReport
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import prepare, run

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


def measure(
    base: Base, test: Sequence[Example], text_format: TextFormat, watch: Callable[[Pace], None] = lambda pace: None
) -> Measured:
    """Write a text for every test table with whatever is attached to the base, and score them."""
    texts = [""] * len(test)
    pace = Pace(len(test))
    for index, text in generate_each(base, test, text_format=text_format, decoding=DECODING, batch_size=12):
        texts[index] = text
        pace.one_done()
        watch(pace)
    return Measured(texts, score([e.targets for e in test], texts, METRICS))


def measure_with(
    base: Base, prefix: Prefix, test: Sequence[Example], watch: Callable[[Pace], None] = lambda pace: None
) -> Measured:
    """The same, with the prefix at work."""
    with attached(base.model, prefix):
        return measure(base, test, AFTER, watch)


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
