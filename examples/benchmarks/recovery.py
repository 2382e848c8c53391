"""How much accuracy each method gives back: `python examples/benchmarks/recovery.py`.

Rows are workloads, columns are methods with equal wall-clock budgets, each cell the mean over three seeds (of the
calibration images and of the search). Every cell is a file in `results/cells`, so that an interrupted run goes on
where it stopped; the table and `results/recovery.json` are written from them. `--tune` first chooses the learning
rate of the gradient per workload, on another draw and on images that no search sees; the test images choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cases import SEEDS, TUNING_SEED, WORKLOADS, Case, start_unit, unit_threads
from origins import origin
from tables import recovery_table
from torch.fx import GraphModule
from workloads import accuracy, agreement, logits

import cptv_ao
from cptv_ao import RefineConfig
from cptv_ao.core.losses import kl

RESULTS = Path(__file__).parent / "results"
CELLS = RESULTS / "cells"
LEARNING_RATES = (0.01, 0.03, 0.1)
LEAST_RATE = 0.001
_FOREVER = 10**6


def gradient(seconds: float, seed: int, learning_rate: float) -> RefineConfig:
    """Straight-through Adam on all log scales and zero_points from the observers' scales, nothing else."""
    return RefineConfig(
        population=(),
        equalize=False,
        activation_rate=1.0,
        rounding_rate=0.0,
        feature_weight=0.0,
        gradient_steps=_FOREVER,
        passes=0,
        max_seconds=seconds,
        seed=seed,
        learning_rate=learning_rate,
    )


def has_attention(case: Case) -> bool:
    """Whether its network is a transformer, by the names of its modules."""
    return any("attn" in name for name, _ in case.float_model.named_modules())


def paper(case: Case, seconds: float, seed: int) -> RefineConfig:
    """The published settings, repeated for as long as the budget lasts; all weights where there is no attention."""
    include = ("*attn*",) if has_attention(case) else ("*",)
    return RefineConfig.paper(case.weight_bits, include=include, passes=_FOREVER, max_seconds=seconds, seed=seed)


METHODS: dict[str, Callable[[str, Case, float, int], RefineConfig]] = {
    "paper": lambda _, case, s, seed: paper(case, s, seed),
    "sweep": lambda _, case, s, seed: RefineConfig(
        population=("output_error",),
        equalize=False,
        rounding_rate=0.0,
        gradient_steps=0,
        passes=0,
        max_seconds=s,
        seed=seed,
    ),
    "gradient": lambda name, _, s, seed: gradient(s, seed, json.loads(tuned(name).read_text())["chosen"]),
    "sep-CMA-ES": lambda _, case, s, seed: RefineConfig(
        population=(), equalize=False, gradient_steps=0, search="cma", passes=_FOREVER, max_seconds=s, seed=seed
    ),
    "ours": lambda _, case, s, seed: RefineConfig(max_seconds=s, seed=seed),
}


def judge(case: Case, model: GraphModule) -> dict[str, float]:
    """Test top-1 (agreement without labels), and KL to the float network on unseen calibration images."""
    teacher, unseen_teacher = case.teacher
    outputs, unseen = logits(model, case.test, 100), logits(model, case.unseen, 100)
    return {
        "top1": agreement(outputs, teacher) if case.labels is None else accuracy(outputs, case.labels),
        "agreement": agreement(outputs, teacher),
        "test_kl": float(kl(outputs, teacher)),
        "kl": float(kl(unseen, unseen_teacher)),
        "float": 1.0 if case.labels is None else accuracy(teacher, case.labels),
    }


def refined(case: Case, config: RefineConfig) -> tuple[GraphModule, dict[str, float]]:
    """A refined copy of the case's model, with what it cost."""
    started = time.monotonic()
    model = cptv_ao.refine(
        case.quantized, case.calibration, float_model=case.float_model, config=config, progress=False, inplace=False
    )
    report = cptv_ao.report(model)
    cost = {"seconds": time.monotonic() - started, "image_forwards": report.image_forwards}
    return model, cost


