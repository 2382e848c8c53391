"""Files that are there whole, or not at all; and what is no file, and never replaced by one."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import SpecialFileError, copymode
from typing import TextIO

#: ending of a file that is being written; one that is left over is of a process that was killed
_PARTIAL = ".partial"
_STDOUT, _STDERR = 1, 2


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that is written for a path: the one that a symlink leads to, which may not be there yet.

    Raises:
        FileNotFoundError, NotADirectoryError: its folder is not there, or is none.
        IsADirectoryError, SpecialFileError: a folder, or a FIFO, a socket or a device, is there.
        PermissionError: the file is there, and may not be written.
        OSError: symlinks that lead in a circle.
    """
    target = Path(path)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if not target.parent.exists():
        raise FileNotFoundError(f"the folder {target.parent} does not exist; create it first")
    if not target.parent.is_dir():
        raise NotADirectoryError(f"expected a file in a folder, {target.parent} is none")
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"expected the path of a file, got the folder {path}; add a file name")
    if not stat.S_ISREG(mode):
        raise SpecialFileError(f"expected the path of a file, got {_special(mode)}, {path}; give another path")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{path} is there already and may not be written; give another path")
    return target


@contextmanager
def at_once(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the path of an empty file beside `path`; what was written there takes its name at the end.

    A symlink stays: the file that it leads to is written. Who may read it stays, too, where it was there before; other
    hard links of that one keep the old content. After an exception the file of that name is as it was, and nothing
    temporary is left.

    Raises:
        OSError: the folder is missing, read-only or full; see also `target_of`.
    """
    target = target_of(path)
    temporary = _create(target)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        if target.exists():
            copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def try_out(path: str | os.PathLike[str]) -> None:
    """Whether `at_once` can write there, before there is anything to write. Removes what processes left beside the file
    that were killed while they wrote it.

    Raises:
        OSError: it cannot.
    """
    target = target_of(path)
    for found in target.parent.iterdir():
        if found.name.startswith(f".{target.name}.") and found.name.endswith(_PARTIAL):
            found.unlink(missing_ok=True)
    temporary = _create(target)
    try:
        temporary.write_bytes(b"x")
    finally:
        temporary.unlink(missing_ok=True)


def straight(path: str | os.PathLike[str]) -> TextIO | None:
    """Open what text is written straight into: this process's own output by whatever name (`/dev/stdout`), a FIFO, or a
    device that takes characters. None for what is a file, or is not there.

    Raises:
        SpecialFileError: a socket, or a device that takes blocks.
        OSError: it cannot be opened.
    """
    if (own := _own_output(path)) is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        return open(os.dup(own), "w", encoding="utf-8", newline="")
    if takes_text(path):
        return open(path, "w", encoding="utf-8", newline="")
    if is_special(path):
        raise SpecialFileError(f"expected a file, a FIFO or a terminal, got {_special(os.stat(path).st_mode)}, {path}")
    return None


def takes_text(path: str | os.PathLike[str]) -> bool:
    """Whether a FIFO, or a device that takes characters, is there."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether something is there that is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_own_output(path: str | os.PathLike[str]) -> bool:
    """Whether this process prints into it."""
    return _own_output(path) is not None


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths are one file: by other names, through symlinks or hard links, there already or not."""
    if os.path.realpath(a) == os.path.realpath(b):
        return True
    with suppress(OSError):
        return os.path.samefile(a, b)
    return False


def _create(target: Path) -> Path:
    """A new empty file beside one."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _own_output(path: str | os.PathLike[str]) -> int | None:
    for descriptor in (_STDOUT, _STDERR):
        with suppress(OSError):  # not there, or closed
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def _special(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "something else")
