"""Several ranks for a test: forked processes of one gloo group, which inherit what the test has made."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("fork")


@dataclass
class Failed:
    """What a rank raised."""

    kind: str
    text: str
    where: str


def together(size: int, work: Callable[[int], Any], folder: Path, seconds: float = 60.0) -> list[Any]:
    """Run `work(rank)` in so many processes; returns what each returned, `Failed` where it raised, None where it died.

    Args:
        size: ranks.
        work: runs with the process group initialised.
        folder: where the ranks find each other.
        seconds: timeout of the group; the processes are killed after twice as long.
    """
    meeting = folder / f"ranks.{len(list(folder.iterdir()))}"
    ends = []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(rank, size, work, meeting, seconds, there))
        process.start()
        there.close()
        ends.append((process, here))
    return [_result(process, here, 2 * seconds) for process, here in ends]


def _result(process: Any, here: Any, seconds: float) -> Any:
    try:
        found = here.recv() if here.poll(seconds) else Failed("Hang", "", "")
    except EOFError:
        found = None
    process.join(5.0)
    process.kill()
    return found


def _run(rank: int, size: int, work: Callable[[int], Any], meeting: Path, seconds: float, there: Any) -> None:
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout)
    dist.barrier()  # a rank without work would be gone before the others have met it
    try:
        found = work(rank)
    except BaseException as error:
        found = Failed(type(error).__name__, str(error), traceback.format_exc())
    there.send(found)
    there.close()
    os._exit(0)  # no teardown: a rank may be gone
