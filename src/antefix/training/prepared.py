"""A run that is ready to start: the base loaded, the data encoded, everything that can be wrong with it checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from antefix.base import Base, load_base
from antefix.data import read, sample_frames, sample_pairs, split_examples
from antefix.data.encode import Encoded
from antefix.data.example import Example
from antefix.data.linearise import TextFormat, default_format
from antefix.decoding import Decoding
from antefix.digest import digest
from antefix.errors import PrefixError, TrainingError
from antefix.generation import default_decoding, require_generator
from antefix.methods import method_class
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.label_head import LabelHead
from antefix.parts.word_head import Head, WordHead
from antefix.prefix import Prefix
from antefix.processes import device
from antefix.settings import validated
from antefix.sites import find_sites
from antefix.tasks import TASKS, LabelTask, Task, TaskName
from antefix.training.black_box import planned_generations
from antefix.training.recipe import Recipe, TrainingRecipe, checked_config
from antefix.training.schedule import planned_steps


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
    task: Task

    @property
    def num_steps(self) -> int:
        if self.module.is_searched:
            return planned_generations(self.module, self.training)
        return planned_steps(self.train_set, self.training)

    @property
    def digest(self) -> str:
        """Tells this run from any other: what is trained on, on which base, how, and how it is watched."""
        parts = (
            self.base.fingerprint, self.base.precision, self.method, self.task.model_dump_json(), repr(self.config),
            repr(self.learning_rate),
            repr(self.text_format), repr(self.decoding), repr(self.train_set), repr(self.dev_set),
            self.training.model_dump_json(exclude={"checkpoint_seconds", "trackers"}),
        )  # fmt: skip
        return digest(*parts)


def recipe_examples(recipe: Recipe) -> tuple[Sequence[Example], Sequence[Example]]:
    """Read the training and the dev set, and draw from them as a recipe says."""
    data = recipe.data
    train_examples = read(data.train, format=data.format, **data.reader)
    if data.dev is None:
        train_examples, dev_examples = split_examples(train_examples, data.dev_fraction, recipe.training.seed)
    else:
        dev_examples = read(data.dev, format=data.format, **data.reader)
    if data.samples_per_label is not None:
        train_examples = sample_frames(train_examples, data.samples_per_label, recipe.training.seed)
    if data.pairs is not None:
        train_examples = sample_pairs(train_examples, data.pairs, recipe.training.seed)
    if data.dev_pairs is not None and data.dev_pairs < sum(len(e.targets) for e in dev_examples):
        dev_examples = sample_pairs(dev_examples, data.dev_pairs, recipe.training.seed)
    return train_examples, dev_examples


def recipe_base(recipe: Recipe) -> Base:
    """Load the base a recipe names, where this process computes."""
    return load_base(recipe.base, dtype=recipe.dtype, device=str(device()), revision=recipe.base_revision)


def prepare_recipe(
    recipe: Recipe,
    examples: tuple[Sequence[Example], Sequence[Example]] | None = None,
    base: Base | None = None,
    fresh: MethodModule | None = None,
) -> Prepared:
    """Load the base, read the data and check everything a recipe says.

    examples, base: what `recipe_examples` and `recipe_base` gave for a recipe that says the same of them. fresh: see
    `prepare`.
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
        fresh=fresh,
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
    fresh: MethodModule | None = None,
) -> Prepared:
    """Build the prefix and encode the data.

    max_target_tokens: longer targets are cut, and counted; None: one that does not fit is an error. fresh: what
    would be built, where it was built before; None: it is built.
    """
    num_draws = 1
    if TASKS[task].draws_negatives:
        train_examples, dev_examples, num_draws = _with_negatives(TASKS[task], train_examples, dev_examples, training)
    made = TASKS[task].of(train_examples, length_norm=training.ranking.length_norm)
    made.check_targets([*train_examples, *dev_examples])
    if words:
        made = made.with_words(words, base.tokenizer)
    if not isinstance(made, LabelTask):
        require_generator(base)
    elif base.model.config.is_encoder_decoder:
        raise TrainingError(f"{task} needs an encoder or a decoder, '{base.name}' is both: take BERT or a causal model")
    if base.model.config.is_encoder_decoder and base.model.config.decoder_start_token_id is None:
        raise TrainingError(f"the base '{base.name}' has no decoder_start_token_id: set it in its config.json")
    checked = checked_config(method, config)
    checked = checked.completed([target for e in train_examples for target in e.targets])
    text_format = text_format or default_format([e.source for e in train_examples])
    torch.manual_seed(training.seed)
    module = fresh or built(base, method, checked, made)
    text_format = module.with_symbols(text_format)
    fits = replace(module.limits_in(base.context_length), target=max_target_tokens)
    tokenizer = base.tokenizer_with(module.symbols)
    for_encoder = not find_sites(base.model).is_causal
    train_set, dev_set = (
        made.encode(e, text_format, tokenizer, fits, for_encoder=for_encoder) for e in (train_examples, dev_examples)
    )
    train_set = replace(train_set, num_draws=num_draws)
    if train_set.num_pairs == 0:
        raise TrainingError(
            f"{data_name or 'the training data'}: no example has a target; give rows one (of the format "
            "'plain', name its column with data.reader.target_column)"
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
        learning_rate=training.learning_rate or module.default_learning_rate(checked),
        method=method,
        data_name=data_name,
        task=made,
    )


def _with_negatives(
    task: type[Task], train_examples: Sequence[Example], dev_examples: Sequence[Example], training: TrainingRecipe
) -> tuple[Sequence[Example], Sequence[Example], int]:
    """Training and dev set with false examples, the former once for every epoch; how many times that is."""
    epochs = training.epochs
    if training.max_steps is not None:
        of_an_epoch = len(task.with_negatives(train_examples, training.negatives, training.seed))
        epochs = training.max_steps * training.pairs_per_step / max(1, of_an_epoch)
    num_draws = math.ceil(epochs)
    train_examples = task.with_negatives(train_examples, training.negatives, training.seed, num_draws)
    return train_examples, task.with_negatives(dev_examples, training.negatives, training.seed), num_draws


def built(base: Base, method: str, config: MethodConfig, task: Task) -> MethodModule:
    """A fresh module, with a head where the task needs one. Raises TrainingError where method and task do not fit."""
    parent = None if config.parent is None else Prefix.load(config.parent)
    if parent is not None:
        parent.module(base.model)  # refuses the prefix of another base
    module = method_class(method).build(base, config)
    if not module.is_searched and any(m.is_searched for m in module.modules() if isinstance(m, MethodModule)):
        raise TrainingError(f"{method}: what is found without gradients is searched alone; take it out of the union")
    if parent is not None and parent.card.positions != module.positions:
        raise PrefixError(
            f"{config.parent} has {parent.card.positions} positions, this recipe {module.positions}: "
            f"set config.positions = '{parent.card.positions}'"
        )
    if isinstance(task, LabelTask):
        if module.num_inserted_tokens > 0:
            raise TrainingError(
                f"{method} stands before what is written, and {task.name} writes nothing: take prefix_tuning"
            )
        if module.symbols and not task.reads_symbols:
            raise TrainingError(
                f"{method} has new tokens, and {task.name} reads words as they stand: take another method"
            )
        if module.is_searched and not task.word_ids:
            raise TrainingError(f"{method} learns no head, without gradients: give a word for every label (`words`)")
        module.head = _head_of(base, task)
    return module


def _head_of(base: Base, task: LabelTask) -> Head:
    if task.word_ids:
        return WordHead(base.model, task.word_ids)
    return LabelHead(int(base.model.config.get_text_config().hidden_size), len(task.labels))
