"""Scales in a file: what a refine found, for another conversion of the same model. Safetensors, no pickle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.rollback import restored_on_error
from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.atomic_file import target_of
from cptv_ao.core.contexts import without_torch_floods
from cptv_ao.core.errors import ScalesFileError
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.tensor_file import read_file, write_file
from cptv_ao.core.tensors import raw
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.equalize import replaceable
from cptv_ao.transforms.returned_norms import ends_turned, has_place, with_layers

_BESIDE = "beside."


def save_scales(model: GraphModule, path: str | os.PathLike[str]) -> None:
    """Write all scales, zero_points and weight codes of a quantized model into a file.

    The file is written beside its name and then renamed: it is there whole, or not at all. A symlink stays, and the
    file that it leads to is written.

    Args:
        model: what `convert_fx` or `convert_pt2e` returned, refined or not.
        path: of a `.safetensors` file. Per site: scale (float64) and zero_point (int64) of its shape, and of a weight
            its codes (int8; of a constant also uint8); what a refine may have replaced of norms and biases, and what it
            has added to these; the site table, and digests of all other parameters, as JSON among the metadata.

    Raises:
        UnsupportedModelError: the model is not quantized.
        OSError: the file cannot be written, or is none (a folder, a FIFO, a device).
    """
    target_of(path)
    with without_torch_floods():
        backend = Backend(model)
        tensors: dict[str, Tensor] = {}
        for name, site in backend.sites.items():
            qparams = backend.read(name)
            tensors[f"{name}.scale"], tensors[f"{name}.zero_point"] = qparams.scale, qparams.zero_point
            if site.kind == "weight" and not site.fixed:
                tensors[f"{name}.codes"] = backend.weight(name).int_repr().contiguous()
        held = replaceable(backend)
        tensors |= {_BESIDE + part: fetch(model, part).detach().float().clone() for part in held}
        for name in _biased(backend):
            tensors[f"{name}.bias"] = _or_empty(backend.weights.slot(name).bias())
            if (correction := backend.weights.biases.correction(name)) is not None:
                tensors[f"{name}.given"] = _or_empty(backend.weights.biases.given(name))
                tensors[f"{name}.correction"] = correction.clone()
    sites = [_described(site) for site in backend.sites.values()]
    data = {"sites": sites, "parameters": _parameters(backend, held), "rotated_back": ends_turned(model)}
    write_file(path, tensors, data)


def load_scales(model: GraphModule, path: str | os.PathLike[str]) -> GraphModule:
    """Put the scales of a file into a quantized model, in place; returns the model.

    Its outputs are then those of the model that was saved, bit for bit: what the file does not hold must be equal in
    both. No float model is needed: the weight codes are in the file.

    Args:
        model: another conversion of the model that was saved.
        path: what `save_scales` wrote.

    Raises:
        ScalesFileError: the file is damaged (by one bit, too), of another kind, or of a model with other sites or
            parameters (the first difference is named); the model is untouched.
        UnsupportedModelError: see `Backend.write_exactly`; the model is untouched.
        InvalidScaleError: a scale of the file is not finite or not > 0; the model is untouched.
    """
    tensors, data = read_file(path)
    with without_torch_floods():
        backend = Backend(model)
        _same_sites(path, backend, data.get("sites"))
        with _layers_of(path, model, data.get("rotated_back"), tensors):
            _load(path, backend, tensors, data)
    return model


def _load(path: Any, backend: Backend, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Put what a file holds into a model of the same sites, and with the same layers behind returned norms."""
    model, held = backend.model, replaceable(backend)
    _same_parameters(path, _parameters(backend, held), data.get("parameters"))
    values = {name: _value(path, backend, site, tensors) for name, site in backend.sites.items()}
    beside = {part: tensors[_BESIDE + part] for part in held if _BESIDE + part in tensors}
    given = {name: tensors[f"{name}.bias"] for name in _biased(backend) if f"{name}.bias" in tensors}
    for part, value in beside.items():
        _expect_like(path, part, fetch(model, part), value)
    biases = {name: _bias(path, backend, name, bias) for name, bias in given.items()}
    corrected = {name: _corrected(name, tensors) for name in given if f"{name}.correction" in tensors}
    with torch.inference_mode(False), torch.no_grad(), restored_on_error(model, backend):
        with backend.writing():
            for name, (qparams, codes) in values.items():
                backend.write_exactly(name, qparams, codes, biases.get(name))
        for part, value in beside.items():
            backend.rewrites.put(held[part], part, value.to(fetch(model, part).dtype))
    backend.weights.biases.know(corrected)
    backend.weights.biases.remember()


