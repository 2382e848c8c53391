"""What makes a search the search it is: digests of its model and data, and its settings in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.blocks import find_blocks
from cptv_ao.core.config import RefineConfig, name_of
from cptv_ao.core.identity import Identity
from cptv_ao.core.nested import leaves
from cptv_ao.core.tensors import raw

# Settings that say when to stop, or where things are held: a search may go on with others.
_FREE = {"max_seconds", "max_evaluations", "cache_bytes", "accept_on", "distributed"}


class Fingerprint(NamedTuple):
    """Of a search.

    Attributes:
        parts: of the model as it was given (`model`), the settings (`config`) and the images (`data`); JSON-safe.
        unseen: what of the settings cannot be compared with that of another process, see `Identity`.
    """

    parts: dict[str, Any]
    unseen: tuple[str, ...]


def fingerprint(backend: Backend, config: RefineConfig, batches: Iterable[Batch]) -> Fingerprint:
    """Of what is searched, how and on what."""
    identity = Identity()
    settings = _of_config(config, backend, identity)
    parts = {"model": _of_model(backend), "config": settings, "data": _of_data(batches)}
    return Fingerprint(parts, tuple(identity.unseen))


def _of_model(backend: Backend) -> str:
    digest = hashlib.sha256(backend.model.code.encode())
    for name, site in backend.sites.items():
        qparams = backend.read(name)
        _add(digest, qparams.scale, qparams.zero_point, qparams.correction)
        if site.kind == "weight" and not site.fixed:
            _add(digest, backend.weight(name).int_repr())
    for name, weight in backend.float_weights.items():
        digest.update(name.encode())
        _add(digest, weight)
    return digest.hexdigest()


def _of_config(config: RefineConfig, backend: Backend, identity: Identity) -> dict[str, str]:
    """Each setting in words; functions by name and digest, the policy of the blocks by the blocks that it gives."""
    settings = {name: value for name, value in config.told().items() if name not in _FREE}
    for name in settings:
        value = getattr(config, name)
        if isinstance(value, Mapping):
            settings[name] += f" ({_short(identity.of(dict(value)))})"
        elif callable(value):
            settings[name] = f"{name_of(value)} ({_short(identity.of(value))})"
    found = find_blocks(backend.sites.values(), config.blocks)
    blocks = [(block.name, [site.name for site in block.sites]) for block in found]
    settings["blocks"] = f"{len(blocks)} blocks ({_short(identity.of(blocks))})"
    return settings


def _short(digest: bytes) -> str:
    return digest.hex()[:16]


def _of_data(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for path, value in (*leaves(batch.args), *leaves(batch.kwargs)):
            name = ".".join(map(str, path))
            digest.update(f"{name} {getattr(value, 'shape', value)} {getattr(value, 'dtype', '')}".encode())
            if isinstance(value, Tensor):
                _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            digest.update(raw(tensor))
