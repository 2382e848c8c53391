"""Quantize a timm model, refine it on unlabelled ImageNet images, and print top-1 accuracy on the validation images.

    python examples/imagenet.py deit_tiny_patch16_224 --data IMAGENET --pretrained --weight-bits 3

IMAGENET holds `calibration/` or `train/`, of which `--calibration-images` are drawn (their labels are not read), and
`val/` with one folder per class. Only `--pretrained` downloads anything. `--out` receives the state_dicts of the
quantized and of the refined model, and `results.json` with the table and the report; `--resume` reads them again and
only evaluates.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from workloads import quantize

import cptv_ao

RESULTS, QUANTIZED, REFINED = "results.json", "quantized.pt", "refined.pt"
# What a resumed run must agree on with the one that wrote the files.
IDENTITY = ("model", "weight_bits", "engine", "img_size", "num_classes", "checkpoint")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a timm model")
    parser.add_argument("--data", type=Path, required=True, help="folder with calibration/ or train/, and val/")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded where not cached")
    weights.add_argument("--checkpoint", help="file with the weights; without either they are random")
    parser.add_argument("--weight-bits", type=int, default=8, choices=range(2, 9))
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--val-images", type=int, help="evaluate on this many, drawn at random; default: all")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--paper", action="store_true", help="the published search instead of the default")
    parser.add_argument("--seconds", type=float, help="limit of the search; default: none")
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn and of the search")
    parser.add_argument("--out", type=Path, help="folder for what is written; default: MODEL_wBITS")
    parser.add_argument("--resume", action="store_true", help="read what --out holds and only evaluate")
    parser.add_argument("--engine", default="x86", choices=torch.backends.quantized.supported_engines)
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--num-classes", type=int, help="default: the model's own")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    args = parser.parse_args()
    args.out = args.out or Path(f"{args.model}_w{args.weight_bits}")
    return args


def float_network(args: argparse.Namespace) -> nn.Module:
    """The float model, in eval mode."""
    changes = {"num_classes": args.num_classes, "checkpoint_path": args.checkpoint}
    given = {key: value for key, value in changes.items() if value is not None}
    if not (args.pretrained or args.checkpoint):
        print("neither --pretrained nor --checkpoint: the weights are random and the accuracies mean nothing")
        torch.manual_seed(args.seed)
    if args.img_size is not None:
        try:
            return timm.create_model(args.model, pretrained=args.pretrained, img_size=args.img_size, **given).eval()
        except TypeError as error:  # a CNN takes images of any size
            if "img_size" not in str(error):
                raise
    return timm.create_model(args.model, pretrained=args.pretrained, **given).eval()


def drawn(images: Dataset[Any], count: int | None, args: argparse.Namespace) -> DataLoader[Any]:
    """Batches of `count` of the images, drawn without replacement; all of them, in order, for None."""
    if count is not None:
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(images), generator=generator)[:count]  # type: ignore[arg-type]
        images = Subset(images, order.tolist())
    return DataLoader(images, batch_size=args.batch, num_workers=args.workers)


def loaders(args: argparse.Namespace, model: nn.Module) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Calibration and validation batches, both with the transform that the model is evaluated with."""
    size = {} if args.img_size is None else {"img_size": args.img_size}
    transform = create_transform(**resolve_model_data_config(model, size), is_training=False)
    source = next((args.data / name for name in ("calibration", "train") if (args.data / name).is_dir()), None)
    if source is None or not (args.data / "val").is_dir():
        raise SystemExit(f"--data: expected a folder with calibration/ or train/, and val/, got {args.data}")
    validation = ImageFolder(args.data / "val", transform)
    if len(validation.classes) != model.num_classes:
        raise SystemExit(
            f"--data: expected one folder per class in val/, {model.num_classes} for this model, found "
            f"{len(validation.classes)}; --num-classes makes a model of another size"
        )
    calibration = ImageDataset(str(source), transform=transform)
    return drawn(calibration, args.calibration_images, args), drawn(validation, args.val_images, args)


def top1(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Share of the images whose largest logit is that of their label."""
    with torch.inference_mode():
        hits = [model(images).argmax(1) == labels for images, labels in loader]
    return float(torch.cat(hits).float().mean())


def resumed(args: argparse.Namespace, model: nn.Module, first: Tensor) -> tuple[GraphModule, GraphModule, Any]:
    """The quantized and the refined model and the report, as an earlier run wrote them."""
    if not (args.out / RESULTS).is_file():
        raise SystemExit(f"--resume: expected {args.out / RESULTS} of an earlier run; leave --resume out to make it")
    saved = json.loads((args.out / RESULTS).read_text())
    for key in IDENTITY:
        if saved["arguments"][key] != getattr(args, key):
            raise SystemExit(
                f"--resume: {args.out} was made with {key} = {saved['arguments'][key]!r}, not {getattr(args, key)!r}"
            )
    models = []
    for name in (QUANTIZED, REFINED):
        # Of a copy: a conversion shares its norms with the float network, and their values are written into them.
        _, converted = quantize(copy.deepcopy(model), [first], weight_bits=args.weight_bits, engine=args.engine)
        converted.load_state_dict(torch.load(args.out / name, weights_only=False))  # packed weights are objects
        models.append(converted)
    return models[0], models[1], saved["report"]


def searched(
    args: argparse.Namespace, model: nn.Module, calibration: list[Tensor]
) -> tuple[GraphModule, GraphModule, Any]:
    """The quantized and the refined model and the report; all are written to `--out`."""
    _, quantized = quantize(model, calibration, weight_bits=args.weight_bits, engine=args.engine)
    limits = {"seed": args.seed, "max_seconds": args.seconds}
    config = cptv_ao.RefineConfig.paper(args.weight_bits, **limits) if args.paper else cptv_ao.RefineConfig(**limits)
    refined = cptv_ao.refine(quantized, calibration, float_model=model, config=config, inplace=False)
    report = cptv_ao.report(refined)
    print(f"\n{report}\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, converted in ((QUANTIZED, quantized), (REFINED, refined)):
        torch.save(converted.state_dict(), args.out / name)
    write(args, {}, report.to_dict())
    return quantized, refined, report.to_dict()


def write(args: argparse.Namespace, accuracies: dict[str, float], report: Any) -> None:
    kept = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    found = {"arguments": kept, "top1": accuracies, "report": report}
    (args.out / RESULTS).write_text(json.dumps(found, indent=1))


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = float_network(args)
    batches, validation = loaders(args, model)
    if args.resume:
        quantized, refined, report = resumed(args, model, next(iter(batches))[0])
    else:
        quantized, refined, report = searched(args, model, [images for images, _ in batches])
    print(f"{args.model}, W{args.weight_bits}A8, {len(validation.dataset)} validation images")  # type: ignore[arg-type]
    print("model         top-1  seconds")
    accuracies: dict[str, float] = {}
    for name, network in (("float", model), ("quantized", quantized), ("refined", refined)):
        started = time.monotonic()
        accuracies[name] = top1(network, validation)
        print(f"{name:<9}  {100 * accuracies[name]:>8.2f}  {time.monotonic() - started:>7.0f}", flush=True)
        write(args, accuracies, report)


if __name__ == "__main__":
    main()
