"""What a second process brings: deit_tiny at 224 x 224, one thread each, the same search with 1 and with 2 ranks.

    python examples/benchmarks/distributed.py

Prints seconds per phase and their ratio beside what the cost model (`Cost`, explained in docs/distributed.md) says from
the run of one rank alone; the bytes that a rank sends per candidate and per step; whether the scales are equal; then
what the model says of vit_large with 10,000 images on 8 and on 64 GPUs. Weights are random: seconds do not care.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from origins import origin, told

import cptv_ao

PHASES = ("start", "descent", "visits")
_WAVES = 8


@dataclass(frozen=True)
class Cost:
    """Seconds of a refine by the number of ranks: what is shared, as far as it can be, and what each rank does alone.

    Attributes:
        alone: seconds per phase that every rank spends (probes for saturation, building the twin, Adam, reading data).
        scored: seconds of forwards on the kernels (or the twin) per phase, on one rank.
        steps: seconds inside the steps of the descent, on one rank.
        batches: search batches of the loader.
        parts: parts of a step.
        exchanges: all-reduces per phase, and `latency` seconds each.
        sent: bytes that a rank sends per phase, at `bandwidth` bytes per second.
    """

    alone: dict[str, float]
    scored: dict[str, float]
    steps: float
    batches: int
    parts: int
    exchanges: dict[str, float]
    sent: dict[str, float]
    latency: float
    bandwidth: float

    def seconds(self, ranks: int) -> dict[str, float]:
        """By phase."""
        wave = math.ceil(self.batches / _WAVES)
        shares = {"start": _share(self.batches, ranks), "descent": _share(wave, ranks), "visits": _share(wave, ranks)}
        found = {}
        for phase in PHASES:
            shared = self.scored[phase] * shares[phase]
            shared += self.steps * _share(self.parts, ranks) if phase == "descent" else 0.0
            talk = self.exchanges[phase] * self.latency * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0
            talk += 2 * self.sent[phase] / self.bandwidth if ranks > 1 else 0.0  # a ring sends each byte twice
            found[phase] = self.alone[phase] + shared + talk
        return found


def _share(units: int, ranks: int) -> float:
    """The most that a rank does of so many equal units of work."""
    return math.ceil(units / ranks) / units


class Watch:
    """Counts seconds inside forwards and steps, and what is given to all-reduce, from one event to the next."""

    def __init__(self) -> None:
        self.now = {"scored": 0.0, "steps": 0.0, "calls": 0.0, "bytes": 0.0}
        self.marks: list[tuple[str, float, dict[str, float]]] = []
        from cptv_ao.evaluation import scoring
        from cptv_ao.evaluation.batch_losses import BatchLosses
        from cptv_ao.evaluation.evaluator import Evaluator
        from cptv_ao.search.proposals.gradient import GradientDescent

        self._timed(BatchLosses, "_output", "scored")
        self._timed(Evaluator, "enter", "scored")
        self._timed(GradientDescent, "_step", "steps")
        self._timed(scoring, "teacher_outputs", "scored")
        inner = dist.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.now["calls"] += 1
            self.now["bytes"] += tensor.numel() * tensor.element_size()
            return inner(tensor, *args, **kwargs)

        dist.all_reduce = counted

    def _timed(self, owner: Any, name: str, kind: str) -> None:
        inner = getattr(owner, name)
        depth = 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    self.now[kind] = self.now.get(kind, 0.0) + time.perf_counter() - started

        setattr(owner, name, timed)

    def __call__(self, event: cptv_ao.Event) -> None:
        self.mark(event.kind)

    def mark(self, kind: str) -> None:
        self.marks.append((kind, time.perf_counter(), dict(self.now)))


def worker(args: argparse.Namespace) -> None:
    """One rank: refine, and write what it cost to a file."""
    import timm
    from workloads import quantize

    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=1000).eval()
    batches = list(torch.randn(args.batches * args.batch, 3, 224, 224).split(args.batch))
    _, quantized = quantize(model, batches[:1], weight_bits=4)
    config = cptv_ao.RefineConfig(
        gradient_steps=args.steps, passes=1, evaluations=args.evaluations, population=(), include=args.include
    )
    watch = Watch()
    if dist.is_initialized():
        dist.barrier()
    watch.mark("begin")
    cptv_ao.refine(quantized, batches, float_model=model, config=config, callback=watch, progress=False)
    if int(os.environ.get("RANK", "0")) == 0:
        scales = [cptv_ao.report(quantized).to_dict()["moves"], float(quantized(batches[0]).sum())]
        Path(args.worker).write_text(json.dumps({"marks": watch.marks, "scales": scales}))
    if dist.is_initialized():
        dist.destroy_process_group()


def phases(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per phase what was counted in it, and its seconds: the start, the descent with its proposals, the visits."""
    marks = found["marks"]
    first = next(i for i, mark in enumerate(marks) if mark[0] == "candidate")
    step = next(i for i, mark in enumerate(marks) if mark[0] == "step")
    ends = (marks[0], marks[step], marks[first - 1], marks[-1])
    spans = {}
    for phase, a, b in zip(PHASES, ends, ends[1:], strict=False):
        spans[phase] = {kind: b[2][kind] - a[2].get(kind, 0.0) for kind in b[2]} | {"seconds": b[1] - a[1]}
    return spans


