"""The networks and the data of the examples and benchmarks: small, trained, and on real images.

Test images are seen by no training and no search; calibration images come from the training images.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

CHECKPOINTS = Path(__file__).parent / "checkpoints"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MEAN, _FASHION_STD = 0.2860, 0.3530
_DIGITS_TRAIN = 1100


@dataclass(frozen=True)
class Images:
    """Training and test images (N, C, H, W), float32 and normalised, with their labels (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def calibration(self, count: int, seed: int) -> Tensor:
        """`count` training images drawn without replacement."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train[order[:count]]


def digits() -> Images:
    """The 8x8 digits of scikit-learn: 1,100 training and 697 test images (the usual order, so other writers)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    cut = _DIGITS_TRAIN
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:])


def fashion_mnist(folder: Path = FASHION_MNIST) -> Images:
    """Fashion-MNIST from the four IDX files of the Debian package: 60,000 training and 10,000 test images.

    Raises:
        FileNotFoundError: with the command that installs the package.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected the Fashion-MNIST files in {folder}, found no such folder; "
            "run: apt-get install dataset-fashion-mnist"
        )

    def idx(name: str) -> Tensor:
        with gzip.open(folder / name, "rb") as file:
            raw = file.read()
        dims = raw[3]
        shape = np.frombuffer(raw, ">i4", dims, 4)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, -1, 4 + 4 * dims).reshape(shape).copy())

    def images(name: str) -> Tensor:
        return ((idx(name).float() / 255 - _FASHION_MEAN) / _FASHION_STD).unsqueeze(1)

    return Images(
        images("train-images-idx3-ubyte.gz"),
        idx("train-labels-idx1-ubyte.gz").long(),
        images("t10k-images-idx3-ubyte.gz"),
        idx("t10k-labels-idx1-ubyte.gz").long(),
    )


def digits_vit() -> nn.Module:
    """A ViT for the digits: 16 patches of 2x2, dim 48, 4 blocks; untrained."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4, mlp_ratio=3
    )


def fashion_vit() -> nn.Module:
    """A ViT for Fashion-MNIST: 16 patches of 7x7, dim 64, 6 blocks; untrained."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=4, mlp_ratio=4
    )


def fashion_cnn() -> nn.Module:
    """A small CNN of timm's blocks (BatchNormAct2d, depthwise convolutions) for Fashion-MNIST; untrained."""
    from timm.layers import ConvNormAct
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual

    return nn.Sequential(
        ConvNormAct(1, 24, 3, stride=2),
        DepthwiseSeparableConv(24, 32),
        InvertedResidual(32, 48, stride=2, exp_ratio=3.0),
        InvertedResidual(48, 48, exp_ratio=3.0),
        InvertedResidual(48, 64, stride=2, exp_ratio=3.0),
        InvertedResidual(64, 64, exp_ratio=3.0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(64, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Images]]] = {
    "digits_vit": (digits_vit, digits),
    "fashion_vit": (fashion_vit, fashion_mnist),
    "fashion_cnn": (fashion_cnn, fashion_mnist),
}


def trained(name: str) -> nn.Module:
    """One of `NETWORKS` with the committed weights that `train.py` made, in eval mode."""
    model = NETWORKS[name][0]()
    state = torch.load(CHECKPOINTS / f"{name}.pt", weights_only=True)
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return model.eval()


def with_outliers(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same function with outliers in its activations, as large pretrained ViTs have them.

    After each norm of each block three channels are 30 to 100 times larger, and the columns of the following
    linear layer that read them as much smaller.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                channels = torch.randperm(len(norm.weight), generator=generator)[:3]
                factors = 30 + 70 * torch.rand(3, generator=generator)
                norm.weight[channels] *= factors
                norm.bias[channels] *= factors
                linear.weight[:, channels] /= factors
    return model


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings: torch.ao warns about its own defaults, thousands of times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quantize(
    model: nn.Module,
    calibration: Iterable[Tensor],
    *,
    weight_bits: int = 8,
    reduce_range: bool = True,
    engine: str = "x86",
) -> tuple[GraphModule, GraphModule]:
    """Stock post-training quantization with torch.ao FX; returns the prepared and the converted model.

    Per-channel symmetric weights of `weight_bits`, per-tensor 8-bit activations with histogram observers; with
    `reduce_range` their scales are chosen for 7 bits, as torch.ao does by default on x86.
    """
    from torch.ao.quantization import HistogramObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    half = 2 ** (weight_bits - 1)
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-half, quant_max=half - 1
    )
    activation = HistogramObserver.with_args(reduce_range=reduce_range)
    batches = list(calibration)
    with quietly():
        torch.backends.quantized.engine = engine
        mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
        prepared = prepare_fx(model, mapping, (batches[0],))
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
        converted = convert_fx(prepared)
    return prepared, converted


