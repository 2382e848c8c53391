"""Leaving what is the user's as it came: the model after an exception, signal handlers, training flags, filters."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cptv_ao.core.heap import kept_heap
from cptv_ao.core.precision import gpu_products

# How the warnings begin that torch gives in every forward of a quantized model.
_FLOODS = (
    r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other",
    "All inputs of this cat operator must share",
)


@contextmanager
def stop_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C asks to stop, the second raises KeyboardInterrupt as ever.

    Outside the main thread, and where somebody handles SIGINT already, nothing is changed.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return

    from tqdm.auto import tqdm  # writes above its bar, where there is one

    def handle(_: int, __: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()
        tqdm.write("cptv_ao: stopping with the best scales so far; Ctrl-C again gives up", file=sys.stderr)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def without_torch_floods() -> Iterator[None]:
    """Inside, torch does not say at each forward that quantized tensors are deprecated, and cats not tied.

    That is hundreds of times in a refine. The user's own filters are as they were afterwards, and hold for all other
    warnings meanwhile.
    """
    with warnings.catch_warnings():
        for start in _FLOODS:
            warnings.filterwarnings("ignore", start, UserWarning)
        yield


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, whatever is on around: no gradients, no inference tensors, no autocast (which quantized kernels do not
    follow, so that teacher and model would differ), no TF32 on a GPU, and none of torch's floods."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(without_torch_floods())
        stack.enter_context(gpu_products(tf32=False))
        stack.enter_context(kept_heap())
        yield


def check_device(device: str) -> None:
    """Where the simulation is to run.

    Raises:
        ValueError: tensors cannot be put, or computed, there.
    """
    problem = "it holds no numbers"
    try:
        if torch.zeros(1, device=device).device.type != "meta":
            return
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = str(error).splitlines()[0]
    raise ValueError(
        f"RefineConfig.device: expected a device that this process can compute on, got {device!r}: {problem}; "
        "torch.cuda.is_available() and torch.cuda.device_count() say what is there, 'cpu' always works"
    )


def is_cpu(device: str) -> bool:
    """Whether a device by name is the CPU, where kernels run, and nothing has to be moved."""
    return torch.device(device).type == "cpu"


@contextmanager
def hooked(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """What was registered is there while the context lasts."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Run in eval mode; every module gets its own training flag back, and every buffer that a forward writes (one that
    counts calls, say) the values that it had."""
    modules = [module for model in models if model is not None for module in model.modules()]
    flags = [(module, module.training) for module in modules]
    buffers = {id(b): (b, b.detach().clone()) for module in modules for b in module.buffers(recurse=False)}
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.inference_mode(), torch.no_grad():
            for buffer, before in buffers.values():
                if buffer.shape == before.shape and not torch.equal(buffer, before):
                    buffer.copy_(before)