def cost(one: dict[str, dict[str, float]], two: dict[str, dict[str, float]], args: argparse.Namespace) -> Cost:
    """Of the run of one rank; what is sent, and the seconds of an exchange, are those of two."""
    search = args.batches - max(1, round(0.2 * args.batches))
    scored = {phase: one[phase]["scored"] for phase in PHASES}
    steps = one["start"]["steps"] + one["descent"]["steps"]
    alone = {phase: one[phase]["seconds"] - scored[phase] - one[phase]["steps"] for phase in PHASES}
    alone["start"] += one["start"]["steps"]  # the first step, which ends the start
    return Cost(
        alone=alone,
        scored=scored,
        steps=steps - one["start"]["steps"],
        batches=search,
        parts=max(1, round(args.batch * 3 * 224 * 224 / 2**20)),
        exchanges={phase: two[phase]["calls"] for phase in PHASES},
        sent={phase: two[phase]["bytes"] for phase in PHASES},
        latency=args.latency,
        bandwidth=1e9,
    )


def vit_large(images: int = 10_000, batch: int = 32, candidates: int = 960, steps: int = 600) -> Cost:
    """vit_large on GPUs, by assumption: 100 images forward, 33 forward and backward per second and GPU.

    A candidate runs half of the network on average; three of four are dropped after the first of eight waves.
    """
    search = round(0.8 * images / batch)
    tail = 0.5 * (0.25 + 0.75 / _WAVES) * 0.8 * images / 100
    scales = 24 * (3072 + 1024 + 4096 + 1024) + 2024
    parts = max(1, round(batch * 3 * 224 * 224 / 2**20))
    return Cost(
        alone={"start": 120.0, "descent": 60.0, "visits": 0.002 * candidates},
        scored={"start": 3 * images / 100, "descent": 8 * 0.8 * images / 100, "visits": candidates * tail},
        steps=steps * batch / 33,
        batches=search,
        parts=parts,
        exchanges={"start": 20, "descent": 5.0 * steps, "visits": candidates * (1 + 2 * (0.25 * _WAVES + 0.75))},
        sent={
            "start": 4.0 * 1000 * images,
            "descent": steps * 4.0 * (batch * 1000 + parts * scales),
            "visits": candidates * 8.0 * search,
        },
        latency=1e-4,
        bandwidth=1e9,
    )


def run(ranks: int, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The search with so many ranks, in processes of its own."""
    out = Path(folder) / f"{ranks}.json"
    command = [sys.executable]
    command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command += [__file__, "--worker", str(out)]
    for name in ("model", "batches", "batch", "steps", "evaluations"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--include", *args.include]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--include", nargs="+", default=["blocks.0.*", "blocks.6.*"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--latency", type=float, default=2e-4, help="seconds of an all-reduce of a few numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.include = tuple(args.include)
    if args.worker:
        worker(args)
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):  # interleaved: the machine may be busier at one time than at another
            alone, two = run(1, args, folder), run(2, args, folder)
            runs.append((phases(alone), phases(two)))
            print(f"scales equal: {alone['scales'] == two['scales']}; {len(alone['marks'])} events", flush=True)
    one, both = (min((r[i] for r in runs), key=lambda p: sum(v["seconds"] for v in p.values())) for i in (0, 1))
    model = cost(one, both, args)
    print(f"\n{args.model}, {args.batches} batches of {args.batch}, one thread per rank, best of {args.repeat} runs")
    print(told([origin()]))
    print(f"{'phase':<10} {'1 rank, s':>10} {'2 ranks, s':>11} {'ratio':>7} {'model, s':>9} {'ratio':>7}")
    rows = [(phase, one[phase]["seconds"], both[phase]["seconds"], model.seconds(2)[phase]) for phase in PHASES]
    for name, first, second, modelled in [*rows, ("all", *(sum(row[i] for row in rows) for i in (1, 2, 3)))]:
        ratios = first / second, first / modelled
        print(f"{name:<10} {first:>10.1f} {second:>11.1f} {ratios[0]:>7.2f} {modelled:>9.1f} {ratios[1]:>7.2f}")
    candidates = sum(mark[0] == "candidate" for mark in two["marks"])
    print(f"bytes that a rank sends per candidate: {both['visits']['bytes'] / candidates:,.0f}")
    print(f"bytes that a rank sends per step: {both['descent']['bytes'] / max(1, args.steps - 1):,.0f}")
    print("\nvit_large, 10,000 images, by the model (assumptions in `vit_large`)")
    print(f"{'ranks':>5} " + "".join(f"{phase + ', s':>12}" for phase in PHASES) + f"{'all, s':>12} {'speed-up':>9}")
    for batch in (32, 128):
        print(f"batches of {batch}")
        whole = sum(vit_large(batch=batch).seconds(1).values())
        for ranks in (1, 8, 64):
            found = vit_large(batch=batch).seconds(ranks)
            cells = "".join(f"{found[phase]:>12,.0f}" for phase in PHASES)
            print(f"{ranks:>5} {cells}{sum(found.values()):>12,.0f} {whole / sum(found.values()):>9.1f}")


if __name__ == "__main__":
    main()
