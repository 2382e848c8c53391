"""Files that somebody changes or damages, and that every damage is told."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cptv_ao
from cptv_ao.core.tensor_file import parse_file, read_file, write_file


def changed(path: Path, change: Any) -> None:
    """Rewrite a file with its tensors and JSON data changed, and a checksum that fits."""
    tensors, data = read_file(path)
    change(tensors, data)
    write_file(path, tensors, data)


def flipped(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """One bit turned: each of the first bytes, then any, the header as often as the tensors."""
    draw = random.Random(seed)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = list(range(24)) * 8 + [
        draw.randrange(*draw.choice([(header,), (header, len(whole))])) for _ in range(count)
    ]
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (number // 24 if number < 192 else draw.randrange(8))
        yield bytes(damaged)


def check_damaged(content: bytes) -> None:
    """Every way to damage a file is refused, and told as such."""
    parse_file(content, "whole")
    damaged = [*flipped(content, 400, seed=1), content + b"x", content * 2, content + bytes(4096), content[8:]]
    damaged += [content[:size] for size in range(0, len(content), 97)]
    damaged += [content.replace(b"cptv_ao", b"cptv_xx"), content.lower(), content.upper(), content[::-1]]
    for number, bad in enumerate(damaged):
        with pytest.raises(cptv_ao.ScalesFileError) as told:
            parse_file(bad, f"file {number}")
        assert str(told.value).startswith(f"file {number}: "), "the package's own words"
