"""A training run as a TOML file: strict, checked once, complete.

Values come from the file, from `key=value` overrides (dotted keys: `training.epochs=3`) and from a search. An
unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from antefix.base import Dtype
from antefix.data.linearise import TextFormat
from antefix.decoding import Decoding
from antefix.errors import DataError, RecipeError
from antefix.methods import method_class
from antefix.methods.base import MethodConfig
from antefix.settings import override, put, validated
from antefix.tasks import TASKS, TaskName
from antefix.training.objectives import LossReduction, RankingWeights
from antefix.training.space import SearchRecipe, Value


class _Section(BaseModel):
    # What stands under a field is its description, also in docs/recipe.md.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataRecipe(_Section):
    """Where the examples come from and how they become text."""

    train: str
    """A file, `archive.zip::member.csv`, or `hf:owner/name` (see docs/data.md)."""
    dev: str | None = None
    """The dev set; None: `dev_fraction` of the training sources, drawn with the seed."""
    dev_fraction: float = Field(0.1, ge=0, lt=1)
    """The part of the training sources that becomes the dev set, where `dev` names none. 0: there is no dev set, and
    the last step is kept."""
    format: str | None = None
    """The reader's name; None: found by looking."""
    reader: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the reader: `target_column = "text"` and the like."""
    samples_per_label: int | None = Field(None, ge=1)
    """Of frames (parsing from few rows): draw so many training rows of every intent and slot, with the seed (SPIS)."""
    pairs: int | None = Field(None, ge=1)
    """Take this many source/target pairs: sources with all their targets, drawn with the seed, the last one cut to fit;
    more than there are is an error."""
    dev_pairs: int | None = Field(200, ge=1)
    """The same for the dev set; a number larger than the set takes all of it."""
    text: dict[str, Any] = Field(default_factory=dict)
    """Changes to the text format: `linearise`, `separator`, `instruction`, ..."""
    max_source_tokens: int | None = Field(None, ge=1)
    """Cut longer sources, and say how many were cut; None: a source that does not fit is an error."""
    max_target_tokens: int | None = Field(None, ge=1)
    """The same for targets; None: a pair that does not fit is an error."""


class BlackBoxRecipe(_Section):
    """A search without gradients (`bbt`, `bbt_v2`)."""

    candidates: int = Field(8000, ge=1)
    """How many are tried on all training pairs; 8,000 in the paper."""
    population: int = Field(20, ge=3)
    """Candidates of one generation; with two pycma's search breaks off."""
    at_once: int | None = Field(None, ge=1)
    """Candidates in one batch; None: the whole population. Fewer take less memory."""
    loss: Literal["cross_entropy", "hinge"] = "cross_entropy"
    """What is made small; `hinge` is for labels: how far wrong ones come within a margin of 2 of the right one."""


class TrainingRecipe(_Section):
    """How long, how fast, and how it is watched."""

    epochs: float = Field(5.0, gt=0)
    """How often every pair is seen; 0.5 is half of the pairs."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; None: as `epochs` says."""
    pairs_per_step: int = Field(16, ge=1)
    """Source/target pairs an optimiser step."""
    targets_per_row: int = Field(2, ge=1)
    """At most so many targets of one source stand in one row: more is faster, fewer mixes sources better. Two learn as
    much a pair as one does (see the results in the documentation)."""
    packed: bool | None = None
    """Packed rows; None: on the processor, wherever the base can (it is asked once, by comparing)."""
    tokens_per_batch: int = Field(1024, ge=1)
    """Tokens of one forward pass, padding included; a step may take several."""
    optimiser: Literal["adamw", "adafactor"] = "adamw"
    """`adamw`, or `adafactor` with steps scaled by a parameter's size, as T-Few trains."""
    learning_rate: float | None = Field(None, gt=0)
    """None: the default of the method's parametrisation."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: linear to 0, or as it is."""
    warmup_steps: int | None = Field(None, ge=0)
    """None: 5 % of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of the learned values, a step: this times the learning rate."""
    max_grad_norm: float = Field(1.0, gt=0)
    """A longer gradient of a step is scaled down to this norm."""
    loss_reduction: LossReduction = "token_mean"
    """`token_mean`: mean over a step's target tokens. `example_sum`: sum over a pair's tokens, mean over pairs, the
    default of the paper's code. Its other two divide that by the tokens of the step's longest row or target."""
    negatives: int = Field(5, ge=1)
    """Of `triples`: false ones for each of head, relation and tail of a true one. Every epoch has its own, drawn before
    training starts and kept in memory."""
    ranking: RankingWeights = RankingWeights()
    """The losses of `ranking`, in the place of these."""
    black_box: BlackBoxRecipe = BlackBoxRecipe()
    """How methods that are found without gradients are searched; epochs, steps and rates are not theirs."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """This part of a target token's probability is spread over the whole vocabulary."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    keep_source_states: bool = False
    """Read every source once and keep its keys and values in memory for all epochs: for methods whose slots targets
    alone see (`infix`), packed rows, no dropout in the base."""
    evaluations: int = Field(8, ge=0)
    """How often the dev loss is measured, the last time at the end; 0: never (the last step is kept)."""
    dev_metric: Literal["loss", "bleu", "accuracy", "frame_f1", "span_f1", "word_accuracy"] = "loss"
    """What chooses the best step: the dev loss, or a score of the task of what is written, or labelled, for
    `dev_metric_sources` sources."""
    dev_metric_sources: int = Field(50, ge=1)
    """How many sources of the dev set such a score takes, from its beginning."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better one."""
    checkpoint_seconds: float = Field(30.0, ge=0)
    """A checkpoint at most this often; 0: after every step."""
    seed: int = Field(0, gt=-(2**32), lt=2**32)
    """Seed of first values, order, dropout and of what is drawn from the data."""
    trackers: tuple[str, ...] = ()
    """Accelerate's trackers: `tensorboard`, `wandb`, ..."""


