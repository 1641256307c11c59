"""`antefix bench generate`: new tokens a second with a prefix, against the bare base and PEFT.

Greedy, a batch of sources padded on the left, the same number of new tokens for every row. In every arm, the bare base
included, the output head gets hidden states that lie together in memory: else torch copies its weights once a row of
the prefill.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from antefix.attach import attached
from antefix.base import Dtype
from antefix.benchmarks.machine import description, read_bandwidth_gb_s
from antefix.benchmarks.peers import give_slots, peft_generate, peft_model
from antefix.benchmarks.record import Curve, Record
from antefix.benchmarks.rounds import Kept, Spread, Watch, interleave
from antefix.benchmarks.worker import Worker
from antefix.benchmarks.workload import (
    Work,
    common_slots,
    finish,
    load_workload,
    our_prefix,
    parameters_in_products,
    peak_mib_on,
)
from antefix.errors import BenchmarkError
from antefix.products import by_torch
from antefix.quantised import is_quantised

TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""How far the first logits of two arms may be apart in the mean, as a part of their standard deviation. With a thousand
random slots a base in bfloat16 is that far from itself in float32: there it only shows that both sides have slots."""
PLAIN = "bare base as transformers loads it"
SLOT_COUNTS, BATCHES, DISTINCT = (0, 16, 128, 512, 2048), (1, 4, 16, 64), (1, 4, 16, 64, 256)
"""Of the growth curves."""


