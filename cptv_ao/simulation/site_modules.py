"""The modules of a twin that hold qparams, one for each site, made when a node first needs it."""

from __future__ import annotations

from typing import cast

from cptv_ao.backends.backend import Backend
from cptv_ao.simulation.quantizers import Quantizer, SiteModule, WeightQuantizer


class SiteModules:
    """Makes them with the scales that are in the model.

    Attributes:
        made: those so far, by the name of their site.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.made: dict[str, SiteModule] = {}
        activations = (site for site in backend.sites.values() if site.kind == "activation")
        self._activation = {node: site.name for site in activations for node in site.nodes}

    def activation(self, node: str) -> str | None:
        """The site of the scale that a node of this name puts its output on; None where it has none."""
        return self._activation.get(node)

    def output(self, node: str) -> Quantizer | None:
        """What puts the output of a node on its scale; None where it has none."""
        site = self.activation(node)
        if site is None:
            return None
        if site not in self.made:
            self.made[site] = Quantizer(self._backend.sites[site], self._backend.read(site))
        return cast(Quantizer, self.made[site])

    def weight(self, site: str) -> WeightQuantizer:
        """What holds the codes of a weight."""
        if site not in self.made:
            codes, weight = self._backend.weight(site).int_repr(), self._backend.float_weights.get(site)
            qparams, shiftable = self._backend.read(site), self._backend.weights.shiftable(site)
            self.made[site] = WeightQuantizer(self._backend.sites[site], qparams, codes, weight, shiftable)
        return cast(WeightQuantizer, self.made[site])
