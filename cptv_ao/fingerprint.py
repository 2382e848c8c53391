"""What makes a search the search it is: digests of its model and data, and its settings in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.config import RefineConfig
from cptv_ao.data import Batch, leaves

# Settings that say when to stop, or where things are held: a search may go on with others.
_FREE = {"max_seconds", "max_evaluations", "cache_bytes", "accept_on", "distributed"}


def fingerprint(backend: Backend, config: RefineConfig, batches: Iterable[Batch]) -> dict[str, Any]:
    """Of the model as it was given (`model`), the settings (`config`) and the images (`data`); JSON-safe."""
    return {"model": _of_model(backend), "config": _of_config(config), "data": _of_data(batches)}


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
        for path, value in (*leaves(batch.args), *leaves(batch.kwargs)):
            name = ".".join(map(str, path))
            digest.update(f"{name} {getattr(value, 'shape', value)} {getattr(value, 'dtype', '')}".encode())
            if isinstance(value, Tensor):
                _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, *tensors: Tensor) -> None:
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
