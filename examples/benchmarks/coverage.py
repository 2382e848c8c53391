"""Which models of timm run end to end, and what it takes: `python examples/benchmarks/coverage.py`.

One model of each family with random weights, which say that code runs, never how accurate it is: what stock torch.ao
makes of it, what `cptv_ao.recipe` does about it, the sites and blocks that are found, and a short refine. Each model
runs in a process of its own and leaves a file in `results/coverage`, so that an interrupted run goes on where it
stopped; the table is written to `docs/coverage.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from origins import origin, told
from torch import Tensor, nn
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.core.blocks import find_blocks

MODELS = (
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "levit_128s", "cait_xxs24_224", "xcit_nano_12_p16_224",
    "pvt_v2_b0", "twins_svt_small", "twins_pcpvt_small", "mixer_s32_224", "convnext_atto", "coat_lite_tiny",
    "maxvit_rmlp_pico_rw_256", "poolformer_s12", "efficientformer_l1", "efficientformerv2_s0", "fastvit_t8",
    "tiny_vit_5m_224", "mobilevit_xxs", "mobilevitv2_050", "visformer_tiny", "crossvit_tiny_240",
    "eva02_tiny_patch14_224", "ghostnet_100", "resnet18", "regnety_002", "densenet121", "repvgg_a0", "mobilenetv1_100",
    "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_b0", "efficientnet_lite0",
    "vgg11_bn", "nfnet_f0", "edgenext_xx_small", "efficientvit_b0", "vit_tiny_r_s16_p8_224", "convmixer_768_32",
    "convit_tiny", "mvitv2_tiny", "hiera_tiny_224", "nest_tiny", "inception_next_atto", "lcnet_050", "shvit_s1",
    "starnet_s050", "rexnet_100", "repvit_m0_9", "pit_ti_224", "gmlp_ti16_224", "resmlp_12_224", "vovnet39a", "dla34",
    "skresnet18", "res2net50_14w_8s", "hgnetv2_b0", "hrnet_w18_small", "dpn68", "deit_tiny_distilled_patch16_224",
    "caformer_s18", "davit_tiny", "focalnet_tiny_srf", "gcvit_xxtiny", "sequencer2d_s", "tnt_s_patch16_224",
    "volo_d1_224", "mobileone_s0",
)  # fmt: skip
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "coverage"
DOCUMENT = HERE.parent.parent / "docs" / "coverage.md"
_LIMIT_S = 900
_SMALL = 128
_CLASSES = 10
_BATCH, _BATCHES = 4, 3
_FLOAT_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def network(name: str) -> nn.Module:
    """A model with random weights in which no branch is switched off by an initial zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=_CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                module.running_var.uniform_(0.5, 2.0)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == _CLASSES:
                module.weight.normal_(std=0.2)  # so that the outputs say something
    return model


def image_size(model: Any) -> int:
    """The smallest size that needs no change of the model."""
    full = int(model.default_cfg.get("input_size", (3, 224, 224))[-1])
    if model.default_cfg.get("fixed_input_size"):
        return full
    for size in (_SMALL, full):
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return size
    raise ValueError("runs on no size")


def stock(model: nn.Module, image: Tensor) -> str:
    """What stock calls make of a model: "ok", or the step that fails and why."""
    step = "prepare"
    try:
        prepared = prepare_fx(copy.deepcopy(model), cptv_ao.qconfig_mapping(engine="x86"), (image,))
        step = "calibrate"
        prepared(image)
        step = "convert"
        converted = convert_fx(prepared)
        step = "run"
        converted(image)
    except Exception as error:  # whatever torch.ao ran into is the result
        return f"{step}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return "ok"


def with_recipe(model: nn.Module, batches: list[Tensor]) -> tuple[cptv_ao.Recipe, GraphModule]:
    """Converted by stock calls that are given what the recipe says."""
    ready = cptv_ao.recipe(model, (batches[0],), qconfig_mapping=cptv_ao.qconfig_mapping(engine="x86"))
    custom: PrepareCustomConfig = ready.prepare_custom_config
    prepared = prepare_fx(ready.model, ready.qconfig_mapping, (batches[0],), prepare_custom_config=custom)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return ready, convert_fx(prepared)


