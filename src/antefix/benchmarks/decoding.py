"""`antefix bench generate`: new tokens a second with a prefix, against the bare base and PEFT.

Greedy, a batch of sources padded on the left, the same number of new tokens for every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from antefix.attach import attached
from antefix.base import Dtype
from antefix.benchmarks.machine import description, read_bandwidth_gb_s
from antefix.benchmarks.peers import give_slots, peft_model
from antefix.benchmarks.rounds import Spread, interleave, ratio, summary
from antefix.benchmarks.worker import Worker
from antefix.benchmarks.workload import Work, common_slots, load_workload, our_prefix, parameters_in_products, peak_mib
from antefix.errors import BenchmarkError

Watch = Callable[[int, int, str], None]
TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""How far the first logits of two arms may be apart; they range over tens."""


class Decoding:
    """A batch of sources and how it is decoded; the base of every arm."""

    def __init__(self, base: str, data: str, dtype: Dtype, batch: int, new_tokens: int) -> None:
        self.base, encoded = load_workload(base, data, dtype)
        sources = [e.source for e in encoded.examples[:batch]]
        if len(sources) < batch:
            raise BenchmarkError(f"{data} has {len(sources)} sources, the batch needs {batch}")
        longest, pad = max(map(len, sources)), self.base.tokenizer.pad_token_id
        self.inputs = {
            "input_ids": torch.tensor([[pad] * (longest - len(s)) + list(s) for s in sources]),
            "attention_mask": torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sources]),
        }
        self._new_tokens = new_tokens

    def generate(self, model: Any, inputs: dict[str, Tensor]) -> int:
        """Decode; how many tokens are new."""
        new = self._new_tokens
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=self.base.tokenizer.pad_token_id,
            )  # fmt: skip
        return int(out.shape[0]) * new

    def first_logits(self, model: Any) -> list[list[float]]:
        """Of every row's first new token, over the first thousand words."""
        positions = (self.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**self.inputs, position_ids=positions).logits
        return logits[:, -1, :1000].float().tolist()  # type: ignore[no-any-return]


class OurDecoding:
    """With `distinct` prefixes of ours spread over the rows; 0: the bare base."""

    def __init__(self, num_slots: int, distinct: int, **decoding: Any) -> None:
        self._decoding = Decoding(**decoding)
        model = self._decoding.base.model
        self._prefixes = [our_prefix(model, common_slots(model, num_slots, seed)) for seed in range(distinct)]

    def work(self, number: int) -> Work:
        """Decode the batch once."""
        with self._attached() as model:
            started = time.perf_counter()
            count = self._decoding.generate(model, self._decoding.inputs)
            return Work(count, time.perf_counter() - started)

    def first_logits(self) -> list[list[float]]:
        """See `Decoding.first_logits`."""
        with self._attached() as model:
            return self._decoding.first_logits(model)

    def peak_mib(self) -> float:
        """Peak memory of decoding above the model."""
        return peak_mib(lambda: self.work(0))

    def bytes_per_step(self) -> int:
        """What one new token of the batch must read at the least: every weight that it is multiplied by."""
        model = self._decoding.base.model
        return sum(parameters_in_products(model)) * model.dtype.itemsize

    @contextmanager
    def _attached(self) -> Iterator[Any]:
        model = self._decoding.base.model
        if not self._prefixes:
            yield model
            return
        num_rows = len(self._decoding.inputs["input_ids"])
        rows = None if len(self._prefixes) == 1 else [n % len(self._prefixes) for n in range(num_rows)]
        with attached(model, *self._prefixes, rows=rows):
            yield model


