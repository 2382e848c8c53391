"""What becomes of memory that is freed while a search runs."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Of malloc.h: from how many free bytes at the end of the heap on they go back to the system, and from how many on a
# block is asked for from the system on its own.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Of both while a search runs; and what glibc itself raises them to, at most, as large blocks are freed.
_KEPT, _USUAL = 2**31 - 1, {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}
# Contexts that last, of all threads.
_lock, _inside = threading.Lock(), [0]


@contextmanager
def kept_heap() -> Iterator[None]:
    """While the context lasts glibc keeps what is freed for what is asked for next; then it goes back to the system.

    By default it goes back at once, and the system clears each page of it anew when it is used again: a quarter of the
    time of a step on a transformer. Nothing is done where there is another C library, or where the environment says how
    it is to allocate.
    """
    library = _glibc()
    if library is None:
        yield
        return
    _enter(library, 1)
    try:
        yield
    finally:
        _enter(library, -1)


def _enter(library: Any, count: int) -> None:
    """Begin a context, or end one; the first and the last of those that last at a time tell the library."""
    with _lock:
        _inside[0] += count
        if _inside[0] == max(count, 0):
            for parameter, usual in _USUAL.items():
                library.mallopt(parameter, _KEPT if count > 0 else usual)
            if count < 0:
                library.malloc_trim(0)


def _glibc() -> Any:
    """The C library, if it is glibc, and nobody has told it how to allocate; else None."""
    told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        os.environ.get(name) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
    )
    try:
        library = None if told else ctypes.CDLL(None)
    except (OSError, TypeError):  # no such thing on Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