def examine(name: str) -> dict[str, Any]:
    """All columns of one model."""
    model = network(name)
    size = image_size(model)
    batches = list(torch.randn(_BATCH * _BATCHES, 3, size, size).split(_BATCH))
    result: dict[str, Any] = {"model": name, "size": size, **origin()}
    with torch.no_grad():
        result["stock"] = stock(model, batches[0])
    started = time.monotonic()
    ready, quantized = with_recipe(model, batches)
    result["recipe"] = list(ready.notes)
    result["convert_s"] = time.monotonic() - started
    sites = cptv_ao.find_sites(quantized)
    kinds = Counter(site.kind for site in sites.values())
    result |= {"weights": kinds["weight"], "activations": kinds["activation"], "unknown": list(sites.unknown)}
    result["float"] = sum(type(module) in _FLOAT_KINDS for module in quantized.modules())
    found = find_blocks(sites.values())
    result["blocks"] = [block.name for block in found]
    result["largest"] = max(sum(site.kind == "weight" for site in block.sites) for block in found)
    started = time.monotonic()
    config = cptv_ao.RefineConfig(gradient_steps=4, passes=1, evaluations=1, max_evaluations=12, holdout=0.3)
    refined = cptv_ao.refine(quantized, batches, float_model=ready.model, config=config, progress=False)
    report = cptv_ao.report(refined)
    result["refine_s"] = time.monotonic() - started
    result["loss"] = [report.before.search, report.after.search, report.before.holdout, report.after.holdout]
    result["notes"] = list(report.notes)
    with torch.no_grad():
        result["finite"] = bool(torch.isfinite(refined(batches[0][:1])).all())
    return result


def run_all(names: tuple[str, ...], jobs: int) -> None:
    """Examine what is missing, in a process of its own each."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_one, [name for name in names if not (RESULTS / f"{name}.json").exists()]))


def run_one(name: str) -> None:
    """Examine one model in a process; a failure is a result too."""
    started = time.monotonic()
    try:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        failure = "" if done.returncode == 0 else (errors or ["died"])[-1]
    except subprocess.TimeoutExpired:
        failure = f"took more than {_LIMIT_S} s"
    if failure:
        (RESULTS / f"{name}.json").write_text(json.dumps({"model": name, "failure": failure}, indent=1))
    print(f"{name}: {failure or 'ok'}, {time.monotonic() - started:.0f} s", flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """The document."""
    works = [r for r in results if "failure" not in r]
    plain = sum(r["stock"] == "ok" for r in works)
    lines = [
        "# Models of timm",
        "",
        f"{len(works)} of {len(results)} run end to end (traced, converted, refined on the int8 kernels of x86),",
        f"{plain} of them with stock calls alone, the others with what [`cptv_ao.recipe`](models.md) does.",
        "Written by `python examples/benchmarks/coverage.py` (random weights: code runs, nothing is said of accuracy).",
        "",
        "Columns: image size; what stock torch.ao says; sites of weights and activations, and linear and convolution",
        "layers left in float; blocks that are searched, and weights in the largest of them; KL to float on 8 search",
        "images before and after a dozen candidates and 4 gradient steps; seconds to convert and to refine.",
        "",
        told(works),
        "",
        "| model | size | stock torch.ao | weights | activations | float | blocks | largest | KL before | after | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "failure" in r:
            lines.append(f"| {r['model']} | | **fails**: {_cell(r['failure'])} | | | | | | | | |")
            continue
        cells = [r["model"], r["size"], _cell(r["stock"]), r["weights"], r["activations"], r["float"], len(r["blocks"])]
        cells += [r["largest"]]
        cells += [f"{r['loss'][0]:.2g}", f"{r['loss'][1]:.2g}", f"{r['convert_s']:.0f} + {r['refine_s']:.0f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", "## What the recipe did", ""]
    lines += [f"- {r['model']}: {_cell('; '.join(r['recipe']))}" for r in works if r["recipe"]]
    unknown = [f"- {r['model']}: {', '.join(r['unknown'])}" for r in works if r["unknown"]]
    lines += ["", "## Quantized ops that are left alone", "", *(unknown or ["None."])]
    notes = [f"- {r['model']}: {_cell(n)}" for r in works for n in r["notes"] if n.startswith("no proposals")]
    lines += ["", "## Models that the float twin does not know whole", "", *(notes or ["None."])]
    lines += ["", "## Blocks", ""]
    lines += [f"- {r['model']}: {', '.join(r['blocks'])}" for r in works]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, one thread each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torch.ao warns about its own defaults, thousands of times
    torch.set_num_threads(1)
    torch.backends.quantized.engine = "x86"
    if args.one:
        (RESULTS / f"{args.one}.json").write_text(json.dumps(examine(args.one), indent=1))
        return
    run_all(tuple(name for name in MODELS if args.only in name), args.jobs)
    found = [RESULTS / f"{name}.json" for name in MODELS]
    DOCUMENT.write_text(table([json.loads(path.read_text()) for path in found if path.exists()]))


if __name__ == "__main__":
    main()
