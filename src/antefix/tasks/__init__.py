"""What is learned from examples: to write texts, to label them, to choose one, or to tell true triples from false.

Knows examples and tokenizers, nothing of models.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from antefix.tasks.classification import ClassificationTask
from antefix.tasks.label import LabelTask
from antefix.tasks.ranking import RankingTask
from antefix.tasks.tagging import TaggingTask
from antefix.tasks.task import Task, TaskName
from antefix.tasks.text import TextTask
from antefix.tasks.triples import TriplesTask

__all__ = ["TASKS", "KeptTask", "LabelTask", "RankingTask", "Task", "TaskName", "TextTask"]

TASKS: dict[TaskName, type[Task]] = {
    "text_generation": TextTask,
    "classification": ClassificationTask,
    "tagging": TaggingTask,
    "ranking": RankingTask,
    "triples": TriplesTask,
}
KeptTask = Annotated[
    TextTask | ClassificationTask | TaggingTask | RankingTask | TriplesTask, Field(discriminator="name")
]
"""A task as cards have it."""
