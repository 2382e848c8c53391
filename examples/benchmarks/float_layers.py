"""Which layers to leave in float: `plan` beside the rules of other tools, `python examples/benchmarks/float_layers.py`.

Rows are rules, columns are shares of the int8 operations that may be given up; each cell is the loss (KL to float) of
a model that stock `prepare_fx` / `convert_fx` or `prepare_pt2e` / `convert_pt2e` makes with what the rule leaves in
float, on its own kernels, on images that no rule saw, as a share of the loss with everything quantized; the geometric
mean over the seeds of the calibration images. Each case and seed is a file, so that an interrupted run goes on.

The rules of the other tools are written down here as they are published, on our twin: none of these tools runs. All see
the same 128 images.

    sensitivity     each layer alone in float; those whose loss falls most first
    per operation   the same for all groups that `plan` chooses from, by what an operation brings; measured once
    AIMET-like      LiteMP: each layer alone quantized; those with the lowest SQNR of the outputs first
    NNCF-like       accuracy control: as `sensitivity`, but ranked again each time that a layer made the loss worse
    ModelOpt-like   auto_quantize: squared gradients times squared errors, added up over what is quantized (a knapsack)
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import SEEDS
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workloads import NETWORKS, logits, quietly, trained, with_outliers

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.loader import read_batches
from cptv_ao.core.losses import get_exact_loss
from cptv_ao.diagnosis.float_search import FloatSearch, Measure, Prediction
from cptv_ao.diagnosis.wiring import Wiring
from cptv_ao.evaluation.calibration import Images
from cptv_ao.simulation.simulated_backend import SimulatedBackend
from cptv_ao.transforms.float_model.exclusion import Part, Without, without

CELLS = Path(__file__).parent / "results" / "float_layers"
BUDGETS = (0.02, 0.1, 0.2)
Nodes = frozenset[str]


@dataclass(frozen=True)
class Case:
    """A network and how it is quantized with some parts in float."""

    network: str
    quantize: Callable[[nn.Module, Sequence[Tensor], Sequence[Part]], GraphModule]
    change: Callable[[nn.Module], nn.Module] = copy.deepcopy


def fx(bits: int) -> Callable[[nn.Module, Sequence[Tensor], Sequence[Part]], GraphModule]:
    """torch.ao FX, weights of so many bits."""

    def quantize(model: nn.Module, batches: Sequence[Tensor], parts: Sequence[Part]) -> GraphModule:
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = "x86"
        mapping = without(cptv_ao.qconfig_mapping(bits, "x86"), parts)
        prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
        for batch in batches:
            prepared(batch)
        return convert_fx(prepared)

    return quantize


def exported(bits: int) -> Callable[[nn.Module, Sequence[Tensor], Sequence[Part]], GraphModule]:
    """PT2E, weights and activations of so many bits."""

    def quantize(model: nn.Module, batches: Sequence[Tensor], parts: Sequence[Part]) -> GraphModule:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from workloads import x86_quantizer

        dynamic = ({0: torch.export.Dim("batch", min=1, max=1 << 16)},)
        graph = torch.export.export(model, (batches[0],), dynamic_shapes=dynamic).module()
        prepared = prepare_pt2e(graph, Without(x86_quantizer(bits, bits), parts))
        for batch in batches:
            prepared(batch)
        return convert_pt2e(prepared)

    return quantize


CASES = {
    "digits ViT W2A8": Case("digits_vit", fx(2)),
    "digits ViT W3A8": Case("digits_vit", fx(3)),
    "digits ViT W4A4, PT2E": Case("digits_vit", exported(4)),
    "digits ViT W8A8, outliers": Case("digits_vit", fx(8), with_outliers),
    "Fashion-MNIST ViT W2A8": Case("fashion_vit", fx(2)),
    "Fashion-MNIST ViT W3A8": Case("fashion_vit", fx(3)),
}


class Table:
    """What every rule looks at: one model, its twin on the calibration images, the operations of its nodes."""

    def __init__(self, model: nn.Module, quantized: GraphModule, batches: Sequence[Tensor]) -> None:
        self.config = cptv_ao.RefineConfig(loss="kl")
        self.backend = Backend(quantized)
        attach_float_weights(self.backend, model)
        read = read_batches(list(batches), self.backend.form.intake(quantized), 128)
        self.images = Images.of(read, model, self.config)
        self.twin = SimulatedBackend(self.backend).checked(read[0]).twin
        self.wiring = Wiring(self.backend, model)
        self.loss = Measure(self.twin, self.wiring, self.images, self.config)
        self.operations = self.wiring.operations(read[0])
        self.all = frozenset(self.wiring.parts) | frozenset(self.operations)
        # What other tools choose from: layers, each with its weight and what it is given.
        layers = {n for s in self.backend.sites.values() if s.kind == "weight" for n in s.nodes}
        self.layers = [*dict.fromkeys(tuple(sorted(p)) for n, p in self.wiring.parts.items() if n in layers)]

    def share(self, parts: Sequence[Part]) -> float:
        return sum(self.operations.get(n, 0.0) for n in self.nodes(parts)) / sum(self.operations.values())

    def nodes(self, parts: Sequence[Part]) -> Nodes:
        return self.wiring.nodes_of(parts)

    def taken(self, ranked: Sequence[tuple[Part, ...]], budget: float) -> list[Part]:
        """As many as the budget pays for, in this order."""
        found: list[Part] = []
        for group in ranked:
            if self.share([*found, *group]) <= budget:
                found += [part for part in group if part not in found]
        return found


def _by_fall(table: Table, left: Sequence[tuple[Part, ...]], chosen: Sequence[Part] = ()) -> list[tuple[Part, ...]]:
    return sorted(left, key=lambda group: table.loss(table.nodes([*chosen, *group])))


def sensitivity(table: Table) -> Callable[[float], list[Part]]:
    ranked = _by_fall(table, table.layers)
    return lambda budget: table.taken(ranked, budget)


def per_operation(table: Table) -> Callable[[float], list[Part]]:
    groups = [tuple(sorted(group)) for group in table.wiring.groups()]
    given = table.loss(frozenset())

    def rate(group: tuple[Part, ...]) -> float:
        return (given - table.loss(table.nodes(group))) / (table.share(group) + 0.002 * len(group))

    ranked = [group for group in sorted(groups, key=rate, reverse=True) if rate(group) > 0]
    return lambda budget: table.taken(ranked, budget)


def aimet_like(table: Table) -> Callable[[float], list[Part]]:
    def loss(group: tuple[Part, ...]) -> float:
        """Squared error of the outputs with this layer alone quantized; the signal is the same for all."""
        total = 0.0
        from cptv_ao.fx.running import call
        from cptv_ao.simulation.partly_float import partly_float

        region = table.wiring.region(table.all - table.nodes(group))
        with torch.inference_mode(), partly_float(table.twin, region):
            for batch, target in zip(table.images.batches, table.images.targets, strict=True):
                total += float((call(table.twin, batch) - target).square().sum())
        return total

    ranked = sorted(table.layers, key=loss, reverse=True)
    return lambda budget: table.taken(ranked, budget)


def nncf_like(table: Table) -> Callable[[float], list[Part]]:
    def choose(budget: float) -> list[Part]:
        chosen: list[Part] = []
        before = table.loss(frozenset())
        left = _by_fall(table, table.layers)
        while left:
            group = left.pop(0)
            if table.share([*chosen, *group]) > budget:
                continue
            chosen += group
            now = table.loss(table.nodes(chosen))
            if now > before:
                left = _by_fall(table, left, chosen)
            before = now
        return chosen

    return choose


def modelopt_like(table: Table) -> Callable[[float], list[Part]]:
    prediction = Prediction(table.twin, table.images.batches, table.config)
    alone = {name: float(row.square().mean()) for name, row in prediction.rows()}
    worth = [(group, _alone(table, group, alone), table.share(group)) for group in table.layers]

    def choose(budget: float) -> list[Part]:
        """The knapsack, in thousandths of the operations."""
        size = round(budget * 1000)
        best: list[tuple[float, list[Part]]] = [(0.0, [])] * (size + 1)
        for group, value, share in worth:
            weight = math.ceil(share * 1000)
            for room in range(size, weight - 1, -1):
                with_it = best[room - weight][0] + value
                if with_it > best[room][0]:
                    best[room] = with_it, [*best[room - weight][1], *group]
        return best[size][1]

    return choose


def _alone(table: Table, group: tuple[Part, ...], alone: dict[str, float]) -> float:
    """What the layers of a group cost by themselves: their weights, and the inputs that they are given."""
    nodes = table.nodes(group)
    weights = [s.name for s in table.backend.sites.values() if s.kind == "weight" and set(s.nodes) & nodes]
    inputs = [name for name, (_, read) in table.wiring.flow.sites.items() if read & nodes]
    return sum(alone.get(name, 0.0) for name in (*weights, *inputs))


def ours(table: Table) -> Callable[[float], list[Part]]:
    def choose(budget: float) -> list[Part]:
        prediction = Prediction(table.twin, table.images.batches, table.config)
        measure = Measure(table.twin, table.wiring, table.images, table.config)
        found = FloatSearch(measure, prediction, table.operations, 0.0, 4, 200).steps(budget, lambda *_: None)
        return [part for step in found for part in step.parts]

    return choose


RULES: dict[str, Callable[[Table], Callable[[float], list[Part]]]] = {
    "sensitivity": sensitivity,
    "per operation": per_operation,
    "AIMET-like": aimet_like,
    "NNCF-like": nncf_like,
    "ModelOpt-like": modelopt_like,
    "plan": ours,
}


def cell(name: str, seed: int) -> dict[str, Any]:
    """All rules on one case and draw."""
    case = CASES[name]
    data, model = NETWORKS[case.network][1](), case.change(trained(case.network))
    batches = list(data.calibration(128, seed).split(32))
    unseen = data.test[:2000]
    loss, wanted = get_exact_loss("kl", 1.0), logits(model, unseen)

    known: dict[frozenset[Part], float | None] = {}

    def judged(parts: Sequence[Part]) -> float | None:
        key = frozenset(parts)
        if key not in known:
            try:
                with quietly(), torch.no_grad():
                    made = case.quantize(model, batches, parts)
                known[key] = float(loss(logits(made, unseen), wanted))
            except (NotImplementedError, RuntimeError) as error:
                print(f"  no kernels: {error}"[:120])
                known[key] = None
        return known[key]

    with quietly(), torch.no_grad():
        quantized = case.quantize(model, batches, [])
    table = Table(model, quantized, batches)
    found: dict[str, Any] = {"given": judged([]), "rules": {}}
    for rule, make in RULES.items():
        started = time.perf_counter()
        choose = make(table)
        chosen = {budget: choose(budget) for budget in BUDGETS}
        seconds = time.perf_counter() - started
        found["rules"][rule] = {
            "seconds": round(seconds, 2),
            "parts": {str(budget): [str(part) for part in parts] for budget, parts in chosen.items()},
            "loss": {str(budget): judged(parts) for budget, parts in chosen.items()},
        }
        print(name, seed, rule, f"{seconds:.1f} s", found["given"], found["rules"][rule]["loss"], flush=True)
    return found


def report(names: Sequence[str], seeds: Sequence[int]) -> str:
    """The table of what has been run so far."""
    lines = ["| case, rule | " + " | ".join(f"{budget:.0%}" for budget in BUDGETS) + " | parts at 10 % | seconds |"]
    lines.append("|---" * (len(BUDGETS) + 3) + "|")
    for name in names:
        cells = [json.loads(file(name, seed).read_text()) for seed in seeds if file(name, seed).is_file()]
        for rule in RULES if cells else ():
            rows = [cell["rules"][rule] for cell in cells]
            shares = []
            for budget in map(str, BUDGETS):
                pairs = [(row["loss"][budget], cell["given"]) for row, cell in zip(rows, cells, strict=True)]
                ratios = [math.log(mine / given) for mine, given in pairs if mine]
                shares.append(f"{100 * math.exp(sum(ratios) / len(ratios)):.0f} %" if ratios else "-")
            parts = sum(len(row["parts"]["0.1"]) for row in rows) / len(rows)
            seconds = sum(row["seconds"] for row in rows) / len(rows)
            lines.append(f"| {name}, {rule} | " + " | ".join(shares) + f" | {parts:.0f} | {seconds:.0f} |")
    return "\n".join(lines)


def file(name: str, seed: int) -> Path:
    return CELLS / f"{name.replace(' ', '_').replace(',', '')}_{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    CELLS.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.cases:
            if not file(name, seed).is_file():
                file(name, seed).write_text(json.dumps(cell(name, seed), indent=1) + "\n")
    print(report(options.cases, options.seeds))


if __name__ == "__main__":
    main()
