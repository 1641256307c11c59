"""What the arms of a benchmark have in common: a base, encoded pairs, slots that all are given, peak memory."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from antefix.base import Base, Dtype, load_base
from antefix.data import read
from antefix.data.encode import Encoded, EncodedExample, Limits, encode
from antefix.data.linearise import default_format
from antefix.errors import BenchmarkError
from antefix.interop.peft import split_matrix
from antefix.methods import method_class
from antefix.methods.base import MethodModule
from antefix.sites import find_sites

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's mallopt."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Work:
    """What a turn did."""

    count: int
    """Pairs in training, new tokens in decoding."""
    seconds: float

    @property
    def per_second(self) -> float:
        return self.count / self.seconds


def load_workload(
    base: str, data: str, dtype: Dtype, sample: int | None = None, device: str = "cpu"
) -> tuple[Base, Encoded]:
    """A base, and the pairs of a data file as token ids.

    sample: only so many pairs, drawn one by one (with a fixed seed), whatever source they belong to.
    """
    loaded = load_base(base, dtype=dtype, device=device)
    examples = [e for e in read(data) if e.targets]
    text_format = default_format([e.source for e in examples])
    encoded = encode(examples, text_format, loaded.tokenizer, Limits(context=loaded.context_length))
    return loaded, encoded if sample is None else _drawn(encoded, sample)


def _drawn(encoded: Encoded, sample: int) -> Encoded:
    pairs = [(n, t) for n, e in enumerate(encoded.examples) for t in range(len(e.targets))]
    chosen: dict[int, list[int]] = {}
    for n, t in random.Random(0).sample(pairs, min(sample, len(pairs))):
        chosen.setdefault(n, []).append(t)
    examples = (
        EncodedExample(encoded.examples[n].source, tuple(encoded.examples[n].targets[t] for t in targets))
        for n, targets in chosen.items()
    )
    return Encoded(tuple(examples), 0, 0)


def with_sources(data: Encoded, source_tokens: int) -> Encoded:
    """200 examples with their targets, on sources of so many tokens drawn from the data's: the same for every arm."""
    draw, examples = random.Random(source_tokens), data.examples[:200]
    tokens = sorted({token for e in examples for token in e.source})
    made = (EncodedExample(tuple(draw.choices(tokens, k=source_tokens)), e.targets) for e in examples)
    return Encoded(tuple(made), 0, 0)


def common_slots(model: PreTrainedModel, num_slots: int, seed: int = 0) -> Tensor:
    """Random slots as PEFT holds them, (P, layers * 2 * G * D): the same in every arm that asks for this seed."""
    widths = sum(s.num_key_value_heads * (s.key_width + s.value_width) for s in find_sites(model).attention)
    return 0.3 * torch.randn(num_slots, widths, generator=torch.Generator().manual_seed(seed))


def our_prefix(model: PreTrainedModel, slots: Tensor) -> MethodModule:
    """PEFT's matrix as a prefix of ours, its positions shifted as PEFT has them."""
    sites = find_sites(model)
    method = method_class("prefix_tuning")
    config = method.Config.model_validate({"num_virtual_tokens": slots.shape[0], "positions": "shifted"})
    return method.restore(sites, config, split_matrix(slots, sites.attention)).to(model.device)


def parameters_in_products(model: PreTrainedModel) -> tuple[int, int]:
    """How many weights the layers' matrix products have, and the output head's."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    products = (nn.Linear, Conv1D)
    layers = sum(int(m.weight.numel()) for m in model.modules() if isinstance(m, products) and m is not head)
    return layers, sum(p.numel() for p in head.parameters())


def finish(device: torch.device) -> None:
    """Wait for what a device was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_mib_on(device: torch.device, work: Callable[[], object]) -> float:
    """How far a piece of work takes the memory that tensors use above where it stands, in MiB.

    On the processor see `peak_mib`; on an accelerator it is what its allocator has given out. The work is done once
    before.
    """
    if device.type == "cpu":
        return peak_mib(work)
    work()
    gc.collect()
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    work()
    return (torch.accelerator.max_memory_allocated(device) - before) / 2**20


def peak_mib(work: Callable[[], object]) -> float:
    """How far a piece of work takes this process's memory above where it stands, in MiB.

    The work is done once before, so that what is kept from then on (code, the model's pages) counts for nothing. From
    here on this process gives freed memory back at once: the peak is of what is in use, not of holes between that.
    Raises BenchmarkError where the system cannot tell (only Linux with glibc can).
    """
    try:
        library = ctypes.CDLL(None)
        for what in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            library.mallopt(what, 65_536)
        work()
        gc.collect()
        library.malloc_trim(0)
        before = _memory_mib("VmRSS")
        _CLEAR.write_text("5", encoding="ascii")
        work()
        return _memory_mib("VmHWM") - before
    except (OSError, AttributeError) as error:
        raise BenchmarkError(f"peak memory cannot be measured here: {error}") from error


def _memory_mib(name: str) -> float:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines[name].split()[0]) / 1024
