"""A whole run: from a recipe, or from Python, to a kept prefix."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from antefix.base import Base, load_base, native_precision
from antefix.data import read, sample_pairs, split_examples
from antefix.data.encode import Encoded, Limits, encode
from antefix.data.example import Example
from antefix.data.linearise import TextFormat, default_format
from antefix.decoding import Decoding
from antefix.errors import PrefixError, TrainingError
from antefix.generation import default_decoding, generate, require_generator
from antefix.labels import label
from antefix.methods import method_class
from antefix.methods.base import MethodConfig, MethodModule
from antefix.metrics import load, score
from antefix.parts.label_head import LabelHead
from antefix.parts.word_head import Head, WordHead
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.processes import failing_together, is_main, on_processor, rejoined, shared
from antefix.settings import validated
from antefix.sites import find_sites
from antefix.tasks import LabelTask, Task, TaskName, task_of
from antefix.training.checkpoint import CHECKPOINT_FILE
from antefix.training.journal import Journal
from antefix.training.loop import Outcome, StepReport, planned_steps, train_loop
from antefix.training.recipe import Recipe, TrainingRecipe, checked_config

Watch = Callable[[StepReport], None]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything that can be wrong with it was checked."""

    base: Base
    module: MethodModule
    config: MethodConfig
    text_format: TextFormat
    decoding: Decoding
    training: TrainingRecipe
    train_set: Encoded
    dev_set: Encoded
    train_examples: Sequence[Example]
    dev_examples: Sequence[Example]
    learning_rate: float
    method: str
    data_name: str
    task: Task | None
    """None: to write texts."""

    @property
    def num_steps(self) -> int:
        return planned_steps(self.train_set, self.training)

    @property
    def digest(self) -> str:
        """Tells this run from any other: what is trained on, on which base, how, and how it is watched."""
        parts = (
            self.base.fingerprint, self.base.precision, self.method, repr(self.task), repr(self.config),
            repr(self.learning_rate),
            repr(self.text_format), repr(self.decoding), repr(self.train_set), repr(self.dev_set),
            self.training.model_dump_json(exclude={"checkpoint_seconds", "trackers"}),
        )  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


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


def recipe_examples(recipe: Recipe) -> tuple[Sequence[Example], Sequence[Example]]:
    """Read the training and the dev set, and draw from them as a recipe says."""
    data = recipe.data
    train_examples = read(data.train, format=data.format, **data.reader)
    if data.dev is None:
        train_examples, dev_examples = split_examples(train_examples, data.dev_fraction, recipe.training.seed)
    else:
        dev_examples = read(data.dev, format=data.format, **data.reader)
    if data.pairs is not None:
        train_examples = sample_pairs(train_examples, data.pairs, recipe.training.seed)
    if data.dev_pairs is not None and data.dev_pairs < sum(len(e.targets) for e in dev_examples):
        dev_examples = sample_pairs(dev_examples, data.dev_pairs, recipe.training.seed)
    return train_examples, dev_examples


def recipe_base(recipe: Recipe) -> Base:
    """Load the base a recipe names."""
    dtype = recipe.dtype
    if dtype == "native":  # of the device that Accelerate will train on
        dtype = native_precision("cpu" if on_processor() else "auto")
    return load_base(recipe.base, dtype=dtype, revision=recipe.base_revision)


def prepare_recipe(
    recipe: Recipe,
    examples: tuple[Sequence[Example], Sequence[Example]] | None = None,
    base: Base | None = None,
) -> Prepared:
    """Load the base, read the data and check everything a recipe says.

    examples, base: what `recipe_examples` and `recipe_base` gave for a recipe that says the same of them.
    """
    data = recipe.data
    train_examples, dev_examples = examples or recipe_examples(recipe)
    text = default_format([e.source for e in train_examples]).to_dict() | data.text
    if data.max_source_tokens is not None:
        text["max_source_tokens"] = data.max_source_tokens
    decoding = default_decoding(train_examples)
    if recipe.decoding is not None:  # what it does not say stays the default for these sources
        said = recipe.decoding.model_dump(include=recipe.decoding.model_fields_set)
        decoding = validated(Decoding, decoding.model_dump() | said, "decoding.")
    return prepare(
        base or recipe_base(recipe), train_examples, dev_examples, method=recipe.method, config=recipe.config,
        text_format=TextFormat.from_dict(text), decoding=decoding, training=recipe.training,
        data_name=data.train, max_target_tokens=data.max_target_tokens, task=recipe.task, words=recipe.words,
    )  # fmt: skip


