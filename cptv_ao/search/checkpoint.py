"""The state of a search in a file, written in the descent and after each block: killed and called again, a refine goes
on from there.

The file holds the scales that are in the model and the best ones, the random generator, the step sizes, the position
and the losses, where the descent is, and fingerprints of the model, the config and the data. Safetensors and JSON, no
pickle.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptv_ao.core.atomic_file import try_out
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.errors import ScalesFileError
from cptv_ao.core.tensor_file import parse_file, write_file
from cptv_ao.evaluation.cost import Seconds
from cptv_ao.search.state import Resumable, SearchState, from_file, image_seconds, to_file

# In the descent it is saved again after so many seconds, or more where these would be more than a share of its time:
# the moments of Adam for each weight make large files.
_SECONDS, _SHARE = 60.0, 0.01
_MEND = "delete it to search from the start, or give another path"


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse a path that no checkpoint can be written to, before hours are spent.

    Raises:
        OSError: the folder is not there, is none, or nothing can be written in it; there is something that is no file.
        TypeError: this is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"checkpoint: expected a path, got {type(path).__name__}")
    try:
        try_out(path)
    except OSError as error:
        if error.errno is None:
            raise type(error)(f"checkpoint: {error}") from error
        told = f"checkpoint: cannot write in its folder ({error.strerror})"
        raise type(error)(error.errno, told, str(path)) from error


class Checkpoint:
    """Saves a search into a file, and brings one back.

    Args:
        path: of the file.
        prints: fingerprint of the search, see `cptv_ao.search.fingerprint`.
        world: the ranks of the search; the file is rank 0's, and no other rank needs to see it.

    Raises:
        ScalesFileError: the file is there, and is damaged, or of another model, config or data; the difference is
            named.
    """

    def __init__(self, path: str | os.PathLike[str], prints: Mapping[str, Any], world: World = ALONE) -> None:
        self._path, self._world, self._fingerprint = Path(path), world, dict(prints)
        self._due = time.monotonic() + _SECONDS
        here = world.rank == 0 and self._path.exists()
        content = world.bytes_from_first(self._path.read_bytes() if here else None)
        self._found = None if content is None else parse_file(content, self._path, _MEND)
        if self._found is not None:
            self._check(self._found[1].get("fingerprint"))

    @property
    def found(self) -> bool:
        """Whether there is a search to go on with."""
        return self._found is not None

    @property
    def image_seconds(self) -> Seconds | None:
        """What the search there measured to plan by; None where there is none."""
        if self._found is None:
            return None
        try:
            return image_seconds(self._found[1])
        except (KeyError, ValueError) as error:
            raise self._fault(error) from error

    def resume(self, search: Resumable) -> SearchState | None:
        """Bring a search to where the file left it; None where there is none to go on with.

        Raises:
            ScalesFileError: the file does not hold the state of a search, or its scales are not what it says.
        """
        if self._found is None:
            return None
        (tensors, data), self._found = self._found, None
        try:
            state = from_file(tensors, data)
            search.resume(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._fault(error) from error
        # The scales are here again; their losses are what they are scored to be, whatever the file says.
        if fault := state.record.losses.fault(search.score_again()):
            raise ScalesFileError(f"{self._path}: {fault}; {_MEND}")
        return state

    def _fault(self, error: Exception) -> ScalesFileError:
        return ScalesFileError(f"{self._path}: not the checkpoint of a search ({error!r}); {_MEND}")

    @property
    def due(self) -> bool:
        """Whether the last time was long ago."""
        return time.monotonic() >= self._due

    def save(self, search: Resumable) -> None:
        """Write where a search is.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        if self._world.rank:
            return
        started = time.monotonic()
        tensors, data = to_file(search.state())
        try:
            write_file(self._path, tensors, {"fingerprint": self._fingerprint, **data})
        except OSError as error:
            told = f"checkpoint: cannot be written ({error.strerror or error})"
            if self._path.exists():
                told += "; what was saved before is whole: make room, and call again to go on from there"
            raise type(error)(error.errno, told, str(self._path)) from error
        now = time.monotonic()
        self._due = now + max(_SECONDS, (now - started) / _SHARE)

    def _check(self, saved: Any) -> None:
        if not isinstance(saved, dict):
            raise ScalesFileError(f"{self._path}: not the checkpoint of a search; give another path or delete it")
        for part, mine in self._fingerprint.items():
            theirs = saved.get(part)
            if theirs != mine:
                raise ScalesFileError(
                    f"{self._path} is the checkpoint of a search with another {part}{_difference(mine, theirs)}; give "
                    "what it was started with, or another path"
                )


def _difference(mine: Any, theirs: Any) -> str:
    """The first setting that differs, in words."""
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return ""
    for name in (*mine, *theirs):
        if mine.get(name) != theirs.get(name):
            there, here = (held.get(name, "no setting") for held in (theirs, mine))
            return f": {name} is {there} there and {here} here"
    return ""
