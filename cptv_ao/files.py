"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: ending of a file that is being written; one that is left over is of a process that was killed
_PARTIAL = ".partial"


@contextmanager
def at_once(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the path of an empty file beside `path`; what was written there takes its name at the end.

    After an exception the file of that name is as it was, and nothing temporary is left.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove what processes left beside a file that were killed while they wrote it."""
    target = Path(path)
    for found in target.parent.iterdir():
        if found.name.startswith(f".{target.name}.") and found.name.endswith(_PARTIAL):
            found.unlink(missing_ok=True)