def prepare(
    base: Base,
    train_examples: Sequence[Example],
    dev_examples: Sequence[Example],
    *,
    method: str,
    config: dict[str, Any],
    text_format: TextFormat | None,
    decoding: Decoding | None,
    training: TrainingRecipe,
    data_name: str = "",
    max_target_tokens: int | None = None,
    task: TaskName = "text_generation",
    words: Mapping[str, str] | None = None,
) -> Prepared:
    """Build the prefix and encode the data.

    max_target_tokens: longer targets are cut, and counted; None: one that does not fit is an error.
    """
    made = task_of(task, train_examples, training.ranking.length_norm)
    if words:
        if not isinstance(made, LabelTask):
            raise TrainingError("words for labels are for classification: set task = 'classification'")
        made = made.with_words(words, base.tokenizer)
    if not isinstance(made, LabelTask):
        require_generator(base)
    elif base.model.config.is_encoder_decoder:
        raise TrainingError(f"{task} needs an encoder or a decoder, '{base.name}' is both: take BERT or a causal model")
    if base.model.config.is_encoder_decoder and base.model.config.decoder_start_token_id is None:
        raise TrainingError(f"the base '{base.name}' has no decoder_start_token_id: set it in its config.json")
    found = method_class(method)
    checked = checked_config(method, config)
    text_format = text_format or default_format([e.source for e in train_examples])
    torch.manual_seed(training.seed)
    parent = None if checked.parent is None else Prefix.load(checked.parent)
    if parent is not None:
        parent.module(base.model)  # refuses the prefix of another base
    module = found.build(base, checked)
    if parent is not None and parent.card.positions != module.positions:
        raise PrefixError(
            f"{checked.parent} has {parent.card.positions} positions, this recipe {module.positions}: "
            f"set config.positions = '{parent.card.positions}'"
        )
    if isinstance(made, LabelTask) and module.num_inserted_tokens > 0:
        raise TrainingError(f"{method} stands before what is written, and {task} writes nothing: take prefix_tuning")
    if isinstance(made, LabelTask):
        module.head = _head_of(base, made)
    shift = module.num_virtual_tokens if module.positions == "shifted" else 0
    context = None if base.context_length is None else base.context_length - shift
    fits = Limits(
        context=context,
        target=max_target_tokens,
        condition=module.condition_length,
        inserted=module.num_inserted_tokens,
    )
    encode_all = encode if made is None else made.encode
    for_encoder = not find_sites(base.model).is_causal
    train_set, dev_set = (
        encode_all(e, text_format, base.tokenizer, fits, for_encoder=for_encoder)
        for e in (train_examples, dev_examples)
    )
    if train_set.num_pairs == 0:
        raise TrainingError(
            f"{data_name or 'the training data'}: no example has a target; name it with data.reader.target_column"
        )
    return Prepared(
        base=base,
        module=module,
        config=checked,
        text_format=text_format,
        decoding=decoding or default_decoding(train_examples),
        training=training,
        train_set=train_set,
        dev_set=dev_set,
        train_examples=train_examples,
        dev_examples=dev_examples,
        learning_rate=training.learning_rate or found.default_learning_rate(checked),
        method=method,
        data_name=data_name,
        task=made,
    )


def _head_of(base: Base, task: LabelTask) -> Head:
    if task.word_ids:
        return WordHead(base.model, task.word_ids)
    return LabelHead(int(base.model.config.get_text_config().hidden_size), len(task.labels))


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
    outcome = train_loop(
        prepared.base.model,
        prepared.module,
        prepared.train_set,
        prepared.dev_set if prepared.dev_set.num_pairs else None,
        prepared.training,
        learning_rate=prepared.learning_rate,
        digest=prepared.digest,
        run_folder=run_folder,
        dev_metric=None if prepared.training.dev_metric == "loss" else _score_of(prepared),
        watch=watch,
        stop_requested=stop_requested,
    )
    return Prefix(outcome.tensors, _card(prepared, outcome, tags, licence, notes))


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
            (recipe.run_folder / CHECKPOINT_FILE).unlink(missing_ok=True)
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
    return (run_folder / CHECKPOINT_FILE).exists()


def data_hash(examples: Sequence[Example]) -> str:
    """Sixteen hexadecimal digits of sources and targets, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.source, example.targets)).encode())
    return digest.hexdigest()[:16]


def _score_of(prepared: Prepared) -> Callable[[], dict[str, float]]:
    examples = [e for e in prepared.dev_examples if e.targets][: prepared.training.dev_metric_sources]
    name = prepared.training.dev_metric

    def measure() -> dict[str, float]:
        mine, texts = shared(examples), []
        with failing_together():
            if mine:
                texts = _answers(prepared, mine)
        return {f"dev_{name}": score([e.targets for e in examples], rejoined(texts), [name])[name]}

    return measure


def _answers(prepared: Prepared, examples: Sequence[Example]) -> list[str]:
    """What is written for these sources, or their labels."""
    if prepared.task is None:
        return generate(prepared.base, examples, text_format=prepared.text_format, decoding=prepared.decoding)
    return label(prepared.base, examples, text_format=prepared.text_format, task=prepared.task)


def _metric_versions(prepared: Prepared) -> dict[str, Any]:
    name = prepared.training.dev_metric
    if name == "loss":
        return {}  # a loss has no version
    return {"versions": {f"dev_{name}": load(name).VERSION}}


def _card(prepared: Prepared, outcome: Outcome, tags: tuple[str, ...], licence: str | None, notes: str) -> Card:
    base, training, progress = prepared.base, prepared.training, outcome.progress
    return Card(
        method=prepared.method,
        config=prepared.config.model_dump(mode="json"),
        positions=prepared.module.positions,
        base=BaseRecord(name=base.name, revision=base.revision, fingerprint=base.fingerprint),
        task=prepared.task,
        text_format=prepared.text_format.to_dict(),
        decoding=prepared.decoding.model_dump(mode="json", exclude_defaults=True),
        training={
            "data": prepared.data_name,
            "data_hash": data_hash(prepared.train_examples),
            "sources": len(prepared.train_set.examples),
            "pairs": prepared.train_set.num_pairs,
            "truncated_sources": prepared.train_set.truncated_sources,
            "truncated_targets": prepared.train_set.truncated_targets,
            "truncated_dev_sources": prepared.dev_set.truncated_sources,
            "truncated_dev_targets": prepared.dev_set.truncated_targets,
            "dtype": base.precision,
            "steps": progress.step,
            "kept_step": progress.best_step,
            "stopped_early": progress.stopped_early,
            "seconds": round(progress.seconds, 1),
            "batch_form": outcome.form,
            "learning_rate": prepared.learning_rate,
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