def clamped(case: Case) -> GraphModule:
    """The converted model with its weight codes clamped to the nominal range, at the observers' scales."""
    from cptv_ao.backends.backend import Backend
    from cptv_ao.backends.float_weights import attach_float_weights, weight_ranges

    model = copy.deepcopy(case.quantized)
    backend = Backend(model, weight_ranges(case.float_model))
    attach_float_weights(backend, case.float_model)
    for name in backend.float_weights:
        backend.write(name, backend.read(name))
    return model


def cell(name: str, method: str, seed: int, folder: Path = CELLS) -> Path:
    """Where a cell is kept."""
    return folder / f"{name} {method} {seed}.json".replace(" ", "_")


def tuned(name: str) -> Path:
    """Where the gradient's learning rate for a workload is kept."""
    return RESULTS / "tuned" / f"{name}.json".replace(" ", "_")


def run_unit(name: str, seed: int, methods: list[str]) -> None:
    """All missing cells of one workload and seed."""
    unit_threads()
    missing = [m for m in methods if not cell(name, m, seed).exists()]
    if not missing:
        return
    case = WORKLOADS[name].make(seed)
    for method in missing:
        result: dict[str, Any] = {"workload": name, "method": method, "seed": seed, **origin()}
        if method == "start":
            result |= judge(case, case.quantized) | {"clamped": judge(case, clamped(case))["top1"]}
        else:
            config = METHODS[method](name, case, WORKLOADS[name].seconds, seed)
            model, cost = refined(case, config)
            result |= judge(case, model) | cost
        CELLS.mkdir(parents=True, exist_ok=True)
        cell(name, method, seed).write_text(json.dumps(result, indent=1))
        print(f"{name}, {method}, seed {seed}: top-1 {result['top1']:.4f}, KL {result['kl']:.4f}", flush=True)


def tune_unit(name: str) -> None:
    """Choose the gradient's learning rate for one workload, by KL on unseen images of another draw: of three, and of
    further ones as long as the best is at an end."""
    unit_threads()
    if tuned(name).exists():
        return
    case = WORKLOADS[name].make(TUNING_SEED)
    losses: dict[float, float] = {}
    rates = list(LEARNING_RATES)
    while rates:
        for rate in rates:
            model, _ = refined(case, gradient(WORKLOADS[name].seconds, TUNING_SEED, rate))
            losses[rate] = judge(case, model)["kl"]
        best = min(losses, key=losses.__getitem__)
        beyond = {min(losses): 0.3 * best, max(losses): 3 * best}.get(best, 0.0)
        rates = [float(f"{beyond:.1g}")] if LEAST_RATE <= beyond <= 1 else []
    print(f"{name}: " + ", ".join(f"lr {rate}: KL {loss:.4f}" for rate, loss in losses.items()), flush=True)
    tuned(name).parent.mkdir(parents=True, exist_ok=True)
    tuned(name).write_text(json.dumps({"chosen": best, "kl": losses}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="choose the gradient's learning rates only")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, one thread each")
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--methods", default="start,paper,sweep,gradient,sep-CMA-ES,ours")
    parser.add_argument("--table", action="store_true", help="print the table of the cells that are there")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torch.ao warns about its own defaults, thousands of times
    methods = args.methods.split(",")
    names = [name for name in WORKLOADS if args.only.lower() in name.lower()]
    if args.unit:
        return tune_unit(args.unit) if args.tune else run_unit(args.unit, args.seed, methods)
    with ThreadPoolExecutor(args.jobs) as pool:
        if args.tune or ("gradient" in methods and not args.table):
            list(pool.map(lambda name: start_unit(__file__, name, "--tune"), names))
        if not (args.table or args.tune):
            units = [(name, seed) for seed in SEEDS for name in names]
            list(pool.map(lambda u: start_unit(__file__, u[0], "--seed", str(u[1]), "--methods", args.methods), units))
    cells = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    if cells:
        (RESULTS / "recovery.json").write_text(json.dumps(cells, indent=1))
    print(recovery_table(json.loads((RESULTS / "recovery.json").read_text()), list(WORKLOADS), methods))
    return None


if __name__ == "__main__":
    main()
