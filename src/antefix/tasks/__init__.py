"""What is learned from examples: to write texts, to label them, to choose one, or to tell true triples from false.

Knows examples and tokenizers, nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from antefix.data.example import Example
from antefix.tasks.label import LabelTask
from antefix.tasks.ranking import RankingTask

__all__ = ["METRICS_OF", "LabelTask", "RankingTask", "Task", "TaskName", "task_of"]

TaskName = Literal["text_generation", "classification", "tagging", "ranking", "triples"]
METRICS_OF: dict[TaskName, tuple[str, ...]] = {
    "text_generation": ("bleu", "accuracy", "frame_f1"),
    "classification": ("accuracy",),
    "tagging": ("span_f1", "word_accuracy"),
    "ranking": ("accuracy",),
    "triples": ("accuracy",),
}
"""Scores that can choose the best step, beside the dev loss."""
Task = LabelTask | RankingTask


def task_of(name: TaskName, examples: Sequence[Example], length_norm: float = 1.0) -> Task | None:
    """The task of this name for these examples; None: to write texts. Raises DataError as the tasks do."""
    if name == "text_generation":
        return None
    return RankingTask(length_norm=length_norm) if name == "ranking" else LabelTask.of(name, examples)
