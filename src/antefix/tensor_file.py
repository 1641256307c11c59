"""Reads the tensor file of a kept prefix, trusting nothing in it.

Only safetensors, never pickle. Sizes, names, types, shapes and finiteness are checked before a value is used, in
this order, so that a hostile file costs no memory. `docs/format.md` has the rules.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from antefix import strict_json
from antefix.errors import PrefixFileError, one_line

TENSORS_FILE = "prefix.safetensors"

MOST_BYTES = 8 << 30
MOST_HEADER_BYTES = 8 << 20
MOST_TENSORS = 20_000
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}", re.ASCII)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in a file."""
_MOST_AXES = 8


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, checked, memory-mapped.

    Raises PrefixFileError naming the file, and the tensor where one is at fault.
    """
    try:
        header, header_bytes = _header(path)
        with safe_open(path, framework="pt") as file:  # no tensor overlaps another, or has another size than it says
            names = list(file.keys())
        if not 0 < len(names) <= MOST_TENSORS:
            raise PrefixFileError(f"{path}: {len(names):,} tensors, allowed are 1 to {MOST_TENSORS:,}")
        for name in names:
            if not _NAME.fullmatch(name):
                raise PrefixFileError(
                    f"{path}: tensor name '{one_line(name, 60)}' is not allowed (letters, digits, '_' and '.')"
                )
            if header[name]["dtype"] not in _DTYPES:
                allowed = ", ".join(_DTYPES)
                raise PrefixFileError(f"{path}: tensor '{name}' is {header[name]['dtype']}, allowed are {allowed}")
        # Mapped here: what safetensors (0.8) maps leaves two integers of every tensor behind, for good.
        content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        values = content[8 + header_bytes :]
        tensors = {name: _mapped(values, header[name]) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
        reason = one_line(error) or type(error).__name__
        raise PrefixFileError(f"{path}: not a readable safetensors file ({reason}); fetch it again") from error
    for name, tensor in tensors.items():
        if problem := problem_of(tensor):
            raise PrefixFileError(f"{path}: tensor '{name}' {problem}")
    return tensors


def _mapped(values: Tensor, said: dict[str, Any]) -> Tensor:
    """values: the bytes behind the header; said: of this tensor there."""
    begin, end = said["data_offsets"]
    raw, dtype = values[begin:end], _DTYPES[said["dtype"]]
    if raw.storage_offset() % dtype.itemsize:  # from a writer who does not pad the header
        raw = raw.clone()
    return raw.view(dtype).view(said["shape"])


def problem_of(tensor: Tensor) -> str | None:
    """What forbids a tensor in a kept prefix, None if nothing does."""
    if tensor.dtype not in _DTYPES.values():
        return f"is {tensor.dtype}, allowed are float32, bfloat16, float16"
    if tensor.numel() == 0 or tensor.ndim > _MOST_AXES:
        shape = one_line(tuple(tensor.shape), 60)
        return f"has shape {shape}, allowed are 1 to {_MOST_AXES} axes and no empty one"
    # Smallest and largest tell it (NaN spreads to both) without a second tensor of this size.
    if not all(math.isfinite(float(extreme)) for extreme in tensor.aminmax()):
        return "holds NaN or infinity: the prefix is broken, train it again"
    return None


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file. Raises PrefixFileError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PrefixFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes it has.

    Checked for what safetensors would only find out late, or not at all (of a name that occurs twice it takes one).
    """
    if not path.is_file():
        raise PrefixFileError(f"{path}: no such file")
    num_bytes = path.stat().st_size
    if num_bytes > MOST_BYTES:
        raise PrefixFileError(f"{path}: {num_bytes:,} bytes, more than the {MOST_BYTES:,} a prefix may have")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MOST_HEADER_BYTES:
            raise PrefixFileError(
                f"{path}: its header claims {header_bytes:,} bytes, allowed are {MOST_HEADER_BYTES:,}; fetch it again"
            )
        return strict_json.parse(file.read(header_bytes)), header_bytes