class Recipe(_Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")
    """The kept prefix's name in its bank."""
    bank: str = "bank"
    """The bank's folder."""
    run: str | None = None
    """The run's own folder (checkpoints, log, plot); None: `runs/<name>`."""
    base: str = "smollm2-135m"
    """A hub id, a folder, a `.gguf` file, or the embedded `smollm2-135m`."""
    base_revision: str | None = None
    """Commit, branch or tag on the hub; None: its main branch."""
    dtype: Dtype = "native"
    """Precision of the frozen weights; what is learned stays float32. `native`: bfloat16 where this processor or GPU
    multiplies it natively, else float32. `int8` needs `pip install 'antefix[int8]'`."""
    task: TaskName = "text_generation"
    """What is learned: to write texts, to label whole texts (`classification`) or their words (`tagging`), to choose
    (`ranking`), or to tell true triples from false ones (`triples`)."""
    words: dict[str, str] = Field(default_factory=dict)
    """Of `classification` on a causal base: a word for every label (` great`, with the space before it), whose logit is
    the label's score (a verbaliser); empty: a head is learned."""
    method: str = "prefix_tuning"
    """The method's name; several that act together are joined, `prefix_tuning+prefix_memory`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The method's own choices."""
    data: DataRecipe
    """What is learned from."""
    training: TrainingRecipe = TrainingRecipe()
    """How it is learned."""
    search: SearchRecipe = SearchRecipe()
    """What `antefix search` varies; a single run passes over it."""
    decoding: Decoding | None = None
    """Decoding defaults for the card; without `num_beams`: beams of 5 for tables and triples, else greedy."""
    tags: tuple[str, ...] = ()
    """Words for the card; `antefix bank list` shows them."""
    licence: str | None = None
    """The prefix's licence, for the card."""
    notes: str = ""
    """Further text for the card."""

    @model_validator(mode="after")
    def _known_method(self) -> Recipe:
        try:
            method_class(self.method)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _metric_of_the_task(self) -> Recipe:
        known = ("loss", *TASKS[self.task].metrics)
        if self.training.dev_metric not in known:
            raise ValueError(f"training.dev_metric of {self.task} is one of {', '.join(known)}")
        return self

    @property
    def method_config(self) -> MethodConfig:
        """The method's choices, checked."""
        return checked_config(self.method, self.config)

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its checkpoints, log and plot."""
        return Path(self.run or f"runs/{self.name}")

    @property
    def prefix_folder(self) -> Path:
        """Where the prefix is kept."""
        return Path(self.bank) / self.name


def checked_config(method: str, content: dict[str, Any]) -> MethodConfig:
    """A method's choices. Raises RecipeError for an unknown method, key or value."""
    return validated(method_class(method).Config, content, "config.")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and its overrides. Raises RecipeError naming file and key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe; `antefix init FILE` writes a first one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: not a readable TOML file ({error})") from error
    override(content, overrides)
    try:
        recipe = validated(Recipe, content)
        _ = recipe.method_config
        _check_space(recipe)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe


def with_values(recipe: Recipe, values: Mapping[str, Value]) -> Recipe:
    """The recipe with other values under these dotted keys. Raises RecipeError for what a recipe does not take."""
    content = recipe.model_dump(exclude_unset=True)
    for key, value in values.items():
        put(content, key, value)
    changed = validated(Recipe, content)
    _ = changed.method_config
    try:
        TextFormat.from_dict(changed.data.text)
    except DataError as error:
        raise RecipeError(f"data.{error}") from error
    return changed


_SEARCHED = ("base", "dtype", "method", "config.", "training.", "decoding.", "data.pairs", "data.max_source_tokens",
             "data.text.")  # fmt: skip
_NOT_SEARCHED = {
    "training.seed": "it draws the dev set",
    "training.dev_metric": "scores of two kinds cannot be compared",
    "training.dev_metric_sources": "scores of unlike dev sets cannot be compared",
    "training.trackers": "trials are not tracked",
    "training.checkpoint_seconds": "it changes no score",
}


def _check_space(recipe: Recipe) -> None:
    """Every key exists, takes these values, and leaves the scores comparable. Raises RecipeError."""
    for key, values in recipe.search.space.items():
        for value in values.edges:
            try:
                with_values(recipe, {key: value})
            except RecipeError as error:
                raise RecipeError(f"search.space: {error}") from error
        reason = _NOT_SEARCHED.get(key)
        if not any(key == known or (known.endswith(".") and key.startswith(known)) for known in _SEARCHED):
            reason = f"keys to search are {', '.join(known + '*' * known.endswith('.') for known in _SEARCHED)}"
        elif recipe.training.dev_metric == "loss" and key == "base":
            reason = "a dev loss counts a base's own tokens; with training.dev_metric = 'bleu' bases can be compared"
        elif recipe.training.dev_metric == "loss" and key.startswith("decoding."):
            reason = "it changes no dev loss, only texts; with training.dev_metric = 'bleu' it can be searched"
        if reason is not None:
            raise RecipeError(f"search.space: '{key}' cannot be searched: {reason}")
