"""A whole run: from a recipe, or from Python, to a kept prefix."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from antefix.base import Base
from antefix.data import split_examples
from antefix.data.example import Example, Table
from antefix.data.linearise import TextFormat
from antefix.decoding import Decoding
from antefix.digest import digest
from antefix.errors import TrainingError
from antefix.generation import generate_each
from antefix.labels import label_each
from antefix.metrics import load, score
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.processes import failing_together, is_main, rejoined, shared
from antefix.tasks import TaskName
from antefix.training.black_box import GENERATIONS_FILE, search_loop
from antefix.training.checkpoint import CHECKPOINT_FILE
from antefix.training.journal import Journal
from antefix.training.learner import Outcome
from antefix.training.loop import StepReport, train_loop
from antefix.training.prepared import Prepared, prepare
from antefix.training.recipe import Recipe, TrainingRecipe

_MOST_FIELDS = 100
"""A card names: with more, what comes next may well have others."""

Watch = Callable[[StepReport], None]


def train(
    base: Base,
    examples: Sequence[Example],
    *,
    method: str = "prefix_tuning",
    task: TaskName = "text_generation",
    words: Mapping[str, str] | None = None,
    dev: Sequence[Example] | None = None,
    text_format: TextFormat | None = None,
    decoding: Decoding | None = None,
    training: TrainingRecipe | None = None,
    run_folder: str | Path | None = None,
    watch: Watch = lambda report: None,
    data_name: str = "",
    **config: Any,
) -> Prefix:
    """Train a prefix on examples; further keywords are the method's choices (`num_virtual_tokens=10`).

    words: of `classification`, a word of the base for every label, in the place of a learned head. dev: None draws a
    tenth of the sources. run_folder: checkpoints go there, and a run that was interrupted goes
    on. Raises RecipeError for choices the method does not know, DataError, PrefixError and TrainingError.
    """
    training = training or TrainingRecipe()
    if dev is None:
        examples, dev = split_examples(examples, 0.1, training.seed)
    prepared = prepare(
        base, examples, dev, method=method, config=config, text_format=text_format, decoding=decoding,
        training=training, data_name=data_name, task=task, words=words,
    )  # fmt: skip
    return run(prepared, None if run_folder is None else Path(run_folder), watch)


def run(
    prepared: Prepared,
    run_folder: Path | None = None,
    watch: Watch = lambda report: None,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    tags: tuple[str, ...] = (),
    licence: str | None = None,
    notes: str = "",
) -> Prefix:
    """Train what was prepared, from the run's checkpoint if it has one; `train_loop` says what the arguments are."""
    metric = prepared.training.dev_metric
    if metric != "loss" and not prepared.dev_set.num_pairs:
        raise TrainingError(
            f"training.dev_metric = '{metric}' scores the dev set, and there is none: give data.dev, or leave it out"
        )
    arguments: dict[str, Any] = {
        "digest": prepared.digest,
        "run_folder": run_folder,
        "dev_metric": None if metric == "loss" else _score_of(prepared),
        "watch": watch,
        "stop_requested": stop_requested,
    }
    sets = prepared.train_set, prepared.dev_set if prepared.dev_set.num_pairs else None
    if prepared.module.is_searched:
        outcome = search_loop(prepared.base.model, prepared.module, *sets, prepared.training, **arguments)
    else:
        rate = prepared.learning_rate
        outcome = train_loop(
            prepared.base.model, prepared.module, *sets, prepared.training, learning_rate=rate, **arguments
        )
    return Prefix(outcome.tensors, card_of(prepared, outcome, tags, licence, notes))


def run_recipe(
    recipe: Recipe,
    prepared: Prepared,
    watch: Watch = lambda report: None,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    overwrite: bool = False,
) -> Prefix:
    """Train a recipe's prefix and keep it in its bank; the run's folder holds a log and a plot.

    An interrupted run goes on from its checkpoint, which is removed once the prefix is kept. Of several processes the
    main one keeps it, and all return when it is kept.
    """
    with failing_together():
        check_name_is_free(recipe, overwrite)
    journal = Journal(recipe.run_folder)

    def note(report: StepReport) -> None:
        journal.note(report)
        watch(report)

    prefix = run(
        prepared, recipe.run_folder, note, stop_requested=stop_requested,
        tags=recipe.tags, licence=recipe.licence, notes=recipe.notes,
    )  # fmt: skip
    with failing_together():
        if is_main():
            prefix.save(recipe.prefix_folder, overwrite=overwrite)
            forget(recipe.run_folder)
            journal.plot(recipe.name)
    return prefix


