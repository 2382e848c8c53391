"""What a function or an object is: the same after a restart, another one where it does something else."""

from __future__ import annotations

import abc
import functools
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao import RefineConfig
from cptv_ao.core.identity import Identity

GAMMA = 2.0


def helper(x: Tensor) -> Tensor:
    return x * GAMMA


def plain(c: Tensor, t: Tensor) -> Tensor:
    return helper((c - t).square().mean())


def recursive(c: Any, n: int) -> Any:
    return c if n == 0 else recursive(c, n - 1)


class Base(abc.ABC):
    KINDS = ("a", "b")

    @abc.abstractmethod
    def go(self) -> Any: ...


class Own(Base):
    def __init__(self) -> None:
        self.weight, self.me = torch.ones(3), self

    def go(self) -> Any:
        return helper(self.weight)

    @property
    def heavy(self) -> bool:
        return True

    @staticmethod
    def light() -> bool:
        return False


@dataclass
class Record:
    weight: float = 1.0
    inner: Any = plain
    names: set[str] = field(default_factory=lambda: {"a", "b", "c", "d"})


class Net(nn.Module):
    def __init__(self, fill: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        for parameter in self.parameters():
            nn.init.constant_(parameter, fill)


def scaled(k: float, calls: int = 0) -> Callable[..., Any]:
    def loss(c: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return k * (c - t).square().mean()

    return loss


def things() -> dict[str, Any]:
    """Made anew at each call."""
    return {
        "function": plain,
        "recursive": recursive,
        "lambda": lambda c, t: (c - t).abs().mean(),
        "default": lambda c, t, k=1.0: (c - t).abs().mean() * k,
        "other default": lambda c, t, k=2.0: (c - t).abs().mean() * k,
        "keyword only": lambda c, *, t: (c - t).abs().mean(),
        "constant in a set": lambda c, t: c if "x" in {"x", "y", "z"} else t,
        "nested": lambda c, t: [(lambda x: x + i)(c) for i in range(2)],
        "other nested": lambda c, t: [(lambda x: x + i)(c) for i in range(3)],
        "closure": scaled(2.0),
        "other closure": scaled(3.0),
        "partial": functools.partial(plain, t=torch.ones(2)),
        "other partial": functools.partial(plain, t=torch.zeros(2)),
        "partial of torch": functools.partial(functional.smooth_l1_loss, beta=0.5),
        "of torch": functional.mse_loss,
        "another of torch": functional.l1_loss,
        "cached": functools.lru_cache(plain),
        "other cached": functools.lru_cache(recursive),
        "object": Own(),
        "method": Own().go,
        "class": Own,
        "record": Record(),
        "other record": Record(weight=2.0),
        "module": Net(),
        "other module": Net(2.0),
        "module of torch": nn.SmoothL1Loss(beta=1.0),
        "other module of torch": nn.SmoothL1Loss(beta=0.5),
        "tensor": torch.ones(2),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "sparse": torch.eye(2).to_sparse(),
        "array": np.arange(3),
        "other array": np.arange(4),
        "ordered": OrderedDict(a=1),
        "dict": {"a": 1, "b": 2},
        "list": [1, 2.0, "3", None, True, b"4", 5j],
        "path": Path("a"),
    }


def digests() -> dict[str, str]:
    identity = Identity()
    found = {name: Identity().of(value).hex() for name, value in things().items()}
    assert {name: identity.of(value).hex() for name, value in things().items()} == found, "one after another, too"
    assert identity.unseen == {}
    return found


def test_equal_things_are_equal_and_others_are_not() -> None:
    found = digests()
    assert digests() == found
    assert len(set(found.values())) == len(found), "all are different"


@pytest.mark.parametrize("seed", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_restart_changes_nothing(seed: str) -> None:
    here = Path(__file__)
    code = "import json, test_identity; print(json.dumps(test_identity.digests()))"
    environment = dict(
        os.environ, PYTHONHASHSEED=seed, PYTHONPATH=os.pathsep.join([str(here.parent), str(here.parents[2])])
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests()


def of_source(source: str, name: str = "made", file: str = "somewhere.py") -> str:
    space: dict[str, Any] = {"__name__": "made"}
    exec(compile(source, file, "exec"), space)
    return Identity().of(space[name]).hex()


HELPED = "K = 2\ndef inner(x): return x * K\ndef made(c, t): return inner(c - t).mean()\n"


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("# a comment\n\n" + HELPED, True),
        (HELPED + "UNRELATED = 3\n", True),
        (HELPED.replace("K = 2", "K = 3"), False),
        (HELPED.replace("x * K", "x + K"), False),
        (HELPED.replace(".mean()", ".sum()"), False),
        (HELPED.replace("c - t", "t - c"), False),
    ],
)
def test_what_a_function_reads_counts(source: str, same: bool) -> None:
    assert (of_source(source, file="elsewhere.py") == of_source(HELPED)) == same


CLASS = """\
class made:
    K = 1
    def __call__(self, c, t): return self.inner(c - t)
    def inner(self, x): return x * self.K
"""


def test_what_a_class_is_counts() -> None:
    assert of_source(CLASS) == of_source("# a comment\n\n" + CLASS, file="elsewhere.py")
    assert of_source(CLASS) != of_source(CLASS.replace("K = 1", "K = 2"))
    assert of_source(CLASS) != of_source(CLASS.replace("x * self.K", "x + self.K"))
    assert of_source(CLASS) != of_source(CLASS.replace("class made", "class Other") + "made = Other\n")


def test_a_memory_is_no_setting() -> None:
    loss = scaled(2.0)
    before = Identity().of(loss)
    loss(torch.ones(2), torch.zeros(2))
    assert Identity().of(loss) == before


def test_what_cannot_be_looked_into_counts_by_its_type() -> None:
    held = [threading.Lock(), (i for i in range(3)), torch.ones(2, device="meta")]
    first, second = Identity(), Identity()
    assert first.of(held) == second.of([threading.Lock(), (i for i in range(4)), torch.ones(3, device="meta")])
    assert list(first.unseen) == ["_thread.lock", "builtins.generator", "torch.Tensor"]

    class Odd:
        def __reduce__(self) -> Any:
            raise ZeroDivisionError

    odd = Identity()
    odd.of(Odd())
    assert len(odd.unseen) == 1


def test_what_holds_itself_has_an_end() -> None:
    def chain(length: int) -> list[Any]:
        first: list[Any] = []
        last = first
        for _ in range(length):
            last.append([])
            last = last[0]
        last.append(first)
        return first

    assert Identity().of(chain(2)) == Identity().of(chain(2)) != Identity().of(chain(3))
    deep = Identity()
    deep.of(chain(100_000))
    assert "builtins.list" in deep.unseen


def test_no_setting_is_told_with_an_address() -> None:
    class Odd:
        def __init__(self) -> None:
            self.__qualname__ = self.__name__ = 3

        def __call__(self, c: Any, t: Any) -> Any: ...

        def __repr__(self) -> str:
            raise ZeroDivisionError

    for loss in [*(thing for thing in things().values() if callable(thing)), Odd()]:
        config = RefineConfig(loss=loss)
        told = config.told()
        assert "0x" not in told["loss"] and told["loss"] and isinstance(config.loss_name, str)
    assert RefineConfig(loss=functools.partial(plain, t=1)).told()["loss"] == "functools.partial(<function plain>, t=1)"
    assert RefineConfig(loss=Own().go).told()["loss"] == "Own.go"
    assert RefineConfig(loss="kl").told()["loss"] == "'kl'"