class PeftDecoding:
    """With PEFT's prefix; several are had by switching adapters, one group of rows after the other."""

    def __init__(self, num_slots: int, distinct: int, **decoding: Any) -> None:
        self._decoding = Decoding(**decoding)
        base = self._decoding.base
        self._model = peft_model(base, num_slots)
        self._names = ["default"]
        for seed in range(1, distinct):
            self._names.append(f"other{seed}")
            self._model.add_adapter(self._names[-1], self._model.peft_config["default"])
        for seed, name in enumerate(self._names):
            give_slots(self._model, common_slots(base.model, num_slots, seed), name)
        self._model.eval()

    def work(self, number: int) -> Work:
        """Decode the batch once."""
        inputs, count = self._decoding.inputs, 0
        started = time.perf_counter()
        for place, name in enumerate(self._names):
            self._model.set_adapter(name)
            group = {key: value[place :: len(self._names)] for key, value in inputs.items()}
            count += self._decoding.generate(self._model, group)
        return Work(count, time.perf_counter() - started)

    def first_logits(self) -> list[list[float]]:
        """See `Decoding.first_logits`."""
        return self._decoding.first_logits(self._model)

    def peak_mib(self) -> float:
        """Peak memory of decoding above the model."""
        return peak_mib(lambda: self.work(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingBench:
    """What is compared, and for how long."""

    base: str
    data: str
    precisions: tuple[Dtype, ...] = ("float32", "bfloat16")
    batch: int = 16
    new_tokens: int = 32
    num_slots: int = 10
    many_slots: int = 1024
    rounds: int = 9
    mixed: bool = True
    """Also as many different prefixes as rows."""


def bench_decoding(bench: DecodingBench, watch: Watch) -> dict[str, Any]:
    """Run it; the record holds every round. Raises BenchmarkError where ours and PEFT's logits differ."""
    found = {dtype: _at_precision(bench, dtype, watch) for dtype in bench.precisions}
    return {"bench": "generate", "settings": asdict(bench), "machine": description(), "precisions": found}


def _at_precision(bench: DecodingBench, dtype: Dtype, watch: Watch) -> dict[str, Any]:
    with ExitStack() as stack:
        arms = {name: stack.enter_context(worker()) for name, worker in _workers(bench, dtype).items()}
        differences = {
            slots: _difference(arms[f"ours, {slots} slots"], arms[f"PEFT, {slots} slots"], dtype)
            for slots in (bench.num_slots, bench.many_slots)
        }
        for arm in arms.values():
            arm.call("work", 0)  # to warm up
        num_turns = bench.rounds * len(arms)

        def turn(arm: Worker) -> Callable[[int], float]:
            return lambda number: float(arm.call("work", number).per_second)

        rates = interleave(
            {name: turn(arm) for name, arm in arms.items()},
            bench.rounds,
            lambda done, name: watch(done, num_turns, f"{dtype}: {name}"),
        )
        gigabytes_a_token = arms["bare base"].call("bytes_per_step") / bench.batch / 1e9
        return {
            "largest_difference_of_logits": differences,
            "arms": {
                name: {**rated, "peak_mib": arms[name].call("peak_mib")} for name, rated in summary(rates).items()
            },
            "ratios": {f"{of} / {to}": ratio(rates, of, to).to_dict() for of, to in _compared(bench)},
            "memory_read_gb_s": read_bandwidth_gb_s(),
            "weights_read_gb_s": Spread.of([rate * gigabytes_a_token for rate in rates["bare base"]]).to_dict(),
        }


def _workers(bench: DecodingBench, dtype: Dtype) -> dict[str, Callable[[], Worker]]:
    common = {
        "base": bench.base, "data": bench.data, "dtype": dtype, "batch": bench.batch, "new_tokens": bench.new_tokens,
    }  # fmt: skip
    few, many = bench.num_slots, bench.many_slots
    arms = {"bare base": ("OurDecoding", few, 0)}
    for slots in (few, many):
        arms[f"ours, {slots} slots"] = ("OurDecoding", slots, 1)
        arms[f"PEFT, {slots} slots"] = ("PeftDecoding", slots, 1)
    if bench.mixed:
        arms[f"ours, {bench.batch} prefixes"] = ("OurDecoding", few, bench.batch)
        arms[f"PEFT, {bench.batch} prefixes"] = ("PeftDecoding", few, bench.batch)
    return {
        name: lambda arm=arm, slots=slots, distinct=distinct: Worker(  # type: ignore[misc]
            f"antefix.benchmarks.decoding:{arm}", {**common, "num_slots": slots, "distinct": distinct}
        )
        for name, (arm, slots, distinct) in arms.items()
    }


def _compared(bench: DecodingBench) -> list[tuple[str, str]]:
    few, many, mixed = f"{bench.num_slots} slots", f"{bench.many_slots} slots", f"{bench.batch} prefixes"
    compared = [(f"ours, {few}", "bare base"), (f"PEFT, {few}", "bare base"), (f"ours, {many}", f"PEFT, {many}")]
    if bench.mixed:
        compared += [(f"ours, {mixed}", f"ours, {few}"), (f"ours, {mixed}", f"PEFT, {mixed}")]
    return compared


def _difference(ours: Worker, peft: Worker, dtype: Dtype) -> float:
    """The largest difference between the first logits of two arms with the same slots."""
    difference = float((torch.tensor(ours.call("first_logits")) - torch.tensor(peft.call("first_logits"))).abs().max())
    if difference > TOLERANCE[dtype]:
        raise BenchmarkError(
            f"{dtype}: with the same slots the logits of ours and PEFT's differ by {difference:.2g}: they do not "
            "compute the same, so nothing is timed"
        )
    return difference
