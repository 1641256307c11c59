"""From a document to a cartridge: self-study into a file that can be gone on with, then distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from antefix import atomic
from antefix.base import Base
from antefix.data.encode import Encoded
from antefix.data.linearise import TextFormat
from antefix.errors import PrefixError, TrainingError
from antefix.methods import method_class
from antefix.methods.cartridge import CartridgeConfig, read_document
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
    studied: Callable[[int], None] = lambda done: None,
    watch: Callable[[StepReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Prefix:
    """Study the document, distil it, return the cartridge. `folder` keeps conversations and checkpoint between runs.

    studied: told how many conversations there are. Raises TrainingError for a study file of another run, PrefixError
    for a document that cannot be read or is too short and for slots that leave no room, BaseModelError for a base that
    cannot converse, KeyboardInterrupt where a stop was requested.
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
            "data_hash": hashlib.sha256(read_document(run.document).encode()).hexdigest()[:16],
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
    studied: Callable[[int], None] = lambda done: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Conversation]:
    """The run's conversations: those that the file has, and new ones, written to it as they are made."""
    document = base.tokenizer(read_document(run.document), add_special_tokens=False)["input_ids"]
    study = asdict(run.study) | {"chunk_tokens": list(run.study.chunk_tokens)}
    made_for = {"base": base.fingerprint, "document": hashlib.sha256(repr(document).encode()).hexdigest()[:16], **study}
    done, conversations = _read(path, made_for)
    while done < run.conversations:
        numbers = list(range(done, min(done + _AT_ONCE, run.conversations)))
        new = converse(base, document, run.study, numbers)
        done = numbers[-1] + 1
        conversations += new
        _append(path, made_for, done, new)
        studied(done)
        if stop_requested():
            raise KeyboardInterrupt
    return conversations


def _read(path: Path, made_for: dict[str, Any]) -> tuple[int, list[Conversation]]:
    """How many conversations were tried, and those that came of it."""
    if not path.exists():
        return 0, []
    done, found = 0, []
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(head) != made_for:
            raise TrainingError(f"{path} holds conversations of another document, base or study: remove it")
        for line in lines:
            content = json.loads(line)
            done = content["done"]
            found += [_conversation(c) for c in content["conversations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: not a readable study file ({error}); remove it") from error
    return done, found


def _conversation(content: dict[str, Any]) -> Conversation:
    top = tuple(tuple((int(t), float(p)) for t, p in place) for place in content["top"])
    return Conversation(tuple(content["prompt"]), tuple(content["answer"]), top)


def _append(path: Path, made_for: dict[str, Any], done: int, new: Sequence[Conversation]) -> None:
    """A whole line at once; what a crash cut off is overwritten by nobody, since a line is written only when whole."""
    before = path.read_bytes() if path.exists() else f"{json.dumps(made_for)}\n".encode()
    line = json.dumps({"done": done, "conversations": [asdict(c) for c in new]})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, before + f"{line}\n".encode())


def _digest(base: Base, run: CartridgeRun) -> str:
    parts = (base.fingerprint, base.precision, repr(run.config), str(run.conversations), repr(run.study),
             run.training.model_dump_json(exclude={"checkpoint_seconds", "trackers"}))  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
