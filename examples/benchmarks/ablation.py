"""What each part of the default search adds: `python examples/benchmarks/ablation.py --jobs 2`.

Rows are the workloads with a gap, columns the default search and the same without one of its parts, for as many
seconds; each cell is the KL to float on images that no search saw, mean and spread over the seeds. Every cell is a file
in `results/ablation`, so that an interrupted run goes on where it stopped; the table and `results/ablation.json` are
written from them. About three hours on one thread; with `--seconds 25` more than one.
"""

from __future__ import annotations

import argparse
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cases import SEEDS, WORKLOADS, start_unit, unit_threads
from origins import origin, told
from recovery import RESULTS, judge, refined
from tables import Cells, markdown, spread

import cptv_ao
from cptv_ao import RefineConfig

FOLDER = RESULTS / "ablation"
ROWS = (
    "fashion ViT W2A8",
    "fashion ViT W3A8",
    "outlier ViT W8A8",
    "digits ViT W2A8",
    "fashion CNN W4A8",
    "fashion ViT PT2E W3A3",
    "outlier ViT PT2E W4A4",
    "EfficientNet-Lite0 W8A8",
)


def _without(individual: str) -> dict[str, Any]:
    return {"population": tuple(name for name in RefineConfig().population if name != individual)}


PARTS: dict[str, dict[str, Any]] = {
    "default": {},
    "without curvature": _without("curvature"),
    "without output error": _without("output_error"),
    "without roundings": {"rounding_rate": 0.0},
    "without features": {"feature_weight": 0.0},
    "without biases": _without("biases"),
    "without equal forms": {"equalize": False},
    "without descent": {"gradient_steps": 0},
}


def cell(folder: Path, name: str, part: str, seed: int, limit: float) -> Path:
    """Where a cell is kept: another limit is another cell."""
    return folder / f"{name} {part} {seed} {limit:g}s.json".replace(" ", "_")


def limit_of(name: str, seconds: float | None) -> float:
    """The seconds of a search: those of the accuracy benchmark where none are asked for."""
    return WORKLOADS[name].seconds if seconds is None else seconds


def run_unit(name: str, seed: int, args: argparse.Namespace) -> None:
    """All missing cells of one workload and seed."""
    unit_threads()
    limit = limit_of(name, args.seconds)
    missing = [part for part in args.parts if not cell(args.folder, name, part, seed, limit).exists()]
    if not missing:
        return
    case = WORKLOADS[name].make(seed)
    for part in missing:
        model, cost = refined(case, RefineConfig(max_seconds=limit, seed=seed, **PARTS[part]))
        result = {
            "workload": name,
            "part": part,
            "seed": seed,
            "limit": limit,
            **cost,
            **judge(case, model),
            **origin(),
        }
        result["stages"] = list(cptv_ao.report(model).stages)
        args.folder.mkdir(parents=True, exist_ok=True)
        cell(args.folder, name, part, seed, limit).write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}, {part}, seed {seed}: KL {result['kl']:.4f} after {result['seconds']:.0f} s", flush=True)


def table(cells: Cells) -> str:
    """KL on unseen images, mean and spread over the seeds, in Markdown; then where the cells are from."""
    parts = [part for part in PARTS if any(c["part"] == part for c in cells)]
    rows = [["KL to float on unseen images", "seconds", *parts]]
    for name in ROWS:
        of_row = [c for c in cells if c["workload"] == name]
        if of_row:
            by_part = ([c["kl"] for c in of_row if c["part"] == part] for part in parts)
            limits = ", ".join(f"{limit:g}" for limit in sorted({c["limit"] for c in of_row}))
            rows.append([name, limits, *(spread(values, 4) if values else "-" for values in by_part)])
    return f"{markdown(rows)}\n\n{told(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, one thread each")
    parser.add_argument("--only", nargs="*", default=[""], help="workloads whose name holds one of these")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument(
        "--seconds", type=float, help="limit of each search; without one that of the accuracy benchmark"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the cells; a JSON of all is written beside it")
    parser.add_argument("--table", action="store_true", help="print the table of the cells that are there")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torch.ao warns about its own defaults, thousands of times
    if args.unit:
        return run_unit(args.unit, args.seed, args)
    names = [name for name in ROWS if any(part.lower() in name.lower() for part in args.only)]
    seeds = SEEDS[: args.seeds]
    if not args.table:
        words = ["--folder", str(args.folder), "--parts", *args.parts]
        words += [] if args.seconds is None else ["--seconds", str(args.seconds)]
        units = [(name, seed) for seed in seeds for name in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda u: start_unit(__file__, u[0], "--seed", str(u[1]), *words), units))
    wanted = [
        cell(args.folder, name, part, seed, limit_of(name, args.seconds))
        for name in names
        for part in args.parts
        for seed in seeds
    ]
    cells = [json.loads(path.read_text()) for path in wanted if path.exists()]
    if cells and not args.table:
        args.folder.with_suffix(".json").write_text(json.dumps(cells, indent=1) + "\n")
    print(table(cells))
    return None


if __name__ == "__main__":
    main()
