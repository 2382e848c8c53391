"""Candidates per second: the float twin, eager and compiled, against the int8 kernels on this CPU.

    python examples/benchmarks/twin.py [--networks digits_vit fashion_vit deit_tiny] [--batch 32] [--threads 1]

A candidate is one activation scale written and one forward of the batch. All are timed in turn in one run; the medians
and their ratios to the kernels are printed. With a GPU the twin is timed on it too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import workloads
from origins import origin, told

from cptv_ao.backends.backend import Backend
from cptv_ao.core.qparams import QParams
from cptv_ao.simulation.twin import Twin


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of its images; timing does not need trained weights."""
    torch.manual_seed(0)
    if name in workloads.NETWORKS:
        return workloads.NETWORKS[name][0]().eval(), (1, 8, 8) if name == "digits_vit" else (1, 28, 28)
    import timm

    full = {"deit_tiny": "deit_tiny_patch16_224", "vit_base": "vit_base_patch16_224"}.get(name, name)
    return timm.create_model(full).eval(), (3, 224, 224)


def candidates(
    write: Callable[[str, QParams], None], run: Callable[[Tensor], Any], site: str, now: QParams, images: Tensor
) -> Callable[[], None]:
    """Write a scale and run, as a search does."""
    state = {"step": 0}

    def once() -> None:
        state["step"] += 1
        write(site, QParams(now.scale * (1 + 0.001 * (state["step"] % 10)), now.zero_point))
        with torch.inference_mode():
            run(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return once


def timed(contenders: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of each, run in turn until the time is over (three rounds at least)."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for once in contenders.values():
        once()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 3:
        for name, once in contenders.items():
            started = time.perf_counter()
            once()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def compare(name: str, batch: int, seconds: float, compiled: bool) -> None:
    """Time one network and print a line per contender."""
    model, shape = network(name)
    images = torch.randn(batch, *shape)
    _, quantized = workloads.quantize(model, [images[:8]])
    backend = Backend(quantized)
    site = next(s.name for s in reversed(list(backend.sites.values())) if s.kind == "activation" and not s.fixed)
    now = backend.read(site)
    contenders = {"int8 kernels": candidates(backend.write, quantized, site, now, images)}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        twin = Twin(backend).to(device)
        contenders[f"twin, eager, {device}"] = candidates(twin.sites.set, twin.module, site, now, images.to(device))
        if compiled:
            run: Any = torch.compile(twin.module)
            contenders[f"twin, compiled, {device}"] = candidates(twin.sites.set, run, site, now, images.to(device))
    medians = timed(contenders, seconds)
    kernels = medians["int8 kernels"]
    for contender, median in medians.items():
        line = (
            f"{name:12} batch {batch:<4} {contender:22} {1 / median:8.2f} candidates/s  {kernels / median:5.2f} x int8"
        )
        print(line, flush=True)


def main() -> None:
    """Parse the arguments and compare the networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["digits_vit", "fashion_vit", "deit_tiny"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="per network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(told([origin()]))
    for name in arguments.networks:
        compare(name, arguments.batch, arguments.seconds, not arguments.no_compile)


if __name__ == "__main__":
    main()
