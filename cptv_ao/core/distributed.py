"""Ranks that search together (`torch.distributed`), and all that they tell each other.

Every rank runs the same seeded search and scores some of the batches; what each found is summed into a table that holds
zeros for what others found. Such a sum is exact in any order, so every world size gives the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor
from torch import distributed as dist

from cptv_ao.core.rank_exchange import Exchange

_MAX_DIMS = 8


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
        self._exchange = Exchange(self.rank) if together else None

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
        if self._exchange is not None:
            self._exchange.agree(check=check, what=what)
            self._exchange.add(table)
        return table

    def same(self, what: str, value: bytes) -> None:
        """Raise on every rank where the ranks do not hold the same value."""
        if self._exchange is not None:
            self._exchange.agree(check=value, what=what)

    def most(self, *values: float) -> tuple[float, ...]:
        """The largest of each of up to two numbers over the ranks."""
        return values if self._exchange is None else self._exchange.agree(*values)

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
        if self._exchange is not None:
            self._exchange.end(error)


ALONE = World()
"""A process on its own: every call gives back what it is given."""
