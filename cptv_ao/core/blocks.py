"""Which scales are searched together: one block of the network at a time.

The policy is one callable from sites to the name of the block of each; `RefineConfig(blocks=...)` replaces it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cptv_ao.core.sites import ScaleSite

#: Given the sites of a model in graph order, returns the block of each site by name.
BlockPolicy = Callable[[Sequence[ScaleSite]], Mapping[str, str]]

# Containers of blocks that themselves stand in a numbered container (timm's swin: layers.0.blocks.1).
_CONTAINERS = {"blocks", "block", "layers", "layer", "stages", "resblocks", "denselayer"}
# Numbered parts of models without a ModuleList: torchvision's layer1, timm's regnet s1.b1.
_NUMBERED_STAGE = re.compile(r"^(?:layer|stage|s|denseblock)\d+$")
_NUMBERED_BLOCK = re.compile(r"^(?:b|block|denselayer)\d+$")
_FALLBACK_WEIGHTS_PER_BLOCK = 4
STEM, HEAD = "stem", "head"


@dataclass(frozen=True)
class Block:
    """Sites that are searched together.

    Attributes:
        name: path of the module that they are in, or `stem`, `head`, `part 0`.
        sites: in graph order.
    """

    name: str
    sites: tuple[ScaleSite, ...]


def find_blocks(sites: Iterable[ScaleSite], policy: BlockPolicy | None = None) -> tuple[Block, ...]:
    """Put every site into exactly one block, blocks in graph order.

    Raises:
        ValueError: the policy left a site out.
    """
    ordered = tuple(sites)
    names = (policy or blocks_by_path)(ordered)
    missing = [site.name for site in ordered if site.name not in names]
    if missing:
        raise ValueError(
            f"the block policy must name a block for every site, left out {len(missing)}, first {missing[0]}"
        )
    members: dict[str, list[ScaleSite]] = {}
    for site in ordered:
        members.setdefault(names[site.name], []).append(site)
    return tuple(Block(name, tuple(group)) for name, group in members.items())


def blocks_by_path(sites: Sequence[ScaleSite]) -> dict[str, str]:
    """The default policy: numbered modules are blocks (`blocks.3`, `layers.0.blocks.1`, `layer1.0`).

    What lies before the first is the stem, what lies after the last the head; a module between two blocks
    (`layers.1.downsample`) is a block of its own, and sites without a path belong to the block before them.
    Models without numbered modules are cut into runs of four weights.
    """
    paths = [block_path(site.scope) for site in sites]
    blocks = {path for path in paths if path}
    if len(blocks) < 2:
        return _runs_of_weights(sites)
    stages = {parent for path in blocks for parent in _parents(path)} & blocks
    known = [i for i, path in enumerate(paths) if path]
    names: dict[str, str] = {}
    current = STEM
    for i, (site, path) in enumerate(zip(sites, paths, strict=True)):
        if path in stages:
            current = ".".join(site.scope.split(".")[: path.count(".") + 2])
        elif path:
            current = path
        elif i > known[-1]:
            current = HEAD
        names[site.name] = current
    return names


def block_path(scope: str) -> str:
    """The numbered module that a path lies in, the innermost container first; `""` when there is none.

    `blocks.3.attn.qkv` -> `blocks.3`, `layers.0.blocks.1.mlp.fc1` -> `layers.0.blocks.1`,
    `layer1.0.conv1` -> `layer1.0`, `s1.b1.conv1.conv` -> `s1.b1`, `patch_embed.proj` -> `""`.
    """
    parts = scope.split(".")
    end = 0
    for i, part in enumerate(parts):
        if part.isdigit() and i > 0:
            container = parts[i - 1]
            if end in (0, i) or container in _CONTAINERS:
                end = i + 1
        elif _NUMBERED_BLOCK.match(part) and i > 0 and _NUMBERED_STAGE.match(parts[i - 1]) and end in (0, i):
            end = i + 1
    return ".".join(parts[:end])


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _runs_of_weights(sites: Sequence[ScaleSite]) -> dict[str, str]:
    names: dict[str, str] = {}
    weights = 0
    for site in sites:
        weights += site.kind == "weight"
        names[site.name] = f"part {max(weights - 1, 0) // _FALLBACK_WEIGHTS_PER_BLOCK}"
    return names
