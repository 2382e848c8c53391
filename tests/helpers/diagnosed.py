"""Diagnoses of small networks, and what is read from them."""

from __future__ import annotations

from typing import Any

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.qparams import QParams
from helpers.cases import Case


def diagnosed(case: Case, **arguments: Any) -> cptv_ao.Diagnosis:
    given = {"float_model": case.float_model, "progress": False} | arguments
    return cptv_ao.diagnose(case.converted, case.batches, **given)


def rescale(case: Case, name: str, factor: float) -> None:
    backend = Backend(case.converted)
    now = backend.read(name)
    backend.write(name, QParams(now.scale * factor, now.zero_point))


def site(found: cptv_ao.Diagnosis, name: str) -> Any:
    return next(s for s in found.sites if s.name == name)


def block(found: cptv_ao.Diagnosis, name: str) -> Any:
    return next(b for b in found.blocks if b.name == name)
