"""What a candidate costs: `python examples/benchmarks/evaluator.py [--threads 1] [--quick]`.

Prints tables and writes results/evaluator.json. All ratios are of medians of interleaved runs in one process; the
published way is a whole-network forward of the simulation on every image for every candidate.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import workloads
from origins import origin

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.blocks import find_blocks
from cptv_ao.core.loader import read_batches
from cptv_ao.core.losses import kl
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.teacher import teacher_outputs
from cptv_ao.search.scale_space import ScaleSpace
from cptv_ao.search.strategies import EvolutionStrategy, Individual
from cptv_ao.simulation.twin import Twin

RESULTS = Path(__file__).parent / "results" / "evaluator.json"


@dataclass
class Setting:
    """A quantized network with its search and held-out evaluators."""

    float_model: nn.Module
    model: GraphModule
    batches: list[Batch]
    holdout: int = 0
    spaces: dict[str, ScaleSpace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backend = Backend(self.model)
        attach_float_weights(self.backend, self.float_model)
        movable = self.backend.movable()
        for block in find_blocks(self.backend.sites.values()):
            groups = {s.name: movable[s.name] for s in block.sites if s.name in movable}
            if groups:
                self.spaces[block.name] = ScaleSpace(self.backend, groups)
        teacher = teacher_outputs(self.float_model, self.batches)
        cut = len(self.batches) - self.holdout
        self.search = Evaluator(self.model, self.batches[:cut], teacher[:cut], kl)
        self.held = Evaluator(self.model, self.batches[cut:], teacher[cut:], kl) if self.holdout else None
        self.search.plan(space.nodes for space in self.spaces.values())


def network(name: str, depth: int | None = None) -> nn.Module:
    """`deit_tiny` has random weights, and so has the Fashion-MNIST ViT at another depth or while it is untrained."""
    torch.manual_seed(0)
    if name == "deit_tiny":
        import timm

        return timm.create_model("deit_tiny_patch16_224", **({} if depth is None else {"depth": depth})).eval()
    if depth is None and (workloads.CHECKPOINTS / f"{name}.pt").exists():
        return workloads.trained(name)
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "num_heads": 4}
    return VisionTransformer(**shape, depth=depth or 6, mlp_ratio=4).eval()


def images(name: str, count: int) -> Tensor:
    if name == "deit_tiny":
        return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return workloads.NETWORKS[name][1]().calibration(count, seed=0)


def setting(
    name: str, batches: int, size: int, *, holdout: int = 0, depth: int | None = None, bits: int = 8
) -> Setting:
    model = network(name, depth)
    loaded = list(images(name, batches * size).split(size))
    _, converted = workloads.quantize(copy.deepcopy(model), [loaded[0][:16]], weight_bits=bits)
    return Setting(model, converted, read_batches(loaded), holdout)


def search(s: Setting, passes: int, evaluations: int, *, mode: str = "race", seed: int = 0) -> dict[str, Any]:
    """Block visits of the (1+1) search. `full`: all images for all; `exact`: early rejection; `race`: both."""
    rng, steps = np.random.default_rng(seed), {name: dict[str, float]() for name in s.spaces}
    loss = start = s.search.score()
    s.search.keep()
    curve = [(0, loss)]
    begun, inside, spent = time.perf_counter(), s.search.runner.seconds, s.search.image_forwards
    for _ in range(passes):
        for name, space in s.spaces.items():
            space.refresh()
            s.search.enter(space.nodes)
            parent = Individual(space.vector, loss)
            strategy = EvolutionStrategy(space.layout, parent, rng, evaluations=evaluations, steps=steps[name])
            while not strategy.done:
                vector = space.repair(strategy.ask())
                space.write(vector)
                threshold = math.inf if mode == "full" else strategy.threshold
                child = s.search.score(threshold, race=mode == "race")
                if child < loss:
                    loss = child
                    s.search.keep()
                strategy.tell(vector, child)
                curve.append((s.search.image_forwards - spent, loss))
            space.write(strategy.best().vector)
            s.search.leave()
    seconds = time.perf_counter() - begun
    return {
        "start": start,
        "loss": loss,
        "holdout": s.held.score() if s.held else None,
        "image_forwards": s.search.image_forwards - spent,
        "image_entries": s.search.runner.image_entries,
        "seconds": seconds,
        "share_in_forwards": (s.search.runner.seconds - inside) / seconds,
        "curve": curve,
    }


def interleaved(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            begun = time.perf_counter()
            case()
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def candidates(name: str, size: int, repeats: int) -> dict[str, Any]:
    """Seconds per candidate, per block, against the float, the int8 and the simulated whole forward."""
    s = setting(name, 1, size)
    images = s.batches[0].args[0]
    twin = Twin(s.backend)
    rng = np.random.default_rng(0)
    whole = {"float": lambda: s.float_model(images), "int8": lambda: s.model(images), "simulated": lambda: twin(images)}
    rows, base = {}, {name: list[float]() for name in whole}
    with torch.inference_mode():
        for block, space in s.spaces.items():
            s.search.enter(space.nodes)
            strategy = EvolutionStrategy(space.layout, Individual(space.vector, math.inf), rng, evaluations=10**6)

            def candidate(space: ScaleSpace = space, strategy: EvolutionStrategy = strategy) -> None:
                space.write(space.repair(strategy.ask()))
                s.search.score()

            seconds = interleaved({**whole, "candidate": candidate}, repeats)
            space.write(space.base)
            s.search.leave()
            for key, values in base.items():
                values.append(seconds[key])
            per_image = s.search.runner.entry_bytes / s.search.images
            rows[block] = {**seconds, "of_float": seconds["candidate"] / seconds["float"], "entry_bytes": per_image}
    mean = statistics.mean(row["candidate"] for row in rows.values())
    medians = {key: statistics.median(values) for key, values in base.items()}
    return {
        "images": size,
        "blocks": rows,
        "whole": medians,
        "candidate": mean,
        "of_float": mean / medians["float"],
        "times_the_simulation": medians["simulated"] / mean,
        "image_bytes": images[0].nbytes,
    }


def peak_memory(name: str, batches: int, size: int) -> dict[str, float]:
    """Peak resident MB above the loaded model, of a forward and of a search; run in a process of its own."""
    s = setting(name, batches, size)

    def peak() -> float:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    def reset() -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    reset()
    base = peak()
    workloads.logits(s.model, s.batches[0].args[0])
    forward = peak() - base
    reset()
    search(s, 1, 2)
    return {"forward_mb": forward, "search_mb": peak() - base, "entries_mb": s.search.runner.entry_bytes / 2**20}


def fit(x: list[float], y: list[float]) -> dict[str, Any]:
    """Least-squares line and its R^2."""
    slope, offset = np.polyfit(x, y, 1)
    r2 = float(np.corrcoef(x, y)[0, 1] ** 2)
    return {"x": x, "seconds": y, "slope": float(slope), "offset": float(offset), "r2": r2}


def growth(quick: bool) -> dict[str, Any]:
    """Cost of a search on the Fashion-MNIST ViT: with images and passes; with depth, per candidate and of entries."""
    counts = [1, 2, 3] if quick else [2, 4, 6, 8]
    name, size, evaluations = "fashion_vit", 32 if quick else 100, 2

    def cost(batches: int, passes: int, depth: int | None) -> tuple[float, float, int]:
        s = setting(name, batches, size, depth=depth)
        search(s, 1, 1, mode="full")  # generates the code
        runs = [search(s, passes, evaluations, mode="full")["seconds"] for _ in range(1 if quick else 3)]
        s.search.invalidate()
        begun = time.perf_counter()
        for space in s.spaces.values():
            s.search.enter(space.nodes)
        return statistics.median(runs), time.perf_counter() - begun, passes * evaluations * len(s.spaces)

    depths = [(d, *cost(counts[0], 1, d)) for d in counts]
    xs = [float(c) for c in counts]
    return {
        "images": fit([x * size for x in xs], [cost(c, 1, None)[0] for c in counts]),
        "passes": fit(xs, [cost(counts[0], c, None)[0] for c in counts]),
        "depth, per candidate": fit(xs, [seconds / number for _, seconds, _, number in depths]),
        "depth, entries of a pass": fit(xs, [entries for _, _, entries, _ in depths]),
    }


def racing(name: str, quick: bool) -> list[dict[str, Any]]:
    """Image-forwards to the loss that the unraced search ends with, with early rejection and with races."""
    rows = []
    for seed in range(1 if quick else 3):
        base = dict[str, Any]()
        for mode, passes in (("full", 2), ("exact", 2), ("race", 2), ("race", 6)):
            s = setting(name, 6 if quick else 10, 32 if quick else 100, holdout=2, bits=4)
            run = search(s, passes, 2 if quick else 20, mode=mode, seed=seed)
            base = base or run
            reached = next((n for n, loss in run.pop("curve") if loss <= base["loss"]), 0)
            fewer = base["image_forwards"] / reached if reached else None
            rows.append({"mode": mode, "passes": passes, "seed": seed, **run, "reached": reached, "fewer": fewer})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each; on deit_tiny a third of them")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(options.threads)
    quick = options.quick
    if options.peak:
        size = 8 if quick else 32 if options.peak == "deit_tiny" else 100
        print(json.dumps(peak_memory(options.peak, 2, size)))
        return
    results: dict[str, Any] = {"threads": options.threads, "quick": quick, **origin()}
    for name, size in (("deit_tiny", 4 if quick else 32), ("fashion_vit", 32 if quick else 100)):
        repeats = max(2, options.repeats // (3 if name == "deit_tiny" else 1))
        r = results[name] = candidates(name, size, 2 if quick else repeats)
        r["share_in_forwards"] = search(setting(name, 2, size), 1, 5)["share_in_forwards"]
        command = [sys.executable, __file__, "--peak", name, "--threads", str(options.threads)]
        out = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True, check=True).stdout
        r["memory"] = json.loads(out.splitlines()[-1])
        tell_candidates(name, r)
    results["growth"] = growth(quick)
    for what, line in results["growth"].items():
        print(f"cost against {what:26} R^2 {line['r2']:.4f}   {', '.join(f'{y:.4g}' for y in line['seconds'])} s")
    results["racing"] = racing("digits_vit", quick)
    for row in results["racing"]:
        fewer = f"{row['fewer']:.1f}x fewer" if row["fewer"] else "not reached"
        print(
            f"seed {row['seed']} {row['mode']:5} {row['passes']} passes: loss {row['start']:.5f} -> {row['loss']:.5f}, "
            f"held out {row['holdout']:.5f}, {row['image_forwards']} image-forwards; the full search's loss: {fewer}"
        )
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1))


def tell_candidates(name: str, r: dict[str, Any]) -> None:
    print(f"\n{name}, {r['images']} images, seconds" + "".join(f"   {k} {v:.4f}" for k, v in r["whole"].items()))
    for block, row in r["blocks"].items():
        print(
            f"  {block:12} {row['candidate']:.4f}  {row['of_float']:.2f} of float  {row['entry_bytes']:.0f} B per image"
        )
    print(
        f"  mean {r['candidate']:.4f} s: {r['of_float']:.2f} of float, {r['times_the_simulation']:.1f}x the simulation"
    )
    print(f"  {r['share_in_forwards']:.1%} of the search in forwards; memory {r['memory']}")


if __name__ == "__main__":
    main()
