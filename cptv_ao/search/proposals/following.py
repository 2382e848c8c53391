"""The twin with the scales that are in the model."""

from __future__ import annotations

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.simulation.twin import Twin


def follow(twin: Twin, store: ScaleStore) -> None:
    """Give a twin the scales that are in the model."""
    for name in twin.names:
        twin.sites.set(name, store.read(name))
