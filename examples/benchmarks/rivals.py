"""What other tools make of the same float networks: `pip install '.[rivals]'; python examples/benchmarks/rivals.py`.

NNCF, AIMET and PPQ quantize the float network themselves, with the calibration images and the bits of the accuracy
benchmark (`recovery.py`), and return a simulation in float, which is judged as it is; ours is a converted model that
runs on int8 kernels. NNCF and PPQ quantize to 8 bits. AIMET leaves what timm's LayerNorm gives in float, so
transformers are not compared. PPQ needs an environment of its own, with an old onnx: `pip install '.[ppq]'` there, and
`--methods PPQ`. Each cell is a file, as there. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cases import SEEDS, WORKLOADS, Case, unit_threads
from origins import origin, told
from recovery import RESULTS, cell, has_attention, judge, refined
from tables import Cells, markdown, top1
from torch import Tensor, nn

from cptv_ao import RefineConfig

CELLS = RESULTS / "rivals"


class _Whole(nn.Module):
    """NNCF adds a module of its own to the network, which a Sequential would run."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network(images)
        return found


def nncf(case: Case) -> nn.Module:
    """NNCF's post-training quantization: SmoothQuant on transformers, its bias correction."""
    import nncf

    images = [image[None] for batch in case.calibration for image in batch]
    return nncf.quantize(
        _Whole(case.float_model),
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER if has_attention(case) else None,
        subset_size=len(images),
    )


def _simulation(case: Case, model: nn.Module) -> nn.Module:
    from aimet_torch.quantsim import QuantizationSimModel

    return QuantizationSimModel(
        model, case.calibration[0][:1], quant_scheme="tf_enhanced", default_param_bw=case.weight_bits
    )


def _prepared(case: Case) -> nn.Module:
    """The float network as AIMET wants it: functions as modules, batch norms folded."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model

    model = prepare_model(case.float_model)
    fold_all_batch_norms(model, tuple(case.calibration[0][:1].shape))
    return model


def _calibrate(case: Case) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        for batch in case.calibration:
            model(batch)

    return run


def sequential_mse(case: Case) -> nn.Module:
    """AIMET: per weight the range whose layer output is nearest to float, layer by layer."""
    from aimet_torch.seq_mse import apply_seq_mse

    sim = _simulation(case, _prepared(case))
    apply_seq_mse(sim, list(case.calibration))
    sim.compute_encodings(_calibrate(case))
    return sim.model


def _ppq(case: Case, learned: bool) -> nn.Module:
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")  # onnx is older than its protobuf
    from ppq import QuantizationSettingFactory, TargetPlatform
    from ppq.api import quantize_onnx_model
    from ppq.executor import TorchExecutor

    model, images = copy.deepcopy(case.float_model), case.calibration[0]
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's: ONNX has no word for it
            module.fused_attn = False
    setting = QuantizationSettingFactory.default_setting()
    setting.lsq_optimization = learned
    setting.lsq_optimization_setting.collecting_device = "cpu"
    with TemporaryDirectory() as folder:
        path, any_number = f"{folder}/network.onnx", {"images": {0: "n"}, "outputs": {0: "n"}}
        torch.onnx.export(
            model, images, path, opset_version=13, dynamo=False,
            input_names=["images"], output_names=["outputs"], dynamic_axes=any_number,
        )  # fmt: skip
        graph = quantize_onnx_model(
            path, list(case.calibration), max(8, len(case.calibration)), list(images.shape), setting=setting,
            platform=TargetPlatform.OPENVINO_INT8, device="cpu", verbose=0,
        )  # fmt: skip
    return _Executed(TorchExecutor(graph, device="cpu"))


class _Executed(nn.Module):
    """PPQ's graph as a module."""

    def __init__(self, executor: Any) -> None:
        super().__init__()
        self._executor = executor

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self._executor.forward(images)[0]
        return found


def ppq(case: Case) -> nn.Module:
    """PPQ's default: ranges by percentiles, ties between the inputs of sums."""
    return _ppq(case, learned=False)


def ppq_lsq(case: Case) -> nn.Module:
    """The same and its LSQ: scales and weights learned block by block, 500 steps each."""
    return _ppq(case, learned=True)


def ours_soon(case: Case) -> nn.Module:
    """Ours in about as many seconds as the quick ones of the others take."""
    return refined(case, RefineConfig(max_seconds=15))[0]


METHODS: dict[str, Callable[[Case], nn.Module]] = {
    "NNCF": nncf,
    "AIMET sequential MSE": sequential_mse,
    "PPQ": ppq,
    "PPQ LSQ": ppq_lsq,
    "ours, max_seconds=15": ours_soon,
}
ROWS = {
    "outlier ViT W8A8": ("NNCF", "PPQ", "PPQ LSQ", "ours, max_seconds=15"),
    "fashion CNN W8A8": tuple(METHODS),
    "fashion CNN W4A8": ("AIMET sequential MSE",),
    "EfficientNet-Lite0 W8A8": tuple(METHODS),
}


def run_cell(name: str, method: str, seed: int) -> None:
    """One cell; it has a process of its own, so that no tool meets what another left behind."""
    unit_threads()
    case = WORKLOADS[name].make(seed)
    started = time.monotonic()
    model = METHODS[method](case)
    result = {"workload": name, "method": method, "seed": seed, "seconds": time.monotonic() - started}
    result |= judge(case, model) | origin()
    CELLS.mkdir(parents=True, exist_ok=True)
    cell(name, method, seed, CELLS).write_text(json.dumps(result, indent=1))


def table(cells: Cells) -> str:
    """Test top-1 in % over the seeds, KL on unseen images and seconds, in Markdown, with ours from `recovery.py`."""
    rows, shown = [["workload", "method", "test top-1, %", "KL on unseen images", "seconds"]], []
    for name, methods in ROWS.items():
        ours = ((name, "ours"), (f"{name}, recipe", "ours"))
        for workload, method in (*((name, method) for method in methods), *ours):
            found = [c for c in cells if (c["workload"], c["method"]) == (workload, method)]
            if found:
                kl, seconds = mean(c["kl"] for c in found), mean(c["seconds"] for c in found)
                label = method if workload == name else f"{method}, after `recipe`"
                rows.append([name, label, top1(found), f"{kl:.4f}", f"{seconds:.0f}"])
                shown += found
    return f"{markdown(rows)}\n\n{told(shown)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--methods", default="", help="methods whose name holds this")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--table", action="store_true", help="print the table of the cells that are there")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.cell:
        name, method, seed = args.cell
        return run_cell(name, method, int(seed))
    if not args.table:
        wanted = [(name, method) for name, methods in ROWS.items() for method in methods]
        for name, method in wanted:
            if args.only.lower() in name.lower() and args.methods in method:
                for seed in SEEDS[: args.seeds]:
                    if not cell(name, method, seed, CELLS).exists():
                        subprocess.run([sys.executable, __file__, "--cell", name, method, str(seed)], check=True)
    cells = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    if cells:
        (RESULTS / "rivals.json").write_text(json.dumps(cells, indent=1))
    ours = json.loads((RESULTS / "recovery.json").read_text())
    print(table([*json.loads((RESULTS / "rivals.json").read_text()), *ours]))
    return None


if __name__ == "__main__":
    main()
