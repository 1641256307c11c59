"""What every method costs beside prefix-tuning: time of a training step and of a generated token, and peak memory.

A part of `methods_side_by_side`. All methods stand ready in one process over one base and take turns; a ratio is taken
within a round. Texts are written with what a kept prefix holds, as a user's are.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import antefix
from antefix.attach import attached
from antefix.base import Base
from antefix.benchmarks.rounds import Spread, interleave
from antefix.benchmarks.workload import peak_mib
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, steps
from antefix.methods import method_class
from antefix.methods.base import MethodModule
from antefix.sites import find_sites

from arms import Ours, pairs_of  # isort: skip

ROUNDS, PAIRS, ROWS, NEW_TOKENS = 7, 16, 16, 32
YARDSTICK = "prefix_tuning"


class Costed:
    """One method, ready to train and to write."""

    def __init__(
        self, base: Base, data: Encoded, units: list[Unit], prompts: dict[str, Any], arm: Ours, kept: MethodModule
    ) -> None:
        self._base, self._data, self._units, self._prompts = base, data, units, prompts
        self._arm, self._kept = arm, kept
        self._config = copy.deepcopy(base.model.generation_config)
        self._config.update(eos_token_id=None, do_sample=False, max_new_tokens=NEW_TOKENS)

    def step(self, number: int = 0) -> float:
        """Pairs a second, forward and backward."""
        started = time.perf_counter()
        with self._arm.at_work() as base:
            for loss in self._arm.losses(base, self._data, self._units):
                loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self._arm.parameters:
            parameter.grad = None
        return PAIRS / (time.perf_counter() - started)

    def write(self, number: int = 0) -> float:
        """New tokens a second."""
        with attached(self._base.model, self._kept) as attachment, torch.inference_mode():
            attachment.source_lengths = self._prompts["input_ids"].shape[1]
            started = time.perf_counter()
            self._base.model.generate(**self._prompts, generation_config=self._config)
        return ROWS * NEW_TOKENS / (time.perf_counter() - started)


def costs(e2e: Path, configs: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """By name: the rates of all rounds, and how many times prefix-tuning's seconds it takes (median and quartiles)."""
    base = antefix.load_base("smollm2-135m", dtype="float32")
    methods = {}
    for name, (method, config) in configs.items():
        arm = Ours(base, method, **config)
        data, sources = (
            pairs_of(base, f"{e2e}::{part}.csv", 200, inserted=arm.num_inserted_tokens)
            for part in ("trainset", "devset")
        )
        prompts = _prompts(base, sources)
        units = next(steps(data, pairs_per_step=PAIRS, targets_per_row=2, seed=0))
        methods[name] = Costed(base, data, units, prompts, arm, _kept(base, method, config))
    for one in methods.values():
        one.step()  # what is made once is made
        one.write()
    trained = interleave({name: one.step for name, one in methods.items()}, ROUNDS)
    written = interleave({name: one.write for name, one in methods.items()}, ROUNDS)
    return {
        "precision": base.precision,
        "pairs_a_step": PAIRS,
        "rows_and_new_tokens": (ROWS, NEW_TOKENS),
        "methods": {
            name: {
                "pairs_per_second": trained[name],
                "step_seconds_ratio": _ratio(trained, name),
                "tokens_per_second": written[name],
                "token_seconds_ratio": _ratio(written, name),
                "peak_mib": peak_mib(one.step),
            }
            for name, one in methods.items()
        },
    }


def _kept(base: Base, method: str, config: dict[str, Any]) -> MethodModule:
    """A fresh prefix, kept and read again."""
    found = method_class(method)
    checked = found.Config.model_validate(config)
    tensors = found.build(base, checked).kept_tensors()
    return found.restore(find_sites(base.model), checked, tensors)


def _prompts(base: Base, data: Encoded) -> dict[str, Any]:
    """Sources padded on the left."""
    sources = [list(e.source) for e in data.examples][:ROWS]
    assert len(sources) == ROWS
    padded = base.tokenizer.pad({"input_ids": sources}, padding_side="left", return_tensors="pt")
    return {name: padded[name] for name in ("input_ids", "attention_mask")}


def _ratio(rates: Mapping[str, list[float]], name: str) -> dict[str, float]:
    """How many times the yardstick's seconds."""
    found = Spread.of([yard / own for yard, own in zip(rates[YARDSTICK], rates[name], strict=True)])
    return {"median": found.median, "low": found.low, "high": found.high}
