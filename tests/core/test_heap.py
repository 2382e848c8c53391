"""Memory that is freed while a search runs is kept for what comes next, and goes back afterwards."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from cptv_ao.core import heap

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library")

# How many pages the system clears while blocks are asked for, written and freed: without a context, inside of one,
# inside of one that another is in, in the outer one behind it, and behind both.
_PROGRAM = """
import resource, numpy
from cptv_ao.core.heap import kept_heap

def cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [numpy.ones(2 ** 18) for _ in range(50)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cleared()
found = [cleared()]
with kept_heap():
    cleared()
    found.append(cleared())
    with kept_heap():
        found.append(cleared())
    found.append(cleared())
found.append(cleared())
print(*found)
"""


def _pages(**environment: str) -> list[int]:
    """In a process of its own, whose heap nobody else has used."""
    told = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment, check=True)
    return [int(pages) for pages in told.stdout.split()]


def test_what_is_freed_is_used_again_while_the_context_lasts(clean_environment: dict[str, str]) -> None:
    outside, inside, nested, behind_nested, behind = _pages(**clean_environment)
    if outside < 10_000:
        pytest.skip("the system's pages are so large that clearing them is not seen by their number")
    assert max(inside, nested, behind_nested) < outside / 20
    assert behind > outside / 2


@pytest.mark.parametrize(
    "told", [{"MALLOC_TRIM_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"}]
)
def test_what_the_environment_says_holds(clean_environment: dict[str, str], told: dict[str, str]) -> None:
    outside, inside, *_ = _pages(**clean_environment, **told)
    assert inside > outside / 2


def test_nothing_is_done_where_the_c_library_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.kept_heap():
        assert heap._inside == [0]


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """Of a process that is told nothing of how to allocate."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
