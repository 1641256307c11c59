"""From a document to a cartridge: self-study into a file that can be gone on with, then distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from antefix.base import Base
from antefix.data.encode import Encoded
from antefix.data.linearise import TextFormat
from antefix.digest import digest
from antefix.errors import PrefixError, TrainingError
from antefix.growing_file import GrowingFile, OtherWorkError
from antefix.methods import method_class
from antefix.methods.cartridge import CartridgeConfig, read_document
from antefix.pace import Pace
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.self_study import Conversation, Study, converse, longest_chunk
from antefix.training.loop import StepReport, train_loop
from antefix.training.recipe import TrainingRecipe

STUDY_FILE = "study.jsonl"
_AT_ONCE = 4
_DEV_PART = 16
"""One conversation of so many is kept for the dev loss."""


@dataclass(frozen=True, kw_only=True)
class CartridgeRun:
    """Everything that decides a cartridge."""

    document: str
    config: CartridgeConfig
    conversations: int
    study: Study
    training: TrainingRecipe


def train_cartridge(
    base: Base,
    run: CartridgeRun,
    folder: Path,
    *,
    studied: Callable[[int, float], None] = lambda done, seconds_left: None,
    watch: Callable[[StepReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Prefix:
    """Study the document, distil it, return the cartridge. `folder` keeps conversations and checkpoint between runs.

    studied: told how many conversations were tried, and the seconds that the rest takes. Raises TrainingError for a
    study file of another run, PrefixError for a document that cannot be read or is too short and for slots that leave
    no room, BaseModelError for a base that cannot converse, KeyboardInterrupt where a stop was requested.
    """
    room = longest_chunk(base, run.study)
    if run.config.num_virtual_tokens is not None and run.config.num_virtual_tokens > room:
        raise PrefixError(
            f"{run.config.num_virtual_tokens} slots stand where {room} tokens of the base's context are left beside a "
            "conversation: take fewer"
        )
    module = method_class("cartridge").build(base, run.config)
    conversations = study_file(base, run, folder / STUDY_FILE, studied, stop_requested)
    dev = conversations[::_DEV_PART]
    train = [c for n, c in enumerate(conversations) if n % _DEV_PART]
    if not train:
        raise TrainingError(f"{len(conversations)} conversations are too few to train on: take more")
    encoded, dev_encoded = (Encoded(tuple(c.encoded() for c in some), 0, 0) for some in (train, dev))
    rate = run.training.learning_rate or type(module).default_learning_rate(run.config)
    torch.manual_seed(run.training.seed)
    outcome = train_loop(
        base.model, module, encoded, dev_encoded, run.training, learning_rate=rate, digest=_digest(base, run),
        run_folder=folder, watch=watch, stop_requested=stop_requested,
    )  # fmt: skip
    card = Card(
        method="cartridge",
        config=run.config.model_copy(update={"document": Path(run.document).name}).model_dump(mode="json"),
        positions=module.positions,
        base=BaseRecord(name=base.name, revision=base.revision, fingerprint=base.fingerprint),
        text_format=TextFormat(chat=True).to_dict(),
        training={
            "data": Path(run.document).name,
            "data_hash": digest(read_document(run.document)),
            "conversations": len(conversations),
            "study": asdict(run.study),
            "steps": outcome.progress.step,
            "kept_step": outcome.progress.best_step,
            "seconds": round(outcome.progress.seconds, 1),
            "learning_rate": rate,
            "dtype": base.precision,
            **run.training.model_dump(mode="json", exclude={"learning_rate", "trackers", "checkpoint_seconds"}),
            "versions": {name: version(name) for name in ("antefix", "torch", "transformers")},
        },
        scores={"dev": outcome.progress.dev_scores},
    )
    return Prefix(outcome.tensors, card)


def study_file(
    base: Base,
    run: CartridgeRun,
    path: Path,
    studied: Callable[[int, float], None] = lambda done, seconds_left: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Conversation]:
    """The run's conversations: those that the file has, and new ones, written to it as they are made.

    They are made a few at a time: their number is rounded up. Raises TrainingError for a file of another study.
    """
    document = base.tokenizer(read_document(run.document), add_special_tokens=False)["input_ids"]
    study = asdict(run.study) | {"chunk_tokens": list(run.study.chunk_tokens)}
    file = GrowingFile(path, {"base": base.fingerprint, "document": digest(repr(document)), **study})
    num_batches = math.ceil(run.conversations / _AT_ONCE)
    batches = _read(file)[:num_batches]
    pace = Pace(num_batches - len(batches))
    for number in range(len(batches), num_batches):
        first = number * _AT_ONCE
        batches.append(converse(base, document, run.study, list(range(first, first + _AT_ONCE))))
        _add(file, batches[-1])
        pace.one_done()
        studied(first + _AT_ONCE, pace.seconds_left)
        if stop_requested():
            raise KeyboardInterrupt
    return [conversation for batch in batches for conversation in batch]


def _read(file: GrowingFile) -> list[list[Conversation]]:
    """What came of every few that were tried."""
    try:
        return [[_conversation(c) for c in batch] for batch in file.read()]
    except OtherWorkError as error:
        raise TrainingError(f"{file.path} holds conversations of another document, base or study: remove it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file.path}: not a readable study file ({error}); remove it") from error


def _add(file: GrowingFile, batch: Sequence[Conversation]) -> None:
    try:
        file.add([asdict(conversation) for conversation in batch])
    except OSError as error:
        raise TrainingError(f"{file.path}: cannot be written ({error.strerror or error})") from error


def _conversation(content: dict[str, Any]) -> Conversation:
    top = tuple(tuple((int(t), float(p)) for t, p in place) for place in content["top"])
    return Conversation(tuple(content["prompt"]), tuple(content["answer"]), top)


def _digest(base: Base, run: CartridgeRun) -> str:
    parts = (base.fingerprint, base.precision, repr(run.config), str(run.conversations), repr(run.study),
             run.training.model_dump_json(exclude={"checkpoint_seconds", "trackers"}))  # fmt: skip
    return digest(*parts)
