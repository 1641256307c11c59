"""Memory that is no longer used, given back to the system.

What refers to itself in a circle, as attached modules and their hooks do, is found by Python's collector alone, whose
full pass comes rarely: prefixes that left the memory would stay for minutes. The C library keeps freed blocks that lie
between others for what comes next; where texts have all lengths, blocks have all sizes, and a process that computes for
days holds ever more that it does not use.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def settle() -> None:
    """What is here now stays: `give_back` need not look at it, which would take it longer than all else."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Circles that nobody refers to, and free pages where the C library can give them (glibc); tens of ms."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
