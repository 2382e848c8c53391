"""What a GPU makes of a search: one command, ratios measured in one run.

    python examples/benchmarks/gpu.py [--networks deit_tiny vit_base dinov2_small] [--images 1000] [--batch 100]
    python examples/benchmarks/gpu.py --pack FILE           # where there is no GPU: DINOv2 and photographs, one file
    python examples/benchmarks/gpu.py --packed FILE         # where there is one: what it gets back in a minute

For each network (random weights: what is timed does not depend on them): the share of codes that each op of the twin
has in common with the CPU's on the same inputs; a step of the descent against forward and backward of the float
network at the same batch, in float32 with TF32 and in bf16 autocast, medians of interleaved steps; kernels that a step
launches, times it waits for the card, memory. Then scales with and without NCCL, losses on the CPU's kernels after a
descent on either, and whole default searches, by what their seconds went to. `--device cpu` runs all of it without a
GPU, small: `--networks digits_vit --searched digits_vit --batch 8 --images 64`.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import workloads
from origins import origin, told

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import plain_torch
from cptv_ao.core.events import Event
from cptv_ao.core.losses import kl
from cptv_ao.core.precision import gpu_products
from cptv_ao.core.tensors import first_floating
from cptv_ao.search.proposals.batch_gradient import BatchGradient
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.search.proposals.scale_optimizer import ScaleOptimizer
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import Twin

FULL = {"deit_tiny": "deit_tiny_patch16_224", "vit_base": "vit_base_patch16_224"}
STARTED = time.monotonic()


def say(line: str) -> None:
    """With the seconds that have passed."""
    print(f"[{time.monotonic() - STARTED:6.1f}] {line}", flush=True)


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of its images."""
    torch.manual_seed(0)
    if name in workloads.NETWORKS:
        return workloads.trained(name).eval(), (1, 8, 8) if name == "digits_vit" else (1, 28, 28)
    import timm

    if name == "dinov2_small":
        return timm.create_model("vit_small_patch14_dinov2", img_size=224).eval(), (3, 224, 224)
    return timm.create_model(FULL.get(name, name)).eval(), (3, 224, 224)


def synchronize(device: str) -> None:
    """Wait until a device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Step:
    """A step of the descent, as `refine` does it on a device.

    Args:
        images: one batch of it, on the device; `teacher`: what the float network makes of it.
    """

    def __init__(self, backend: Backend, images: Tensor, teacher: Tensor) -> None:
        few = images[:2].cpu()
        self.twin = Twin(backend).checked(Batch((few,), {}, len(few)))
        self.twin.reround_weights()
        self.twin.to(images.device)
        groups = [LearnableQParams.of(self.twin, group, True) for group in backend.movable().values()]
        self.optimizer = ScaleOptimizer(groups, 3.0, 0.1)
        self.gradient = BatchGradient(self.twin, groups, Objective(kl, first_floating, True, 3.0, 2**29))
        self.batch, self.teacher, self.pull = Batch((images,), {}, len(images)), teacher, None

    def __call__(self) -> None:
        with plain_torch():
            loss, total, self.pull = self.gradient.of(0, self.batch, self.teacher, self.optimizer.leaves, self.pull)
            self.optimizer.step(total, 1e-3)
            float(loss)


def compare_steps(name: str, backend: Backend, model: nn.Module, images: Tensor, rounds: int) -> None:
    """Print how long a step takes, beside forward and backward of the float network."""
    device = str(images.device)
    own = copy.deepcopy(model).to(device)
    with torch.no_grad():
        teacher = own(images)

    def backward(precision: Any) -> None:
        own.zero_grad(set_to_none=True)
        with precision:
            kl(own(images).float(), teacher).backward()

    step = Step(backend, images, teacher)
    contenders: dict[str, Callable[[], None]] = {
        "float, TF32": lambda: backward(gpu_products(tf32=True)),
        "float, bf16": lambda: backward(torch.autocast(images.device.type, torch.bfloat16)),
        "step": step,
    }
    started = time.perf_counter()
    for _ in range(2):  # the first balances the losses, the second is recorded
        step()
    synchronize(device)
    first = time.perf_counter() - started
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for turn in range(rounds + 1):
        for contender, once in contenders.items():
            started = time.perf_counter()
            once()
            synchronize(device)
            if turn:
                times[contender].append(time.perf_counter() - started)
    medians = {contender: statistics.median(found) for contender, found in times.items()}
    told = ", ".join(f"{contender} {1e3 * median:.1f} ms" for contender, median in medians.items())
    spread = (max(times["step"]) - min(times["step"])) / medians["step"]
    ratios = [medians["step"] / medians[key] for key in ("float, TF32", "float, bf16")]
    say(f"{name}: {told} (spread {spread:.0%}, {rounds} rounds)")
    say(f"{name}: a step is {ratios[0]:.2f} x TF32, {ratios[1]:.2f} x bf16; the first two took {first:.1f} s")
    if images.is_cuda:
        count_launches(name, step)
        refused = captured.refused if (captured := step.gradient._runner.captured) else ""
        peak, held = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        say(f"{name}: peak {peak:.1f} GiB of tensors, {held:.1f} reserved; recorded: {refused or 'yes'}")


def count_launches(name: str, step: Step) -> None:
    """Print what a step asks of the driver, and what the card runs."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    calls, kernels = Counter[str](), 0
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            kernels += 1
        elif event.name.startswith("cu"):
            calls[event.name] += 1
    launches = sum(count for call, count in calls.items() if "Launch" in call)
    waits = sum(count for call, count in calls.items() if call == "cudaStreamSynchronize")
    say(f"{name}: a step launches {launches} times, waits {waits} times, and runs {kernels} kernels")