class DecodedBatch:
    """A batch of sources and how it is decoded; the base of every arm.

    as_transformers: its matrix products are those that it has when transformers loads it.
    """

    def __init__(
        self, base: str, data: str, dtype: Dtype, batch: int, new_tokens: int, as_transformers: bool = False,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.base, encoded = load_workload(base, data, dtype, device=device)
        if as_transformers:
            by_torch(self.base.model)
        self._sources = [e.source for e in encoded.examples]
        self._data = data
        self.inputs = self.batch_of(batch)
        head = self.base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
        self._config: Any = copy.deepcopy(self.base.model.generation_config)
        self._config.eos_token_id = None  # every row goes on to the end
        self._config.do_sample = False
        self._config.max_new_tokens = new_tokens

    def batch_of(self, count: int) -> dict[str, Tensor]:
        """The first sources, padded on the left."""
        sources = self._sources[:count]
        if len(sources) < count:
            raise BenchmarkError(f"{self._data} has {len(sources)} sources, the batch needs {count}")
        longest, pad = max(map(len, sources)), self.base.tokenizer.pad_token_id
        rows = {
            "input_ids": [[pad] * (longest - len(s)) + list(s) for s in sources],
            "attention_mask": [[0] * (longest - len(s)) + [1] * len(s) for s in sources],
        }
        return {name: torch.tensor(values, device=self.base.model.device) for name, values in rows.items()}

    def generate(self, generate: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """New tokens: (B, new)."""
        with torch.no_grad():
            out = generate(**inputs, generation_config=self._config)
        finish(self.base.model.device)
        return out[:, inputs["input_ids"].shape[1] :]

    def first_logits(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Of every row's first new token: (B, V)."""
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(**inputs, position_ids=positions).logits[:, -1].float()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Shown:
    """What an arm shows before it is timed."""

    first_logits: list[list[float]]
    """Of the first thousand words."""
    first_words: list[int]
    """By these logits."""
    generated: list[list[int]]


class OurDecoding:
    """With `distinct` prefixes of ours spread over the rows; 0: the bare base."""

    def __init__(self, num_slots: int, distinct: int, **decoding: Any) -> None:
        self._decoding = DecodedBatch(**decoding)
        self._inputs = self._decoding.inputs
        self._prefixes = self._made(num_slots, distinct)

    def work(self, number: int) -> Work:
        """Decode the batch once."""
        with self._attached() as model:
            started = time.perf_counter()
            out = self._decoding.generate(model.generate, self._inputs)
            return Work(out.numel(), time.perf_counter() - started)

    def work_with(self, num_slots: int, distinct: int, batch: int) -> Work:
        """The same with other prefixes and rows."""
        self._inputs, self._prefixes = self._decoding.batch_of(batch), self._made(num_slots, distinct)
        return self.work(0)

    def show(self) -> Shown:
        """See `Shown`."""
        with self._attached() as model:
            logits = self._decoding.first_logits(model, self._inputs)
            texts = self._decoding.generate(model.generate, self._inputs)
        return Shown(logits[:, :1000].tolist(), logits.argmax(1).tolist(), texts.tolist())

    def peak_mib(self) -> float:
        """Peak memory of decoding above the model."""
        return peak_mib_on(self._decoding.base.model.device, lambda: self.work(0))

    def bytes_per_step(self) -> int:
        """What one new token of the batch must read at the least: every weight that it is multiplied by."""
        model = self._decoding.base.model
        layers, head = parameters_in_products(model)
        return layers * (1 if is_quantised(model) else model.dtype.itemsize) + head * model.dtype.itemsize

    def read_bandwidth(self) -> float:
        """What this device's memory gives, in GB/s."""
        return read_bandwidth_gb_s(device=self._decoding.base.model.device)

    def _made(self, num_slots: int, distinct: int) -> list[Any]:
        model = self._decoding.base.model
        return [our_prefix(model, common_slots(model, num_slots, seed)) for seed in range(distinct)]

    @contextmanager
    def _attached(self) -> Iterator[Any]:
        model = self._decoding.base.model
        if not self._prefixes:
            yield model
            return
        num_rows = len(self._inputs["input_ids"])
        rows = None if len(self._prefixes) == 1 else [n % len(self._prefixes) for n in range(num_rows)]
        with attached(model, *self._prefixes, rows=rows):
            yield model


class PeftDecoding:
    """With PEFT's prefix; several are had by switching adapters, one group of rows after the other."""

    def __init__(self, num_slots: int, distinct: int, **decoding: Any) -> None:
        self._decoding = DecodedBatch(**decoding, as_transformers=True)
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
        count = 0
        started = time.perf_counter()
        for place, name in enumerate(self._names):
            self._model.set_adapter(name)
            count += self._generated(self._group(place)).numel()
        return Work(count, time.perf_counter() - started)

    def show(self) -> Shown:
        """See `Shown`."""
        num_rows = len(self._decoding.inputs["input_ids"])
        logits, texts = [torch.empty(0)] * num_rows, [torch.empty(0)] * num_rows
        for place, name in enumerate(self._names):
            self._model.set_adapter(name)
            rows = range(place, num_rows, len(self._names))
            group = self._group(place)
            of_group = zip(rows, self._decoding.first_logits(self._model, group), self._generated(group), strict=True)
            for row, its_logits, its_text in of_group:
                logits[row], texts[row] = its_logits, its_text
        found = torch.stack(logits)
        return Shown(found[:, :1000].tolist(), found.argmax(1).tolist(), [text.tolist() for text in texts])

    def peak_mib(self) -> float:
        """Peak memory of decoding above the model."""
        return peak_mib_on(self._decoding.base.model.device, lambda: self.work(0))

    def _group(self, place: int) -> dict[str, Tensor]:
        """The rows of one adapter, without the padding that other rows alone need."""
        rows = {key: value[place :: len(self._names)] for key, value in self._decoding.inputs.items()}
        unused = int((rows["attention_mask"].sum(0) == 0).sum())
        return {key: value[:, unused:] for key, value in rows.items()}

    def _generated(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._decoding.generate(lambda **arguments: peft_generate(self._model, **arguments), inputs)


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
    eight_bits: bool = False
    """Also a base with weights of eight bits beside the first of the precisions."""
    device: str = "cpu"
    curves: bool = True


def bench_decoding(bench: DecodingBench, watch: Watch, kept: Kept | None = None) -> Record:
    """Run it from the rounds that are kept, one precision after the other.

    Raises BenchmarkError where ours and PEFT's do not write the same.
    """
    record = Record(bench="generate", settings=asdict(bench), unit="new tokens/s", machine=description(bench.device))
    for dtype in bench.precisions:
        _at_precision(bench, dtype, record, watch, kept)
    if bench.eight_bits:
        _at_eight_bits(bench, record, watch, kept)
    if bench.curves:
        record.curves = _growth(bench, watch)
    return record


def _at_eight_bits(bench: DecodingBench, record: Record, watch: Watch, kept: Kept | None) -> None:
    """With a few slots: weights of eight bits, computed in the native precision, beside the first precision."""
    few, beside = f"ours, {bench.num_slots} slots", bench.precisions[0]
    names = {"int8": f"{few}, int8", beside: f"{few}, {beside} beside int8"}
    with ExitStack() as stack:
        arms = {names[dtype]: stack.enter_context(_workers(bench, dtype)[f"{few}, {dtype}"]()) for dtype in names}
        for name, arm in arms.items():
            watch(0, 1, f"warming up {name}")
            arm.call("work", 0)
        turns = {name: partial(_decoded, arm) for name, arm in arms.items()}
        total = bench.rounds * len(arms)
        record.rounds |= interleave(turns, bench.rounds, lambda n, name: watch(n, total, name), kept)
        record.peak_mib |= {name: arm.call("peak_mib") for name, arm in arms.items()}
        weights = {dtype: arms[name].call("bytes_per_step") / 2**20 for dtype, name in names.items()}
    record.figures |= {f"MiB of weights, {dtype}": size for dtype, size in weights.items()}
    record.add_ratio(names["int8"], names[beside])


def _decoded(arm: Worker, number: int) -> float:
    return float(arm.call("work", number).per_second)


def _at_precision(bench: DecodingBench, dtype: Dtype, record: Record, watch: Watch, kept: Kept | None) -> None:
    few, many, mixed = f"{bench.num_slots} slots", f"{bench.many_slots} slots", f"{bench.batch} prefixes"
    with ExitStack() as stack:
        arms = {name: stack.enter_context(worker()) for name, worker in _workers(bench, dtype).items()}
        for what in (few, many, mixed):
            record.figures |= _agreement(arms, what, dtype)
        for name, arm in arms.items():
            watch(0, 1, f"warming up {name}")
            arm.call("work", 0)
        num_turns, turns = bench.rounds * len(arms), {name: partial(_decoded, arm) for name, arm in arms.items()}
        rates = interleave(turns, bench.rounds, lambda n, name: watch(n, num_turns, name), kept)
        record.rounds |= rates
        record.peak_mib |= {name: arm.call("peak_mib") for name, arm in arms.items()}
        bare = f"bare base, {dtype}"
        gigabytes_a_token = arms[bare].call("bytes_per_step") / bench.batch / 1e9
        read = Spread.of([rate * gigabytes_a_token for rate in rates[bare]]).median
        memory = arms[bare].call("read_bandwidth")
    record.figures |= {f"GB/s of weights, {bare}": read, f"GB/s that memory gives, {dtype}": memory}
    for of, to in (
        (f"ours, {few}", "bare base"), (f"ours, {few}", PLAIN), (f"PEFT, {few}", PLAIN),
        (f"ours, {many}", f"PEFT, {many}"), (f"ours, {mixed}", f"ours, {few}"), (f"ours, {mixed}", f"PEFT, {mixed}"),
    ):  # fmt: skip
        record.add_ratio(f"{of}, {dtype}", f"{to}, {dtype}")


def _workers(bench: DecodingBench, dtype: Dtype) -> dict[str, Callable[[], Worker]]:
    common = {
        "base": bench.base, "data": bench.data, "dtype": dtype, "batch": bench.batch, "new_tokens": bench.new_tokens,
        "device": bench.device,
    }  # fmt: skip
    few, many = bench.num_slots, bench.many_slots
    arms = {"bare base": ("OurDecoding", few, 0), PLAIN: ("OurDecoding", few, 0)}
    for slots in (few, many):
        arms[f"ours, {slots} slots"] = ("OurDecoding", slots, 1)
        arms[f"PEFT, {slots} slots"] = ("PeftDecoding", slots, 1)
    arms[f"ours, {bench.batch} prefixes"] = ("OurDecoding", few, bench.batch)
    arms[f"PEFT, {bench.batch} prefixes"] = ("PeftDecoding", few, bench.batch)
    with_options = {
        name: (arm, {**common, "num_slots": slots, "distinct": distinct})
        for name, (arm, slots, distinct) in arms.items()
    }
    with_options[PLAIN][1]["as_transformers"] = True
    return {
        f"{name}, {dtype}": partial(Worker, f"antefix.benchmarks.decoding:{arm}", options)
        for name, (arm, options) in with_options.items()
    }


def _agreement(arms: dict[str, Worker], what: str, dtype: Dtype) -> dict[str, float]:
    """Ours and PEFT's with the same slots have the same logits, and each writes what its own logits say."""
    ours, peft = (arms[f"{who}, {what}, {dtype}"].call("show") for who in ("ours", "PEFT"))
    logits = torch.tensor(ours.first_logits)
    difference = float((logits - torch.tensor(peft.first_logits)).abs().mean() / logits.std())
    if difference > TOLERANCE[dtype]:
        raise BenchmarkError(
            f"{dtype}, {what}: with the same slots the logits of ours and PEFT's differ by {difference:.2g} "
            "standard deviations in the mean: they do not compute the same, so nothing is timed"
        )
    for who, shown in (("ours", ours), ("PEFT", peft)):
        wrong = sum(a != b[0] for a, b in zip(shown.first_words, shown.generated, strict=True))
        # In half precision two words may be a rounding apart.
        if wrong > (0 if dtype == "float32" else len(shown.generated) // 4):
            raise BenchmarkError(f"{dtype}, {what}: {who} does not write what its own logits say ({wrong} rows)")
    same = sum(a == b for a, b in zip(ours.generated, peft.generated, strict=True))
    return {
        f"difference of logits in standard deviations, ours and PEFT, {what}, {dtype}": difference,
        f"rows that ours and PEFT write alike, {what}, {dtype}": same,
    }


def _growing(watch: Watch, total: int, axis: str, done: int, name: str) -> None:
    watch(done, total, f"growth over {axis}: {name}")


def _growth(bench: DecodingBench, watch: Watch) -> list[Curve]:
    """In the last precision: over slots, rows, and unlike prefixes, each beside the bare base."""
    dtype = bench.precisions[-1]
    few = bench.num_slots
    axes: dict[str, dict[int, tuple[int, int, int]]] = {
        "slots": {n: (n, 1, 16) for n in SLOT_COUNTS if n},
        "rows": {n: (few, 1, n) for n in BATCHES},
        "prefixes in 256 rows": {n: (few, n, 256) for n in DISTINCT},
    }
    options = {"base": bench.base, "data": bench.data, "dtype": dtype, "batch": 16, "new_tokens": 16,
               "num_slots": few, "distinct": 1, "device": bench.device}  # fmt: skip
    curves = []
    with Worker("antefix.benchmarks.decoding:OurDecoding", options) as arm:

        def rate(num_slots: int, distinct: int, batch: int, number: int) -> float:
            return float(arm.call("work_with", num_slots, distinct, batch).per_second)

        for axis, points in axes.items():
            settings = {("with prefix", n): chosen for n, chosen in points.items()}
            settings |= {("bare base", n): (few, 0, batch) for n, (_, _, batch) in points.items()}
            turns = {f"{who} {n}": partial(rate, *chosen) for (who, n), chosen in settings.items()}
            rates = interleave(turns, 3, partial(_growing, watch, 3 * len(turns), axis))
            series: dict[str, list[tuple[float, Spread]]] = {}
            for who, n in settings:
                series.setdefault(who, []).append((n, Spread.of(rates[f"{who} {n}"])))
            curves.append(Curve(title=f"decoding, {dtype}", x=axis, y="new tokens/s", series=series))
    return curves
