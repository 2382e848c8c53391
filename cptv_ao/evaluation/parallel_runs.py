"""Running parts of batches side by side: int8 kernels use many cores badly one after another.

On 16 cores DeiT-Ti's take .47 s for 100 images at once, and .25 s for eight parts of them in threads of two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

from cptv_ao.core.batches import Batch
from cptv_ao.fx.known_functions import is_listed, is_listed_module
from cptv_ao.fx.running import run

# Cores that run one part, and the images that it has at least.
_CORES, _LEAST = 2, 4
# Engines whose kernels may run in several threads at once: QNNPACK's write into the weights that they hold.
_ENGINES = ("fbgemm", "x86", "onednn")

#: Of the parts of a batch, what a model will have returned for each.
Parts = list["Future[Any]"]


class ParallelRuns:
    """Runs parts of batches in threads, each of which has some of the cores that torch may use.

    Args:
        model: `may_share` says whether it may run so.
        workers: threads.
    """

    def __init__(self, model: Callable[..., Any], workers: int) -> None:
        self._model, self._workers = model, workers
        self._pool: ThreadPoolExecutor | None = None

    @staticmethod
    def of(model: GraphModule) -> ParallelRuns | None:
        """Runs of a model; None where one after another is as fast, or safe."""
        workers = torch.get_num_threads() // _CORES
        return ParallelRuns(model, workers) if workers > 1 and may_share(model) else None

    def begin(self, index: int, batch: Batch) -> Parts:
        """Run the parts of a batch as soon as there is a thread."""
        if self._pool is None:
            self._pool = _pool(self._workers)
        count = min(self._workers, batch.images // _LEAST)
        return [self._pool.submit(self._run, part, index) for part, _ in batch.parts(count)]

    def _run(self, part: Batch, index: int) -> Any:
        with torch.inference_mode():  # which threads do not take over
            return run(self._model, part, index)


def may_share(model: GraphModule) -> bool:
    """Whether a model may run in several threads at once: torch's engine can, it is made of what torch itself brings,
    which keeps nothing from one run to the next, and no hook watches it."""
    if torch.backends.quantized.engine not in _ENGINES:
        return False
    modules = dict(model.named_modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules.values()):
        return False

    def listed(node: Node) -> bool:
        if node.op == "call_module":
            return is_listed_module(modules[str(node.target)])
        kinds = (OpOverload, OpOverloadPacket)
        return node.op != "call_function" or isinstance(node.target, kinds) or is_listed(node.target)

    return all(listed(node) for node in model.graph.nodes)


def results(parts: Sequence[Future[Any]]) -> list[Any]:
    """What a model returned for each part, once all are done."""
    return [part.result() for part in parts]


def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that have their number of cores; that of the thread which asks is as before."""
    threads, all_begun = torch.get_num_threads(), Barrier(workers + 1)

    def begin() -> None:
        torch.set_num_threads(_CORES)
        torch.get_num_threads()  # else the thread takes what was last set anywhere when it first computes
        all_begun.wait()  # so that each thread begins once

    pool = ThreadPoolExecutor(workers, "cptv_ao")
    for _ in range(workers):
        pool.submit(begin)
    all_begun.wait()
    torch.set_num_threads(threads)
    return pool
