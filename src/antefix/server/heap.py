"""Memory that was freed, given back to the system.

The C library keeps freed blocks that lie between others for what comes next. Where texts have all lengths, blocks have
all sizes, and a process that computes for days holds ever more that it does not use.
"""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Free pages go to the system where the C library can do that (glibc); it takes some 20 ms."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