def compare_codes(name: str, backend: Backend, images: Tensor, device: str) -> None:
    """Print how many codes each op has in common with the CPU's, on the CPU's inputs."""
    calls: list[tuple[str, Any, Any, QTensor]] = []

    def see(module: str, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, QTensor):
            calls.append((module, args, kwargs, output))

    def there(value: Any) -> Any:
        if isinstance(value, QTensor):
            fields = {part: getattr(value, part).to(device) for part in ("codes", "scale", "zero_point")}
            return replace(value, **fields)
        return value.to(device) if isinstance(value, Tensor) else value

    with plain_torch():
        twin, other = Twin(backend), Twin(backend).to(device)
        for part, module in twin.module.named_children():
            module.register_forward_hook(lambda _, a, k, o, part=part: see(part, a, k, o), with_kwargs=True)
        twin(images)
        shares = {}
        for part, args, kwargs, wanted in calls:
            found = other.module.get_submodule(part)(*tree_map(there, args), **tree_map(there, kwargs))
            shares[part] = float((found.codes.cpu() == wanted.codes).float().mean())
    worst = min(shares, key=lambda part: shares[part])
    mean = statistics.mean(shares.values())
    say(f"{name}: codes equal the CPU's: {mean:.7f} of {len(shares)} ops, at worst {shares[worst]:.7f} ({worst})")


class Stages:
    """Seconds of a search, by what they went to."""

    def __init__(self) -> None:
        self.seconds = Counter[str]()
        self._last = time.monotonic()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        kinds = {"step": "descent", "proposal": "proposals, made and judged"}
        kind = kinds.get(event.kind, "block visits") if self.seconds else "until the first proposal"
        self.seconds[kind] += now - self._last
        if event.kind in ("proposal", "pass"):
            say(f"    {event.name}: loss {event.loss:.5f} after {event.seconds:.1f} s")
        self._last = now


def search(name: str, given: GraphModule, model: nn.Module, images: Tensor, batch: int, **settings: Any) -> Any:
    """Refine a copy, and print where the seconds went."""
    stages, started = Stages(), time.monotonic()
    refined = cptv_ao.refine(
        copy.deepcopy(given), images.split(batch), float_model=model, config=cptv_ao.RefineConfig(**settings),
        callback=stages, progress=False,
    )  # fmt: skip
    seconds, report = time.monotonic() - started, cptv_ao.report(refined)
    told = ", ".join(f"{stage} {value:.1f} s" for stage, value in stages.seconds.items())
    say(f"{name}, {len(images)} images, {settings}: {seconds:.1f} s ({told})")
    say(f"{name}: loss {report.before.search:.5f} -> {report.after.search:.5f}, {report.status.value}")
    return refined


def compare_descents(device: str, images: int, steps: int) -> None:
    """Print what the kernels say after the same descent on the CPU and on a device, on images that no search saw."""
    model = workloads.trained("digits_vit").eval()
    data = workloads.digits()
    calibration, test = data.calibration(images, 100), data.test
    _, given = workloads.quantize(model, calibration.split(100), weight_bits=3)
    teacher = workloads.logits(model, test)
    for place in ("cpu", device):
        settings = {"gradient_steps": steps, "passes": 0, "device": place}
        refined = search(f"digits ViT, W3A8, {place}", given, model, calibration, 100, **settings)
        unseen = float(kl(workloads.logits(refined, test), teacher))
        say(f"digits ViT, W3A8, {place}: {unseen:.5f} unseen")


