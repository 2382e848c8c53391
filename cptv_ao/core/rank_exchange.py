"""The line between ranks that search together: what they say to each other, and that one of them has failed.

Before each exchange all ranks agree, by one small all-reduce, that none has failed and that none has come apart.
"""

from __future__ import annotations

import zlib
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from cptv_ao.core.errors import DistributedError

_TOLD_BYTES = 512


class Exchange:
    """One end of the line.

    Numbers travel by gloo whatever the default backend is, in a group of our own, with the timeout of the default one:
    nothing of the user's is touched when it is taken down.

    Args:
        rank: this one's.

    Raises:
        DistributedError: from every call: another rank failed, has gone away, or has come apart from this one.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._group = dist.new_group(backend="gloo", timeout=_timeout())
        self._broken = False

    def add(self, table: Tensor) -> None:
        """Sum a table over all ranks, in place."""
        if table.is_cuda and "cuda:nccl" in str(dist.get_backend_config()):
            self._talk(dist.all_reduce, table)
        else:
            moved = table.cpu()
            self._talk(dist.all_reduce, moved, group=self._group)
            table.copy_(moved)

    def end(self, error: BaseException | None) -> None:
        """Take it down; the other ranks are told of an error that is this rank's own."""
        if error is not None and not self._broken and not isinstance(error, DistributedError):
            self._tell(f"{type(error).__name__}: {error}")
        dist.destroy_process_group(self._group)

    def agree(self, *values: float, check: bytes = b"", what: str = "") -> tuple[float, ...]:
        """One all-reduce of the largest: who failed, what must be equal (and its negative), and up to two numbers."""
        code = float(zlib.crc32(check))
        header = torch.tensor([0.0, code, -code, *values, 0.0, 0.0][:5], dtype=torch.float64)
        self._talk(dist.all_reduce, header, op=dist.ReduceOp.MAX, group=self._group)
        failed, most, negative, *found = header.tolist()
        if failed:
            rank = int(failed) - 1
            raise DistributedError(f"rank {rank} failed, so all ranks end: {self._told(rank, '')}", rank)
        if most != -negative:
            raise DistributedError(
                f"the ranks have come apart: expected the same on every rank, {what} differs; each rank needs the same "
                "model, config and batches in the same order (no DistributedSampler, one seed for shuffling)"
            )
        return tuple(found[: len(values)])

    def _tell(self, text: str) -> None:
        """Meet the other ranks at their next exchange, and say why there is none. What they say does not matter."""
        try:
            header = torch.tensor([1.0 + self._rank, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
            self._talk(dist.all_reduce, header, op=dist.ReduceOp.MAX, group=self._group)
            self._told(int(header[0]) - 1, text)
        except DistributedError:
            pass  # the others have gone already: this rank's own error is what counts

    def _told(self, rank: int, text: str) -> str:
        """The words of the rank that failed (the highest one, where several did at once)."""
        table = torch.zeros(_TOLD_BYTES, dtype=torch.uint8)
        if rank == self._rank:
            words = bytearray(text.encode()[:_TOLD_BYTES])
            table[: len(words)] = torch.frombuffer(words, dtype=torch.uint8) if words else table[:0]
        self._talk(dist.all_reduce, table, group=self._group)
        return bytes(table.numpy()).rstrip(b"\0").decode(errors="replace")

    def _talk(self, collective: object, *args: object, **kwargs: object) -> None:
        self._broken = True  # until it is over: an interrupt inside leaves no way to speak to the others
        try:
            collective(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self._rank} lost the other ranks: one has ended, or did not answer within the timeout of "
                f"init_process_group ({error})"
            ) from error
        self._broken = False


def _timeout() -> timedelta | None:
    """That of the default process group, which torch keeps to itself; None, its default, where it cannot be had."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    try:
        found = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None