def quantize_exported(
    model: nn.Module,
    calibration: Iterable[Tensor],
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    fold_quantize: bool = True,
) -> GraphModule:
    """Post-training quantization on the PT2E flow, where the graph holds activations to their bits too.

    Per-channel symmetric weights and per-tensor activations with histogram observers, at the inputs of linear layers
    and convolutions, as torchao's X86InductorQuantizer places them. Needs `pip install torchao`.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    batches = list(calibration)
    with quietly(), torch.no_grad():
        dynamic = ({0: torch.export.Dim("batch", min=1, max=1 << 16)},)
        # On torch 2.11 the quantizer finds layers only in what was exported strictly, on 2.13 it needs no help.
        strict = torch.__version__ < (2, 13)
        exported = torch.export.export(model, (batches[0],), dynamic_shapes=dynamic, strict=strict).module()
        prepared = prepare_pt2e(exported, x86_quantizer(weight_bits, activation_bits))
        for batch in batches:
            prepared(batch)
        return convert_pt2e(prepared, fold_quantize=fold_quantize)


def x86_quantizer(weight_bits: int = 8, activation_bits: int = 8) -> Any:
    """torchao's X86InductorQuantizer with per-channel symmetric weights and per-tensor activations of so many bits."""
    from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

    half = 2 ** (weight_bits - 1)
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=2**activation_bits - 1,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=HistogramObserver,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-half,
        quant_max=half - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
    )
    return X86InductorQuantizer().set_global(QuantizationConfig(activation, None, weight, None))


def logits(model: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """Outputs of a model on all images (N, C)."""
    with quietly(), torch.inference_mode():
        return torch.cat([model(part) for part in images.split(batch)])


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is that of their label."""
    return float((outputs.argmax(1) == labels).float().mean())


def agreement(outputs: Tensor, teacher: Tensor) -> float:
    """Share of the images on which two models choose the same class."""
    return float((outputs.argmax(1) == teacher.argmax(1)).float().mean())


def divergence(outputs: Tensor, teacher: Tensor) -> float:
    """KL of what a model gives to what the teacher gives, mean over the images, in nats."""
    log_probabilities = (logits.double().log_softmax(1) for logits in (outputs, teacher))
    return float(functional.kl_div(*log_probabilities, reduction="batchmean", log_target=True))


def shown(
    models: Mapping[str, nn.Module], teacher: nn.Module, images: Tensor, labels: Tensor | None = None
) -> list[float]:
    """Print how models do on test images: their accuracy, and how often they choose what the teacher chooses.

    Returns what is in the first column, model by model: accuracy, or agreement without labels.
    """
    wanted = logits(teacher, images)
    print(f"{len(images)} test images" + ("" if labels is None else f"; float accuracy {accuracy(wanted, labels):.4f}"))
    print("model                 " + ("" if labels is None else "accuracy  ") + "agrees with float")
    found = []
    for name, model in models.items():
        outputs = logits(model, images)
        same = agreement(outputs, wanted)
        right = same if labels is None else accuracy(outputs, labels)
        found.append(right)
        print(f"{name:<20}  " + ("" if labels is None else f"{right:>8.4f}  ") + f"{same:>17.4f}", flush=True)
    return found


def options(text: str | None, *, seconds: float) -> argparse.ArgumentParser:
    """The options that all examples have: `--seconds`, the limit of each search, and `--threads`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=seconds, help="limit of each search, default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    return parser
