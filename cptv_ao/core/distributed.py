"""Ranks that search together (`torch.distributed`), and all that they tell each other.

Every rank runs the same seeded search and scores some of the batches; what each found is summed into a table that holds
zeros for what others found. Such a sum is exact in any order, so every world size gives the same numbers, bit for bit.
Before each exchange all ranks agree, by one small all-reduce, that none has failed and that none has come apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

import torch
from torch import Tensor
from torch import distributed as dist

from cptv_ao.core.errors import DistributedError

_MAX_DIMS = 8
_TOLD_BYTES = 512


class World:
    """One process alone, or one rank of several; a context that ends all ranks when one of them fails.

    Args:
        together: whether to join the ranks of the default process group. Each rank must then enter, and make the same
            calls in the same order.

    Raises:
        DistributedError: from every call: another rank failed, has gone away, or has come apart from this one.
    """

    def __init__(self, together: bool = False) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        # A group of our own: numbers travel by gloo whatever the default backend is, and nothing of the user's is
        # touched when it is taken down. It has the timeout of the default group.
        self._group = dist.new_group(backend="gloo", timeout=_timeout()) if together else None
        self._broken = False

    @staticmethod
    def of(wanted: bool | None) -> World:
        """The ranks of the default process group where there is one, unless `wanted` says otherwise.

        Raises:
            ValueError: wanted, but there is no process group.
        """
        present = dist.is_available() and dist.is_initialized()
        if wanted and not present:
            raise ValueError(
                "RefineConfig.distributed: expected an initialised process group, found none; call "
                "torch.distributed.init_process_group() first and start the script with torchrun"
            )
        return World(together=present and wanted is not False)

    def mine(self, index: int) -> bool:
        """Whether this rank takes this batch (or part of one)."""
        return index % self.size == self.rank

    def sum(self, table: Tensor, check: bytes = b"", what: str = "the candidate") -> Tensor:
        """The sum of the tables of all ranks, in place; each has zeros where another rank has a value.

        Args:
            table: of any shape, same on every rank.
            check: must be equal on every rank.
            what: names what is checked.
        """
        if self.size > 1:
            self._agree(check=check, what=what)
            if table.is_cuda and "cuda:nccl" in str(dist.get_backend_config()):
                self._talk(dist.all_reduce, table)
            else:
                moved = table.cpu()
                self._talk(dist.all_reduce, moved, group=self._group)
                table.copy_(moved)
        return table

    def same(self, what: str, value: bytes) -> None:
        """Raise on every rank where the ranks do not hold the same value."""
        if self.size > 1:
            self._agree(check=value, what=what)

    def most(self, *values: float) -> tuple[float, ...]:
        """The largest of each of up to two numbers over the ranks."""
        return self._agree(*values) if self.size > 1 else values

    def first(self, value: float) -> float:
        """Rank 0's number, which is not below 0."""
        return self.most(value if self.rank == 0 else 0.0)[0]

    def from_first(self, value: Tensor) -> Tensor:
        """Rank 0's tensor, in place; its shape and dtype are the same on every rank."""
        return self.sum(value if self.rank == 0 else value.zero_())

    def bytes_from_first(self, value: bytes | None) -> bytes | None:
        """Rank 0's bytes, or None where it has none; what the other ranks give does not matter."""
        if self.size == 1:
            return value
        count = int(self.first(0 if value is None else 1 + len(value)))
        if count == 0:
            return None
        table = torch.zeros(count - 1, dtype=torch.uint8)
        if self.rank == 0 and value:
            table.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))
        return bytes(self.sum(table).numpy())

    def share(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Each tensor from the one rank that has it (`mine`), bit for bit, on the CPU of every rank.

        All have the dtype of this rank's tensors (float32 where it has none), and at most 8 dimensions.
        """
        if self.size == 1:
            return [t for t in tensors if t is not None]
        table = torch.zeros(len(tensors), _MAX_DIMS + 1, dtype=torch.int64)
        for row, tensor in zip(table, tensors, strict=True):
            if tensor is not None:
                row[0] = 1 + tensor.dim()
                row[1 : 1 + tensor.dim()] = torch.tensor(tensor.shape)
        dtype = torch.float32
        for tensor in tensors:
            dtype = dtype if tensor is None else tensor.dtype
        shared = []
        for row, tensor in zip(self.sum(table).tolist(), tensors, strict=True):
            whole = torch.zeros(row[1 : row[0]], dtype=dtype)
            shared.append(self.sum(whole if tensor is None else whole.copy_(tensor)))
        return shared

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._group is None:
            return
        if error is not None and not self._broken and not isinstance(error, DistributedError):
            self._tell(f"{type(error).__name__}: {error}")
        dist.destroy_process_group(self._group)

    def _agree(self, *values: float, check: bytes = b"", what: str = "") -> tuple[float, ...]:
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
            header = torch.tensor([1.0 + self.rank, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
            self._talk(dist.all_reduce, header, op=dist.ReduceOp.MAX, group=self._group)
            self._told(int(header[0]) - 1, text)
        except DistributedError:
            pass  # the others have gone already: this rank's own error is what counts

    def _told(self, rank: int, text: str) -> str:
        """The words of the rank that failed (the highest one, where several did at once)."""
        table = torch.zeros(_TOLD_BYTES, dtype=torch.uint8)
        if rank == self.rank:
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
                f"rank {self.rank} lost the other ranks: one has ended, or did not answer within the timeout of "
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


ALONE = World()
"""A process on its own: every call gives back what it is given."""
