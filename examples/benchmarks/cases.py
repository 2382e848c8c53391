"""The workloads of the accuracy benchmark: converted models with their float originals, calibration and test images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import photos
from workloads import NETWORKS, logits, quantize, quantize_exported, trained, with_outliers

import cptv_ao

# Calibration draws of the tuning and of the table never meet: their seeds differ.
SEEDS = (0, 1, 2)
TUNING_SEED = 100


@dataclass(frozen=True)
class Case:
    """One converted model and all that is needed to refine and judge it.

    `unseen` are images like those of the calibration that no search sees; `labels` is None where the float network's
    own choice is the reference.
    """

    float_model: nn.Module
    quantized: GraphModule
    calibration: tuple[Tensor, ...]
    unseen: Tensor
    test: Tensor
    labels: Tensor | None
    weight_bits: int

    @cached_property
    def teacher(self) -> tuple[Tensor, Tensor]:
        """What the float network gives on the test images, and on the unseen ones."""
        return logits(self.float_model, self.test, 100), logits(self.float_model, self.unseen, 100)


@dataclass(frozen=True)
class Workload:
    """How a case is made from a seed, and the seconds that each method may search on it."""

    make: Callable[[int], Case]
    seconds: float
    isa: str | None = None
    """ONEDNN_MAX_CPU_ISA of the process: AVX2 has no VNNI, so full-range activations saturate on every machine."""


def _small(
    network: str,
    weight_bits: int,
    *,
    reduce_range: bool = True,
    engine: str = "x86",
    change: Callable[[nn.Module], nn.Module] | None = None,
    ready: bool = False,
) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        data = NETWORKS[network][1]()
        model = trained(network) if change is None else change(trained(network))
        if ready:
            model = cptv_ao.recipe(model, (data.calibration(100, seed),)).model
        count = 900 if network.startswith("digits") else 1000
        drawn = data.calibration(min(2 * count, len(data.train)), seed)
        calibration = drawn[:count].split(100)
        _, quantized = quantize(model, calibration, weight_bits=weight_bits, reduce_range=reduce_range, engine=engine)
        return Case(model, quantized, calibration, drawn[count:], data.test, data.test_labels, weight_bits)

    return make


def _exported(bits: int, change: Callable[[nn.Module], nn.Module] | None = None) -> Callable[[int], Case]:
    """Weights and activations of so many bits, on the PT2E flow."""

    def make(seed: int) -> Case:
        data, model = NETWORKS["fashion_vit"][1](), trained("fashion_vit")
        model = model if change is None else change(model)
        drawn = data.calibration(2000, seed)
        calibration = drawn[:1000].split(100)
        quantized = quantize_exported(model, calibration, weight_bits=bits, activation_bits=bits)
        return Case(model, quantized, calibration, drawn[1000:], data.test, data.test_labels, bits)

    return make


def _photographs(seed: int, ready: bool = False) -> Case:
    model: nn.Module = photos.efficientnet()
    calibration = photos.crops(photos.CALIBRATION, 250, seed).split(25)
    if ready:
        model = cptv_ao.recipe(model, (calibration[0],)).model
    unseen = photos.crops(photos.CALIBRATION, 100, 1000 + seed)
    test = photos.crops(photos.TEST, 400, 2000)
    _, quantized = quantize(model, calibration)
    return Case(model, quantized, calibration, unseen, test, None, 8)


def _saturating(seed: int) -> Case:
    return _small("fashion_vit", 8, reduce_range=False, engine="onednn")(seed)


WORKLOADS: dict[str, Workload] = {
    "fashion ViT W2A8": Workload(_small("fashion_vit", 2), 60),
    "fashion ViT W3A8": Workload(_small("fashion_vit", 3), 25),
    "fashion ViT W4A8": Workload(_small("fashion_vit", 4), 25),
    "fashion ViT W8A8 saturating": Workload(_saturating, 25, isa="AVX2"),
    "outlier ViT W8A8": Workload(_small("fashion_vit", 8, change=with_outliers), 25),
    "outlier ViT W8A8, recipe": Workload(_small("fashion_vit", 8, change=with_outliers, ready=True), 25),
    "digits ViT W2A8": Workload(_small("digits_vit", 2), 60),
    "digits ViT W3A8": Workload(_small("digits_vit", 3), 25),
    "fashion CNN W8A8": Workload(_small("fashion_cnn", 8), 25),
    "fashion CNN W4A8": Workload(_small("fashion_cnn", 4), 25),
    "fashion ViT PT2E W4A4": Workload(_exported(4), 60),
    "fashion ViT PT2E W3A3": Workload(_exported(3), 60),
    "outlier ViT PT2E W4A4": Workload(_exported(4, with_outliers), 60),
    "EfficientNet-Lite0 W8A8": Workload(_photographs, 180),
    "EfficientNet-Lite0 W8A8, recipe": Workload(partial(_photographs, ready=True), 180),
}


def start_unit(script: str, name: str, *words: str) -> None:
    """Run one unit of a script in a process of its own, with the instruction set that its workload asks for."""
    environment = dict(os.environ)
    if WORKLOADS[name].isa:
        environment["ONEDNN_MAX_CPU_ISA"] = str(WORKLOADS[name].isa)
    subprocess.run([sys.executable, script, "--unit", name, *words], env=environment, check=True)


def unit_threads() -> None:
    """One thread: cells run side by side, and times stay comparable."""
    torch.set_num_threads(1)
