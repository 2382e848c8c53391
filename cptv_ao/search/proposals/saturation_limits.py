"""Which activations must stay below half of their container, or the kernels saturate; the descent is held to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.qparams import REDUCED_QMAX, Assignment, rescaled
from cptv_ao.core.sites import ScaleSite
from cptv_ao.search.proposals.following import follow
from cptv_ao.search.proposals.initial_scales import HALF_CONTAINER
from cptv_ao.simulation.saturation import saturating_inputs
from cptv_ao.simulation.twin import Twin
from cptv_ao.transforms.range_clipping import BEYOND, shares_beyond_half


class SaturationLimits:
    """What the kernels show on one batch, and the limits of the codes in the twin that come of it.

    Args:
        backend: of the model, whose kernels are looked at; it is left as it was.
        twin: of the model, whose codes are limited.
        groups: the tied groups that are searched, by the name of their leader.
        probe: what the kernels run.
        world: the ranks that must come to the same.
    """

    def __init__(
        self,
        backend: Backend,
        twin: Twin,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        probe: Batch,
        world: World,
    ) -> None:
        self._backend, self._groups = backend, groups
        # Values of kernels are compared with those of a twin beside them.
        self._twin = twin if twin.device.type == "cpu" else Twin(backend).checked(probe)
        self._limited_twins = {twin, self._twin}
        self._probe, self._world = probe, world
        self._activations = {lead: group for lead, group in groups.items() if group[0].affine}
        #: leaders of the groups whose codes are limited now
        self.limited: set[str] = set()

    def on_whole_containers(self) -> list[str]:
        """Leaders of the groups that kernels saturate on where all activations use their whole container."""
        sites = [site for group in self._activations.values() for site in group]
        now = self._backend.read
        return list(self.saturating({site.name: rescaled(now(site.name), HALF_CONTAINER, site) for site in sites}))

    def saturating(self, scales: Assignment) -> dict[str, int]:
        """Leaders of the groups that kernels of any rank saturate on when the model has these scales, and the highest
        code of each."""
        backend, twin = self._backend, self._twin
        before = backend.snapshot()
        try:
            for name, qparams in scales.items():
                backend.write(name, qparams)
            follow(twin, backend)
            twin.reround_weights(False)
            found = saturating_inputs(backend.model, twin, self._probe)
        finally:
            backend.restore_all(before)
        twin.reround_weights()
        follow(twin, backend)
        groups = self._activations
        highest = [float(max(found.get(site.name, 0) for site in group)) for group in groups.values()]
        agreed = [int(self._world.most(code)[0]) for code in highest]
        return {lead: code for lead, code in zip(groups, agreed, strict=True) if code}

    def release(self) -> None:
        """Lift the limits that the model goes beyond, where its activations are on whole containers: what was to bring
        them below was refused, and a twin that clips computes something else."""
        if not self.limited:
            return
        limited = {lead: self._groups[lead] for lead in sorted(self.limited)}
        found = shares_beyond_half(self._backend, self._probe, (site for group in limited.values() for site in group))
        highest = [max(found.get(node, 0.0) for site in group for node in site.nodes) for group in limited.values()]
        shares = [self._world.most(share)[0] for share in highest]
        if max(shares) >= BEYOND:
            self.limit([lead for lead, share in zip(limited, shares, strict=True) if share == 0.0])

    def limit(self, leads: Collection[str]) -> None:
        """Keep the codes of these groups, and of no others, where no kernel saturates."""
        for lead in self.limited.symmetric_difference(leads):
            for site in self._groups[lead]:
                for twin in self._limited_twins:
                    twin.sites.limit([site.name], REDUCED_QMAX if lead in leads else site.qmax)
        self.limited = set(leads)
