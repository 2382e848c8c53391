"""The state of a search in a file, written after each block: killed and called again, a refine goes on from there.

The file holds the scales that are in the model and the best ones, the random generator, the step sizes, the position
and the losses, beside fingerprints of the model, the config and the data. Safetensors and JSON, no pickle.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.config import RefineConfig
from cptv_ao.data import Batch
from cptv_ao.errors import ScalesFileError
from cptv_ao.loop import Loop, Position
from cptv_ao.report import BlockResult, Losses, Point
from cptv_ao.saved import read_file, write_file
from cptv_ao.sites import QParams

# Settings that say when to stop, or where things are held: a search may go on with others.
_FREE = {"max_seconds", "max_evaluations", "cache_bytes", "accept_on"}


class Checkpoint:
    """Saves a search into a file, and brings one back.

    Args:
        path: of the file.
        backend: of the model as it was given.
        config, batches: of the search.
    """

    def __init__(
        self, path: str | os.PathLike[str], backend: Backend, config: RefineConfig, batches: Iterable[Batch]
    ) -> None:
        self._path = Path(path)
        self._fingerprint = {"model": _of_model(backend), "config": _of_config(config), "data": _of_data(batches)}

    def resume(self, loop: Loop) -> bool:
        """Bring a search to where the file left it; False where there is no file.

        Raises:
            ScalesFileError: the file is damaged, or of another model, config or data; the difference is named.
        """
        if not self._path.exists():
            return False
        tensors, data = read_file(self._path)
        self._check(data.get("fingerprint"))
        try:
            _apply(loop, tensors, data)
        except (KeyError, TypeError, ValueError) as error:
            raise ScalesFileError(f"{self._path}: not the checkpoint of a search ({error!r}); delete it") from error
        return True

    def save(self, loop: Loop) -> None:
        """Write where a search is."""
        tensors, data = _capture(loop)
        write_file(self._path, tensors, {"fingerprint": self._fingerprint, **data})

    def _check(self, saved: Any) -> None:
        if not isinstance(saved, dict):
            raise ScalesFileError(f"{self._path}: not the checkpoint of a search; give another path or delete it")
        for part, mine in self._fingerprint.items():
            theirs = saved.get(part)
            if theirs == mine:
                continue
            told = ""
            if isinstance(mine, dict) and isinstance(theirs, dict):
                name = next(n for n in mine if mine[n] != theirs.get(n))
                told = f": {name} is {theirs.get(name)} there and {mine[name]} here"
            raise ScalesFileError(
                f"{self._path} is the checkpoint of a search with another {part}{told}; give what it was started with, "
                "or another path"
            )


def _capture(loop: Loop) -> tuple[dict[str, Tensor], dict[str, Any]]:
    backend, now = loop.backend, loop.backend.snapshot()
    tensors = _moved(loop, "now")
    backend.restore_all(loop.best_state)
    tensors |= _moved(loop, "best")
    backend.restore_all(now)
    data: dict[str, Any] = {
        "position": asdict(loop.position),
        "losses": {"start": asdict(loop.start), "best": asdict(loop.best), "now": loop.loss},
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
    """Qparams of the sites that are not as they were given."""
    tensors: dict[str, Tensor] = {}
    for name, given in loop.given_state.items():
        if not _same(loop.backend.state(name), given):
            qparams = loop.backend.read(name)
            tensors[f"{prefix}/{name}/scale"] = qparams.scale
            tensors[f"{prefix}/{name}/zero_point"] = qparams.zero_point
    return tensors


def _apply(loop: Loop, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    losses = data["losses"]
    if losses["start"] != asdict(loop.start):
        raise ScalesFileError("the checkpoint started from another loss: is this another machine or thread count?")
    _write(loop, tensors, "best")
    loop.best_state = loop.backend.snapshot()
    loop.backend.restore_all(loop.given_state)
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
    for name in loop.given_state:
        scale = tensors.get(f"{prefix}/{name}/scale")
        if scale is not None:
            loop.backend.write(name, QParams(scale, tensors[f"{prefix}/{name}/zero_point"]))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (int, float)) and bool(a == b))


def _of_model(backend: Backend) -> str:
    digest = hashlib.sha256(backend.model.code.encode())
    for name, site in backend.sites.items():
        qparams = backend.read(name)
        _add(digest, qparams.scale, qparams.zero_point)
        if site.kind == "weight" and not site.fixed:
            _add(digest, backend.weight(name).int_repr())
    for name, weight in backend.float_weights.items():
        digest.update(name.encode())
        _add(digest, weight)
    return digest.hexdigest()


def _of_config(config: RefineConfig) -> dict[str, str]:
    """Each setting in words; functions by their name."""
    return {name: value for name, value in config.told().items() if name not in _FREE}


def _of_data(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in (*enumerate(batch.args), *batch.kwargs.items()):
            digest.update(f"{name} {getattr(value, 'shape', value)} {getattr(value, 'dtype', '')}".encode())
            if isinstance(value, Tensor):
                _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, *tensors: Tensor) -> None:
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
