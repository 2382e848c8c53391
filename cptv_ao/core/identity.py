"""What a function or an object of the user's is, as a digest that is the same after a restart: no address counts, no
name of a file, no line number.

A function of the user's own is its code, its defaults, and what it reads from around it (closure, globals); a class is
its methods; a partial or an object is its type and its state; what comes with Python or an installed package is its
name. What a function itself assigns outside (`nonlocal`, `global`) is left out: that is a memory, no setting. Nobody
looks into what is reached through the name of a module.
"""

from __future__ import annotations

import abc
import copyreg
import dis
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor

from cptv_ao.core.tensors import raw

_INSTALLED = tuple(str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("stdlib", "purelib", "platlib"))
_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF")
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_ABSTRACT = type(vars(abc.ABC)["_abc_impl"])  # of a cache that every abstract class has
_PLAIN = (type(None), bool, int, float, str, bytes)


class Identity:
    """Digests of values.

    Attributes:
        unseen: types of what cannot be looked into, and counts by its type alone: open files, locks, what other
            languages hold.
    """

    def __init__(self) -> None:
        self.unseen: dict[str, None] = {}
        self._known: dict[int, tuple[Any, bytes]] = {}
        self._open: list[int] = []

    def of(self, value: Any) -> bytes:
        """Equal for values that are made alike, in this process or in another one."""
        if type(value) in _PLAIN:
            return _digest(type(value).__name__, repr(value))
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._open:  # it holds itself
            return _digest("again", str(len(self._open) - self._open.index(id(value))))
        self._open.append(id(value))
        try:
            found = self._of(value)
        except RecursionError:
            found = self._by_type(value)
        finally:
            self._open.pop()
        self._known[id(value)] = value, found
        return found

    def _of(self, value: Any) -> bytes:
        if type(value) in (tuple, list):
            return _digest(type(value).__name__, *map(self.of, value))
        if type(value) in (set, frozenset):
            return _digest("set", *sorted(map(self.of, value)))
        if type(value) is dict:
            return _digest("dict", *sorted(_digest(self.of(key), self.of(held)) for key, held in value.items()))
        for kind, what in self._kinds:
            if isinstance(value, kind):
                return what(value)
        return self._object(value)

    @property
    def _kinds(self) -> tuple[tuple[type, Callable[[Any], bytes]], ...]:
        return (
            (Tensor, self._tensor),
            (ModuleType, lambda module: _digest("module", module.__name__)),
            (type, self._class),
            (FunctionType, self._function),
            (MethodType, lambda method: _digest("method", self.of(method.__func__), self.of(method.__self__))),
            (BuiltinFunctionType, lambda f: _digest("builtin", f.__qualname__, self.of(f.__self__))),
            (CodeType, self._code),
            (CellType, lambda cell: self.of(_content(cell))),
            (property, lambda held: self.of((held.fget, held.fset))),
            (staticmethod, lambda held: self.of(held.__func__)),
            (classmethod, lambda held: self.of(held.__func__)),
        )

    def _function(self, function: FunctionType) -> bytes:
        code, wrapped = function.__code__, self.of(getattr(function, "__wrapped__", None))
        if _is_installed(code.co_filename):
            return _digest("installed", str(function.__module__), function.__qualname__, wrapped)
        stored = _names(code, _STORES)
        around: dict[str, Any] = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        around |= {n: function.__globals__[n] for n in _names(code, _LOADS) if n in function.__globals__}
        read = {name: value for name, value in around.items() if name not in stored}
        parts = (code, function.__defaults__, function.__kwdefaults__, read)
        return _digest("function", wrapped, *map(self.of, parts))

    def _code(self, code: CodeType) -> bytes:
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return _digest(
            "code", code.co_code, self.of((code.co_consts, code.co_names, code.co_freevars, arguments, counts))
        )

    def _class(self, kind: type) -> bytes:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if kind.__module__ in sys.builtin_module_names or _is_installed(file):
            return _digest("installed", kind.__module__, kind.__qualname__)
        held = {n: v for n, v in vars(kind).items() if not _is_dunder(n) or isinstance(v, FunctionType)}
        held = {name: value for name, value in held.items() if not isinstance(value, _ABSTRACT)}
        return _digest("class", kind.__qualname__, self.of(kind.__bases__), self.of(held))

    def _object(self, value: Any) -> bytes:
        """By what pickle and copy would make it of."""
        taken_apart = copyreg.dispatch_table.get(type(value))
        try:
            made = value.__reduce_ex__(4) if taken_apart is None else taken_apart(value)
        except Exception:  # the user's code, or what can be in one process only
            return self._by_type(value)
        parts = made if isinstance(made, str) else [list(part) if isinstance(part, Iterator) else part for part in made]
        return _digest("object", *map(self.of, (type(value), getattr(value, "__wrapped__", None), parts)))

    def _tensor(self, value: Tensor) -> bytes:
        try:
            plain = value.detach().dequantize() if value.is_quantized else value.detach().to_dense()
            content = raw(plain.resolve_conj().resolve_neg()).tobytes()
        except (RuntimeError, TypeError, NotImplementedError):  # without content, or of another kind
            return self._by_type(value)
        return _digest("tensor", str(value.dtype), str(tuple(value.shape)), content)

    def _by_type(self, value: Any) -> bytes:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        self.unseen[name] = None
        return _digest("unseen", name)


def _digest(*parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _names(code: CodeType, operations: tuple[str, ...]) -> set[str]:
    """Names that these operations of a code, and of those inside of it, are about."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    return names.union(*(_names(inner, operations) for inner in code.co_consts if isinstance(inner, CodeType)))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_installed(file: str | None) -> bool:
    """Whether code of this file comes with Python or a package; code without a file was typed in."""
    if file is None:
        return False
    return file.startswith("<frozen") or str(Path(file).resolve()).startswith(_INSTALLED)
