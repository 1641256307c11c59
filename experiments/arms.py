"""What is compared in quality: ways to train on the same base, each with a loss for pairs and a model that writes.

All arms take the same pairs in every optimiser step, with the same schedule, clipping and optimiser (`trained`). Where
an arm's model can take packed rows it gets them, which changes no loss; PEFT's prefix-tuning cannot, and gets its
pairs sorted by length and padded; on an accelerator all arms' pairs are padded, which is faster there.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import antefix
from antefix.attach import attached
from antefix.attention.hook import routed
from antefix.base import Base
from antefix.batches.form import BatchForm, batch_of
from antefix.batches.head import pair_losses
from antefix.benchmarks.peers import peft_generate
from antefix.data import sample_pairs
from antefix.data.encode import Encoded, Limits, encode
from antefix.data.linearise import default_format
from antefix.data.plan import Unit, all_units, microbatches, steps
from antefix.methods import method_class
from antefix.metrics import evaluate

NUM_SLOTS = 10
TOKENS_PER_BATCH = 1024


class Arm(Protocol):
    """One way to train."""

    parameters: list[nn.Parameter]

    @contextmanager
    def at_work(self) -> Iterator[Base]:
        """The base as this arm makes it, for losses and for texts."""

    def losses(self, base: Base, data: Encoded, units: Sequence[Unit]) -> Iterator[Tensor]:
        """The sum of the pairs' losses of every forward pass."""


class Ours:
    """A prefix of Antefix, of ten slots unless the config says otherwise."""

    def __init__(self, base: Base, method: str = "prefix_tuning", **config: Any) -> None:
        found = method_class(method)
        if "num_virtual_tokens" in found.Config.model_fields:
            config = {"num_virtual_tokens": NUM_SLOTS, **config}
        self._base, self._method, self._config = base, method, config
        self._module = found.build(base, found.Config.model_validate(config)).to(base.model.device)
        self.parameters = [p for p in self._module.parameters() if p.requires_grad]

    @property
    def stored_values(self) -> int:
        """How many values a kept one holds."""
        return sum(t.numel() for t in self._module.kept_tensors().values())

    @property
    def num_inserted_tokens(self) -> int:
        """Tokens that stand behind every source."""
        return self._module.num_inserted_tokens

    def over(self, base: Base) -> Ours:
        """The same prefix over another copy of its base."""
        other = Ours(base, self._method, **self._config)
        other._module.load_state_dict(self._module.state_dict())
        return other

    @contextmanager
    def at_work(self) -> Iterator[Base]:
        with attached(self._base.model, self._module):
            yield self._base

    def losses(self, base: Base, data: Encoded, units: Sequence[Unit]) -> Iterator[Tensor]:
        return pairs_losses(base, data, units)


class PeftPrefix:
    """PEFT's prefix-tuning; `text`: the words that its own function takes first values from."""

    def __init__(self, base: Base, text: str | None = None, **config: Any) -> None:
        from peft import PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_text

        given = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_SLOTS, **config)
        model = get_peft_model(base.model, given)
        if text is not None:
            initialize_kv_prefix_from_text(model, base.tokenizer, text=text, use_chat_template=False)
        model.generate = partial(peft_generate, model)
        self._base = Base(model, base.tokenizer, base.name)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    @contextmanager
    def at_work(self) -> Iterator[Base]:
        yield self._base

    def losses(self, base: Base, data: Encoded, units: Sequence[Unit]) -> Iterator[Tensor]:
        for part in microbatches(
            data, [Unit(u.example, (t,)) for u in units for t in u.targets], TOKENS_PER_BATCH, packed=False
        ):
            batch = batch_of("padded", data, part, base.model)
            logits = base.model(
                input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]
            ).logits
            scored = logits.flatten(0, 1)[batch.positions][batch.row]
            yield nn.functional.cross_entropy(scored.float(), batch.label, reduction="sum")


class Weights:
    """Weights of the base itself, or beside them: all that can take packed rows without a prefix."""

    def __init__(self, base: Base, parameters: list[nn.Parameter]) -> None:
        self._base, self.parameters = base, parameters

    @contextmanager
    def at_work(self) -> Iterator[Base]:
        with routed(self._base.model):
            yield self._base

    def losses(self, base: Base, data: Encoded, units: Sequence[Unit]) -> Iterator[Tensor]:
        return pairs_losses(base, data, units)


def peft_lora(base: Base) -> Weights:
    """PEFT's LoRA at the stored size of the prefix: rank 2 on the query and value projections."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base.model, config)
    inner = Base(model.get_base_model(), base.tokenizer, base.name)
    return Weights(inner, [p for p in model.parameters() if p.requires_grad])


def full(base: Base) -> Weights:
    """Every weight of the base."""
    return Weights(base, list(base.model.requires_grad_(True).parameters()))


WORDS = "Describe the following facts in a natural sentence. The facts:"
"""PEFT's text initialisation needs at least as many tokens as there are slots; these are the words ours starts from."""

