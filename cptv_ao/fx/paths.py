"""From a graph node to the path of the module that it was traced from."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import Module


def fetch(model: Module, target: str) -> Any:
    """What the target of a `get_attr` or `call_module` node refers to."""
    return attrgetter(target)(model)


def is_scalar(value: Any, *, floating: bool) -> bool:
    """Whether a value is a tensor of one number without dimensions, as scales (floating) and zero_points are held."""
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() == floating


class ModulePaths:
    """Module paths of a converted model.

    The buffers that convert_fx adds are named after the module they were traced in, with underscores for dots
    (`blocks_3_norm1_scale_0`); the longest module path that fits is the scope.
    """

    def __init__(self, model: Module) -> None:
        paths: set[str] = set()
        for path, _ in model.named_modules(remove_duplicate=False):
            parts = path.split(".")
            paths.update(".".join(parts[: i + 1]) for i in range(len(parts)))
        # Paths of float parameters tell about modules that were replaced by a function (timm's LayerNorm).
        for path, _ in model.named_parameters():
            parts = path.split(".")[:-1]
            paths.update(".".join(parts[: i + 1]) for i in range(len(parts)))
        paths.discard("")
        self._by_flat = {path.replace(".", "_"): path for path in sorted(paths, key=len)}

    def of_attribute(self, name: str) -> str:
        """Scope of a root buffer of this name; `""` when it belongs to the top level."""
        parts = name.split("_")
        for end in range(len(parts) - 1, 0, -1):
            path = self._by_flat.get("_".join(parts[:end]))
            if path is not None:
                return path
        return ""

    def name(self, attribute: str) -> str:
        """Readable name of a root buffer: `blocks_3_norm1_scale_0` -> `blocks.3.norm1.scale_0`."""
        scope = self.of_attribute(attribute)
        rest = attribute[len(scope) :].lstrip("_")
        return f"{scope}.{rest}" if scope else rest

    def of(self, node: Node) -> str:
        """Scope of a node: the path of its module, else that of the buffers it reads."""
        if node.op == "call_module":
            return str(node.target)
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                scope = self.of_attribute(str(source.target).replace(".", "_"))
                if scope:
                    return scope
        return ""
