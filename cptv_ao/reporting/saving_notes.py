"""What torch cannot keep of a model when it saves it, and the way around, told where a model holds such a thing."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.forms import form_of
from cptv_ao.core.formatting import some
from cptv_ao.fx.quantized_ops import is_quantized

# How the names begin by which torch's `load_state_dict` knows the packed weights of functional ops again; those of ops
# inside submodules begin with the path of these.
_KNOWN = "_packed_weight"


def saving_notes(model: GraphModule) -> list[str]:
    """What a report says of saving this model: nothing where all of torch's ways work.

    Args:
        model: what `convert_fx`, `convert_pt2e` or `convert_to_reference_fx` returned.
    """
    if form_of(model).scales_in_code:
        return [
            "saving: the scales of activations are numbers in this graph, which a state_dict does not hold: save with "
            "torch.export, or the scales with save_scales / load_scales"
        ]
    notes = []
    modules = dict(model.named_modules())
    examples = {type(module): module for module in modules.values()}  # one of each type: it packs its weight again
    lost = {kind for kind, module in examples.items() if not _survives_pickle(module)}
    unpicklable = [f"{path} ({type(m).__name__})" for path, m in modules.items() if type(m) in lost]
    if unpicklable:
        notes.append(
            f"saving: torch.save(model) and pickle write a file that torch cannot load, because of "
            f"{some(unpicklable, 1)}: save with torch.jit.trace, or the state_dict, or the scales with save_scales"
        )
    elif reason := _not_written(model):
        notes.append(
            f"saving: torch.save(model) and pickle do not work with this torch, because of {reason}: save with "
            "torch.jit.trace, or the state_dict, or save_scales"
        )
    forgotten = [f"{path} ({type(m).__name__})" for path, m in modules.items() if _forgets_scale(m)]
    if forgotten:
        notes.append(
            f"saving: a state_dict does not hold the scale of {some(forgotten, 1)}: save with torch.jit.trace, or the "
            "scales with save_scales / load_scales"
        )
    strings = [node.name for node in model.graph.nodes if isinstance(node.type, str)]
    if strings:
        notes.append(
            "saving: torch.jit.script cannot read annotations that are strings (from __future__ import annotations) "
            f"of {some(strings, 1)}: torch.jit.trace needs none"
        )
    packed = [name for name, value in model.state_dict().items() if _is_packed_on_root(name, value)]
    if strangers := [name for name in packed if not name.startswith(_KNOWN)]:
        notes.append(
            f"saving: no model loads the state_dict, because of {some(strangers, 1)}, which torch does not know again: "
            "save with torch.jit.trace, or the scales with save_scales / load_scales"
        )
    elif packed:
        notes.append(
            f"saving: torch.load of a file of the state_dict needs weights_only=False, because of {some(packed, 1)}; "
            "save_scales / load_scales need no pickle"
        )
    return notes


def _not_written(model: GraphModule) -> str:
    """Why torch cannot write down the code of a model; nothing where it can."""
    try:
        model.__reduce__()  # type: ignore[no-untyped-call]
    except AttributeError:  # of torch 2.13
        return "annotations that are strings (from __future__ import annotations)"
    except Exception as error:  # whatever a module of the user's own raises
        return f"a {type(error).__name__} ({error})"
    return ""


def _survives_pickle(module: nn.Module) -> bool:
    """Whether a module can be made again of its own state, which is what loading a pickle does.

    Not so for quantized convolutions (torch 2.13 to 2.15): their `__setstate__` never calls `Module.__init__`.
    """
    kind = type(module)
    if kind.__setstate__ is nn.Module.__setstate__ or not hasattr(module, "__getstate__"):
        return True
    made = kind.__new__(kind)
    try:
        made.__setstate__(module.__getstate__())  # type: ignore[no-untyped-call]
    except Exception:  # whatever torch, or a module of the user's own, raises (parametrized ones refuse)
        return False
    return "_modules" in vars(made)


def _forgets_scale(module: nn.Module) -> bool:
    """Whether a quantized module has a scale that its state_dict lacks (`nnq.Softmax`, `nnq.ELU`)."""
    if not is_quantized(module):
        return False
    has_scale = isinstance(getattr(module, "scale", None), (float, torch.Tensor))
    return has_scale and "scale" not in module.state_dict()


def _is_packed_on_root(name: str, value: object) -> bool:
    """A packed weight of a functional op; `torch.load` knows those of modules."""
    return "." not in name and isinstance(value, torch.ScriptObject)