ARMS: dict[str, Callable[[Base], Arm]] = {
    "ours": Ours,
    "ours_network": lambda base: Ours(base, parametrisation="network"),
    "peft_prefix": PeftPrefix,
    "peft_prefix_text": lambda base: PeftPrefix(base, text=WORDS),
    "peft_prefix_projection": lambda base: PeftPrefix(
        base, prefix_projection=True, encoder_hidden_size=base.model.config.hidden_size
    ),
    "peft_lora": peft_lora,
    "full": full,
}


def pairs_losses(base: Base, data: Encoded, units: Sequence[Unit]) -> Iterator[Tensor]:
    """The sum of the pairs' losses of every forward pass."""
    form: BatchForm = "packed" if base.model.device.type == "cpu" else "padded"
    for part in microbatches(data, units, TOKENS_PER_BATCH, packed=form == "packed"):
        yield pair_losses(base.model, batch_of(form, data, part, base.model)).sum()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How an arm is trained."""

    learning_rate: float
    pairs_seen: int
    seed: int
    pairs_per_step: int = 10
    targets_per_row: int = 2
    warmup: float = 0.05
    evaluate_every: int | None = 250
    """Pairs; None: at the end only."""


def trained(arm: Arm, train: Encoded, dev: Encoded, schedule: Schedule) -> list[tuple[int, float]]:
    """Train; (pairs seen, dev loss) along the way. AdamW, linear schedule, clipping at 1.0, token mean."""
    optimiser = torch.optim.AdamW(arm.parameters, lr=schedule.learning_rate, weight_decay=0.0)
    num_steps = math.ceil(schedule.pairs_seen / schedule.pairs_per_step)
    warmup = max(1, math.ceil(schedule.warmup * num_steps)) if schedule.warmup else 0
    every = schedule.evaluate_every or schedule.pairs_seen
    plan = steps(
        train, pairs_per_step=schedule.pairs_per_step, targets_per_row=schedule.targets_per_row, seed=schedule.seed
    )
    curve, seen = [], 0
    with arm.at_work() as base:
        for step, units in enumerate(islice(plan, num_steps)):
            torch.manual_seed(schedule.seed * 1_000_003 + step)
            base.model.train(mode=False)
            rate = (step + 1) / warmup if step < warmup else (num_steps - step) / max(num_steps - warmup, 1)
            for group in optimiser.param_groups:
                group["lr"] = schedule.learning_rate * rate
            num_labels = sum(len(train.examples[u.example].targets[t]) for u in units for t in u.targets)
            for loss in arm.losses(base, train, units):
                (loss / num_labels).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(arm.parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            before, seen = seen, seen + schedule.pairs_per_step
            if seen // every > before // every or step + 1 == num_steps:
                curve.append((seen, dev_loss(arm, base, dev)))
    return curve


@torch.no_grad()
def dev_loss(arm: Arm, base: Base, dev: Encoded) -> float:
    """Mean over target tokens; infinite where training has broken."""
    total = sum(float(loss) for loss in arm.losses(base, dev, all_units(dev, 8)))
    return total / sum(len(t) for e in dev.examples for t in e.targets)


def texts(arm: Arm, examples: Sequence[antefix.Example]) -> list[str]:
    """Greedy."""
    with arm.at_work() as base:
        return antefix.generate(base, examples, decoding=antefix.Decoding(num_beams=1))


def scored(arm: Arm, examples: Sequence[antefix.Example]) -> dict[str, Any]:
    """Corpus BLEU, and every input's counts: enough for a bootstrap, and no text."""
    found = evaluate([e.targets for e in examples], texts(arm, examples), ["bleu"])["bleu"]
    return {"bleu": found.score, "inputs": len(examples), "counts": [[int(n) for n in row] for row in found.rows]}


def pairs_of(base: Base, data: str, pairs: int, seed: int = 0, inserted: int = 0) -> Encoded:
    """Whole sources with their targets, drawn from a data file."""
    return encoded(base, sample_pairs(antefix.read(data), pairs, seed), inserted)


def encoded(base: Base, examples: Sequence[antefix.Example], inserted: int = 0) -> Encoded:
    """Examples in their default text format. inserted: tokens of a method that stand behind the source."""
    text_format = default_format([e.source for e in examples])
    return encode(examples, text_format, base.tokenizer, Limits(context=base.context_length, inserted=inserted))


def webnlg_examples(path: Path, seen: bool | None = None) -> list[antefix.Example]:
    """Of one of WebNLG's files; seen: of the categories that are in the training set, or of the others."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        antefix.Example(
            source=antefix.Triples(tuple(tuple(part.strip() for part in t.split(" | ")) for t in row["triples"])),
            targets=tuple(lex["text"] for lex in row["lexs"]),
        )
        for row in rows
        if (seen is None or row["seen"] == seen) and row["lexs"]
    ]