def _layers_of(
    path: Any, model: GraphModule, saved: Any, tensors: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """The model with the layers behind returned norms that the one in a file had."""
    ends = saved if isinstance(saved, dict) else {}
    weights = {name: tensors.get(f"{_BESIDE}{name}.weight", torch.zeros(0)) for name in ends}
    for name, end in ends.items():
        if weights[name].dim() != 2 or not has_place(model, end, name):
            raise ScalesFileError(f"{path} is of another model: it has a linear layer {name} behind {end} there")
    return with_layers(model, ends, {name: len(weight) for name, weight in weights.items()})


def _described(site: ScaleSite) -> dict[str, Any]:
    return {"name": site.name, "kind": site.kind, "op": site.op, "shape": list(site.shape)}


def _same_sites(path: Any, backend: Backend, saved: Any) -> None:
    own = [_described(site) for site in backend.sites.values()]
    if not isinstance(saved, list):
        raise ScalesFileError(f"{path}: expected the site table of a model, found none; was it written by save_scales?")
    for index, (mine, theirs) in enumerate(zip(own, saved, strict=False)):
        if mine != theirs:
            raise ScalesFileError(f"{path} is of another model: site {index} is {theirs} there and {mine} here")
    if len(own) != len(saved):
        raise ScalesFileError(f"{path} is of another model: it has {len(saved)} sites, this one {len(own)}")


def _parameters(backend: Backend, beside: Collection[str]) -> dict[str, str]:
    """Digests of the float parameters that no such file holds, by path: norms, and layers that are not quantized.

    Args:
        beside: paths of those that it holds, beside what is of a site.
    """
    slots = [
        backend.weights.slot(site.name).float_at for site in backend.sites.values() if site.name in backend.weights
    ]
    held = {*backend.tensors, *slots}
    found = dict[str, str]()
    for path, value in backend.model.named_parameters(remove_duplicate=False):
        if value.is_floating_point() and path not in beside and TensorSlot.of(backend.model, path) not in held:
            found[path] = hashlib.sha256(raw(value)).hexdigest()[:16]
    return found


def _same_parameters(path: Any, own: Mapping[str, str], saved: Any) -> None:
    """Of those that both have: a graph that is not folded has more."""
    for name, digest in saved.items() if isinstance(saved, dict) else ():
        if own.get(name, digest) != digest:
            raise ScalesFileError(f"{path} is of another model: {name} holds other numbers there")


def _value(
    path: Any, backend: Backend, site: ScaleSite, tensors: Mapping[str, Tensor]
) -> tuple[QParams, Tensor | None]:
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "scale": (torch.float64, site.shape),
        "zero_point": (torch.int64, site.shape),
    }
    if site.kind == "weight" and not site.fixed:
        codes = backend.weight(site.name).int_repr()
        wanted["codes"] = (codes.dtype, tuple(codes.shape))
    found: dict[str, Tensor] = {}
    for part, (dtype, shape) in wanted.items():
        tensor = tensors.get(f"{site.name}.{part}")
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            got = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ScalesFileError(f"{path}: {site.name}.{part}: expected {dtype} of shape {shape}, got {got}")
        found[part] = tensor
    qparams = QParams(found["scale"], found["zero_point"])
    if "codes" in wanted or site.kind == "activation":
        qparams.checked(site)
    elif not torch.equal(backend.read(site.name).scale, qparams.scale):
        raise ScalesFileError(f"{path} is of another model: {site.name} has other scales there ({site.fixed})")
    return qparams, found.get("codes")


def _biased(backend: Backend) -> list[str]:
    """Weights whose layers may have another bias than the conversion gave them."""
    return [name for name, site in backend.sites.items() if not site.fixed and backend.correctable(name)]


def _or_empty(bias: Tensor | None) -> Tensor:
    """A bias as it is saved: where there is none, as an empty tensor."""
    return torch.zeros(0) if bias is None else bias.detach().clone()


def _corrected(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """What a layer was given, and what was added to it."""
    given = tensors.get(f"{name}.given", torch.zeros(0))
    return given if given.numel() else None, tensors[f"{name}.correction"]


def _bias(path: Any, backend: Backend, name: str, saved: Tensor) -> Tensor | None:
    """What the layer of a weight gets; None where it has no bias, and none was saved (as an empty tensor)."""
    own = backend.weights.slot(name).bias()
    if not saved.numel():
        return None if own is None else torch.zeros_like(own)
    _expect_like(path, f"{name}.bias", torch.zeros(len(backend.weight(name))) if own is None else own, saved)
    return saved


def _expect_like(path: Any, name: str, own: Tensor, found: Tensor) -> None:
    if found.shape != own.shape or not found.is_floating_point():
        raise ScalesFileError(
            f"{path}: {name}: expected floats of shape {tuple(own.shape)}, got {found.dtype} of {tuple(found.shape)}"
        )
