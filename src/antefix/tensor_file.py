"""Reads the tensor file of a kept prefix, trusting nothing in it.

Only safetensors, never pickle. Names, shapes, sizes and finiteness are checked before a value is used.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from antefix.errors import PrefixFileError

TENSORS_FILE = "prefix.safetensors"

_MOST_BYTES = 8 << 30
_MOST_TENSORS = 20_000
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, checked, memory-mapped.

    Raises PrefixFileError naming the file, and the tensor where one is at fault.
    """
    if not path.is_file():
        raise PrefixFileError(f"{path}: no such file; a prefix is a folder with {TENSORS_FILE} and card.json")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise PrefixFileError(f"{path}: {size:,} bytes, more than the {_MOST_BYTES:,} a prefix may have")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > _MOST_TENSORS:
                raise PrefixFileError(f"{path}: {len(names):,} tensors, more than the {_MOST_TENSORS:,} allowed")
            return {name: _checked(path, name, file.get_tensor(name)) for name in names}
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        MemoryError,
        OverflowError,
        UnicodeError,
    ) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise PrefixFileError(f"{path}: not a readable safetensors file ({first_line}); fetch it again") from error


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not _NAME.fullmatch(name):
        raise PrefixFileError(f"{path}: tensor name {name[:60]!r} is not allowed (letters, digits, '_' and '.')")
    if tensor.dtype not in _DTYPES:
        raise PrefixFileError(f"{path}: tensor '{name}' is {tensor.dtype}, allowed are float32, bfloat16, float16")
    if tensor.numel() == 0:
        raise PrefixFileError(f"{path}: tensor '{name}' is empty, shape {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise PrefixFileError(f"{path}: tensor '{name}' holds NaN or infinity; the prefix is broken, train it again")
    return tensor