def check_name_is_free(recipe: Recipe, overwrite: bool) -> None:
    """A kept prefix is never overwritten unasked. Raises TrainingError."""
    if recipe.prefix_folder.exists() and not overwrite:
        raise TrainingError(
            f"{recipe.prefix_folder} exists: give the recipe another name, or say --overwrite to train it anew"
        )


def is_unfinished(run_folder: Path) -> bool:
    """Whether a run left a checkpoint to go on from."""
    return any((run_folder / name).exists() for name in (CHECKPOINT_FILE, GENERATIONS_FILE))


def forget(run_folder: Path) -> None:
    """Remove what an unfinished run left to go on from."""
    for name in (CHECKPOINT_FILE, GENERATIONS_FILE):
        (run_folder / name).unlink(missing_ok=True)


def data_hash(examples: Sequence[Example]) -> str:
    """Sixteen hexadecimal digits of what is learned from, or answered, in order."""
    return digest(*(repr((e.asked, e.targets)) for e in examples))


def _score_of(prepared: Prepared) -> Callable[[], dict[str, float]]:
    training, name = prepared.training, prepared.training.dev_metric
    examples = prepared.task.scored_in_training(
        prepared.train_examples, prepared.dev_examples, training.dev_metric_sources, training.seed
    )

    def measure() -> dict[str, float]:
        mine, texts = shared(examples), []
        with failing_together():
            if mine:
                found = dict(answer_each(prepared, mine))
                texts = [found[n] for n in range(len(mine))]
        return {f"dev_{name}": score([e.targets for e in examples], rejoined(texts), [name])[name]}

    return measure


def answer_each(prepared: Prepared, examples: Sequence[Example]) -> Iterator[tuple[int, str]]:
    """`(index, text)` of what is written for these sources, their labels or choices, with what is attached."""
    if prepared.task.writes_text:
        return generate_each(prepared.base, examples, text_format=prepared.text_format, decoding=prepared.decoding)
    return label_each(prepared.base, examples, text_format=prepared.text_format, task=prepared.task)


def _metric_versions(prepared: Prepared) -> dict[str, Any]:
    name = prepared.training.dev_metric
    if name == "loss":
        return {}  # a loss has no version
    return {"versions": {f"dev_{name}": load(name).VERSION}}


def _fields(examples: Sequence[Example]) -> list[str]:
    """Of the tables that were learned from, in the order they came up; none where there is no end of them."""
    tables = (e.source for e in examples if isinstance(e.source, Table))
    found = list(dict.fromkeys(field for table in tables for field, _ in table.fields))
    return found if len(found) <= _MOST_FIELDS else []


def card_of(prepared: Prepared, outcome: Outcome, tags: tuple[str, ...], licence: str | None, notes: str) -> Card:
    """What a prefix says about itself after its training."""
    base, training, progress = prepared.base, prepared.training, outcome.progress
    return Card(
        method=prepared.method,
        config=prepared.config.model_dump(mode="json"),
        positions=prepared.module.positions,
        base=BaseRecord(name=base.name, revision=base.revision, fingerprint=base.fingerprint),
        task=prepared.task,
        text_format=prepared.text_format.to_dict(),
        # Whole, so that a later default does not change what a kept prefix writes.
        decoding=prepared.decoding.model_dump(mode="json") if prepared.task.writes_text else {},
        training={
            "data": prepared.data_name,
            "data_hash": data_hash(prepared.train_examples),
            "fields": _fields(prepared.train_examples),
            "sources": len(prepared.train_set.of_epoch(0)),
            "pairs": prepared.train_set.pairs_of_epoch,
            "truncated_sources": prepared.train_set.truncated_sources,
            "truncated_targets": prepared.train_set.truncated_targets,
            "truncated_dev_sources": prepared.dev_set.truncated_sources,
            "truncated_dev_targets": prepared.dev_set.truncated_targets,
            "dtype": base.precision,
            "trained": sum(p.numel() for p in prepared.module.parameters() if p.requires_grad),
            "steps": progress.step,
            "kept_step": progress.best_step,
            "stopped_early": progress.stopped_early,
            "seconds": round(progress.seconds, 1),
            "batch_form": outcome.form,
            **({} if prepared.module.is_searched else {"learning_rate": prepared.learning_rate}),
            **training.model_dump(mode="json", exclude={"learning_rate", "trackers", "checkpoint_seconds"}),
            "versions": {name: version(name) for name in ("antefix", "torch", "transformers")},
            "python": platform.python_version(),
        },
        parents=() if prepared.config.parent is None else (Path(prepared.config.parent).name,),
        scores={"dev": progress.dev_scores, **_metric_versions(prepared)},
        tags=tags,
        licence=licence,
        notes=notes,
    )