def compare_ranks(device: str) -> None:
    """Print whether one rank with a process group of the device's own finds what no group finds."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model = workloads.NETWORKS["digits_vit"][0]().eval()
    images = torch.randn(60, 1, 8, 8)
    _, given = workloads.quantize(model, [images[:20]], weight_bits=3)
    found = []
    for grouped in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            if grouped:
                kind = "nccl" if torch.device(device).type == "cuda" else "gloo"
                dist.init_process_group(kind, init_method=f"file://{folder}/store", rank=0, world_size=1)
            try:
                settings = cptv_ao.RefineConfig(gradient_steps=10, passes=0, device=device)
                refined = cptv_ao.refine(
                    copy.deepcopy(given), images.split(20), float_model=model, config=settings, progress=False
                )
            finally:
                if grouped:
                    dist.destroy_process_group()
        backend = Backend(refined)
        found.append({site: backend.read(site).scale for site in backend.sites})
    apart = max(float((found[1][site] / scale - 1).abs().max()) for site, scale in found[0].items())
    say(f"one rank, with a process group and without: scales at most {apart:.1e} apart")


def pack(path: Path, test: int = 200) -> None:
    """Write DINOv2 ViT-S/14 (weights in float16) and photographs (as JPEG), for a machine without the packages."""
    from dinov2 import MEAN, STD, backbone, photographs
    from PIL import Image

    data = photographs(400, test)
    mean, std = (torch.tensor(part).reshape(3, 1, 1) for part in (MEAN, STD))

    def encoded(images: Tensor) -> list[bytes]:
        found = []
        for image in images:
            pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
            found.append(buffer.getvalue())
        return found

    weights = {key: value.half() for key, value in backbone().state_dict().items()}
    torch.save(
        {
            "weights": weights,
            "calibration": encoded(data.calibration),
            "test": encoded(data.test),
            "source": data.source,
        },
        path,
    )


def packed_search(path: Path, device: str, seconds: float) -> None:
    """Print what DINOv2 gets back on a device, W8A8, on photographs that no search saw."""
    import dinov2
    import numpy as np
    from PIL import Image

    held = torch.load(path, weights_only=True)
    mean, std = (torch.tensor(part).reshape(3, 1, 1) for part in (dinov2.MEAN, dinov2.STD))

    def decoded(images: list[bytes]) -> Tensor:
        pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
        return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std

    model = dinov2.backbone({key: value.float() for key, value in held["weights"].items()})
    calibration, test = decoded(held["calibration"]), decoded(held["test"])
    given = dinov2.quantized(model, calibration[:100])
    teacher = workloads.logits(model, test, 50)
    start = dinov2.fidelity(workloads.logits(given, test, 50), teacher, held["source"])
    say(f"DINOv2 ViT-S/14 W8A8: {start}")
    refined = search("DINOv2", given, model, calibration, 20, device=device, max_seconds=seconds)
    found = dinov2.fidelity(workloads.logits(refined, test, 50), teacher, held["source"])
    say(f"DINOv2 ViT-S/14 W8A8, {seconds:g} s: {found}")


def main() -> None:
    """Parse the arguments and run what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["deit_tiny", "vit_base", "dinov2_small"])
    parser.add_argument("--searched", nargs="*", default=["deit_tiny", "vit_base"], help="a whole search of these")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, help="limit of each search; without one, the default search")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=100, help="of the descents that are compared")
    parser.add_argument("--packed", type=Path, help="what --pack has written")
    parser.add_argument("--pack", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    if arguments.pack is not None:
        pack(arguments.pack)
        return
    device = arguments.device
    card = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "no GPU"
    say(f"{told([origin()])} {card}, {arguments.threads} threads")
    for name in arguments.networks:
        model, shape = network(name)
        images = torch.randn(max(arguments.batch, 8), *shape)
        _, given = workloads.quantize(model, [images[:8]])
        backend = Backend(given)
        attach_float_weights(backend, model)
        compare_codes(name, backend, images[:2], device)
        compare_steps(name, backend, model, images[: arguments.batch].to(device), arguments.rounds)
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    compare_ranks(device)
    if arguments.packed is not None:
        packed_search(arguments.packed, device, arguments.seconds or 60.0)
    if arguments.steps:
        compare_descents(device, min(arguments.images, 500), arguments.steps)
    for name in arguments.searched:
        model, shape = network(name)
        images = torch.randn(arguments.images, *shape)
        _, given = workloads.quantize(model, [images[:8]])
        limit = {} if arguments.seconds is None else {"max_seconds": arguments.seconds}
        search(name, given, model, images, arguments.batch, device=device, **limit)


if __name__ == "__main__":
    main()
