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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cptv_ao.errors import ScalesFileError
from cptv_ao.files import try_out
from cptv_ao.loop import Loop, Position
from cptv_ao.proposals import Proposer
from cptv_ao.report import BlockResult, Losses, Point
from cptv_ao.saved import parse_file, write_file
from cptv_ao.sites import QParams
from cptv_ao.world import ALONE, World

# In the descent it is saved again after so many seconds, or more where these would be more than a share of its time:
# the moments of Adam for each weight make large files.
_SECONDS, _SHARE = 60.0, 0.01
_DESCENT = "descent/"
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
        prints: fingerprint of the search, see `cptv_ao.fingerprint`.
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

    def resume(self, loop: Loop, proposer: Proposer | None) -> bool:
        """Bring a search to where the file left it; whether its proposals are over.

        Raises:
            ScalesFileError: the file does not hold the state of a search.
        """
        if self._found is None:
            return False
        tensors, data = self._found
        self._found = None
        try:
            _apply(loop, tensors, data)
            descent = data.get("descent")
            if descent is None or proposer is None:
                return True
            own = {key.removeprefix(_DESCENT): t for key, t in tensors.items() if key.startswith(_DESCENT)}
            proposer.resume((own, descent))
        except (KeyError, TypeError, ValueError) as error:
            raise ScalesFileError(f"{self._path}: not the checkpoint of a search ({error!r}); delete it") from error
        return False

    def pause(self, loop: Loop, proposer: Proposer, worth: bool) -> None:
        """Between two steps of the descent: save where it is worth it, or where the last time was long ago."""
        if worth or time.monotonic() >= self._due:
            self.save(loop, proposer)

    def save(self, loop: Loop, proposer: Proposer | None) -> None:
        """Write where a search is.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        if self._world.rank:
            return
        started = time.monotonic()
        tensors, data = _capture(loop)
        descent = None if proposer is None else proposer.state()
        if descent is not None:
            tensors |= {_DESCENT + key: tensor for key, tensor in descent[0].items()}
            data["descent"] = descent[1]
        try:
            write_file(self._path, tensors, {"fingerprint": self._fingerprint, **data})
        except OSError as error:
            told = f"checkpoint: cannot be written ({error.strerror})"
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


def _capture(loop: Loop) -> tuple[dict[str, Tensor], dict[str, Any]]:
    backend, now = loop.backend, loop.backend.snapshot()
    tensors = _moved(loop, "now")
    if not loop.best_is_given:
        backend.restore_all(loop.best_state)
        tensors |= _moved(loop, "best")
        backend.restore_all(now)
    data: dict[str, Any] = {
        "position": asdict(loop.position),
        "losses": {"start": asdict(loop.start), "best": asdict(loop.best), "now": loop.loss},
        "best_is_given": loop.best_is_given,
        "rejected": loop.rejected,
        "random": loop.rng.bit_generator.state,
        "step_sizes": loop.step_sizes,
        "evaluations": loop.budget.evaluations,
        "seconds": loop.budget.seconds,
        "results": [asdict(result) for result in loop.results],
        "stages": loop.stages,
        "history": [asdict(point) for point in loop.history],
        "race": loop.search.race_state(),
    }
    return tensors, data


def _moved(loop: Loop, prefix: str) -> dict[str, Tensor]:
    """Qparams of the sites that are not as where the search started."""
    tensors: dict[str, Tensor] = {}
    for name, first in loop.first_state.items():
        if not _same(loop.backend.state(name), first):
            qparams = loop.backend.read(name)
            tensors[f"{prefix}/{name}/scale"] = qparams.scale
            tensors[f"{prefix}/{name}/zero_point"] = qparams.zero_point
            for part, beside in (("shift", qparams.shift), ("correction", qparams.correction)):
                if beside is not None:
                    tensors[f"{prefix}/{name}/{part}"] = beside.clone()  # "now" and "best" may hold the same
    return tensors


def _apply(loop: Loop, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    losses = data["losses"]
    if losses["start"] != asdict(loop.start):
        raise ScalesFileError("the checkpoint started from another loss: is this another machine or thread count?")
    if data["best_is_given"]:
        loop.best_state = loop.given_state
    else:
        _write(loop, tensors, "best")
        loop.best_state = loop.backend.snapshot()
        loop.backend.restore_all(loop.first_state)
    _write(loop, tensors, "now")
    loop.position = Position(**data["position"])
    loop.best, loop.loss = Losses(**losses["best"]), float(losses["now"])
    loop.rejected = bool(data["rejected"])
    loop.rng.bit_generator.state = data["random"]
    loop.step_sizes.update(data["step_sizes"])
    loop.budget.evaluations = int(data["evaluations"])
    loop.budget.started -= float(data["seconds"])
    loop.results += [BlockResult(**result) for result in data["results"]]
    loop.stages += data["stages"]
    loop.history = [Point(**point) for point in data["history"]]
    loop.search.set_race_state(data["race"])


def _write(loop: Loop, tensors: Mapping[str, Tensor], prefix: str) -> None:
    for name in loop.first_state:
        scale = tensors.get(f"{prefix}/{name}/scale")
        if scale is not None:
            zero_point = tensors[f"{prefix}/{name}/zero_point"]
            shift, correction = (tensors.get(f"{prefix}/{name}/{part}") for part in ("shift", "correction"))
            loop.backend.write(name, QParams(scale, zero_point, shift, correction))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (int, float, str)) and bool(a == b))
