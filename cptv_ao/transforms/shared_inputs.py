"""What linear layers read on one scale, and where its channels come from: what the two forms of graph have in common.

Found in a lowered graph by `cptv_ao.transforms.lowered_patterns`, in a PT2E graph by
`cptv_ao.transforms.pt2e_patterns`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cptv_ao.backends.backend import Backend


@dataclass(frozen=True)
class Reader:
    """A linear layer: the site of its weight, and the path of its bias, None where it has none.

    Attributes:
        packed: whether the bias is written with the weight, and there is room for one where none is.
    """

    weight: str
    bias: str | None
    packed: bool = False


@dataclass(frozen=True)
class SharedInput:
    """A value whose channels share one scale, and that linear layers read alone.

    Attributes:
        sites: that put it on its scale, which have the same qparams.
        value, source: names of the node that gives it, and of the norm or linear layer that its channels are from.
        owner: a site of the source, to whose state its tensors belong.
        weight, bias: paths of the source's parameters; the weight of a norm alone, which nothing else reads then; no
            bias of a norm that has none.
        readers: the linear layers.
    """

    sites: tuple[str, ...]
    value: str
    source: str
    owner: str
    weight: str | None
    bias: str | None
    readers: tuple[Reader, ...]

    @property
    def tensors(self) -> dict[str, str]:
        """Paths of what an equivalent form may replace, with the site that each belongs to."""
        source = [path for path in (self.weight, self.bias) if path is not None]
        biases = {reader.bias: reader.weight for reader in self.readers if reader.bias is not None}
        return dict.fromkeys(source, self.owner) | biases

    @property
    def centrable(self) -> bool:
        """Whether something can be subtracted of it, and given back."""
        return self.bias is not None and all(reader.bias or reader.packed for reader in self.readers)

    def scalable(self, backend: Backend) -> bool:
        """Whether the weights around it can be multiplied by channel, and rounded anew."""
        owner = backend.sites[self.owner]
        multiplied = self.weight is not None or (owner.axis == 0 and backend.weights.shiftable(owner.name))
        return multiplied and all(backend.weights.shiftable(reader.weight) for reader in self.readers)
