"""python tests/tools/op_table.py: writes docs/ops.md, what the float twin computes of torch's quantized ops.

Each op is converted alone, on each engine, with the settings that its name tells, as `tests/simulation` does it.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.op_nets import ENGINES, KNOWN, quantized

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.simulation.by_kernel import ByKernel
from cptv_ao.simulation.twin import Twin

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"
EXACT, KERNEL, NOT, TORCH = "exact", "kernel", "**not**", "-"
HEAD = """# Ops that the float twin knows

Every function and module that torch's backend configs quantize, converted alone on each engine. *exact*: the twin
computes the kernel's codes itself, and their gradients. *kernel*: the kernel itself computes, and gradients are those
of a float form of the op, or straight through. *not*: neither. A dash: torch cannot convert or run it there. Recurrent,
embedding and dynamically quantized layers are computed by their kernels on every engine, and so is what nobody knows.

Written by `python tests/tools/op_table.py`; `tests/simulation/test_op_parity.py` compares the codes, and
`test_op_gains.py` has a bad scale found back around each. What torch itself gets wrong there (2.14): transposed
convolutions of other numbers of inputs than of outputs compute with scrambled weights on x86 and onednn, on fbgemm some
whose kernel is as large as their stride do (a note of `refine` names the layers), QNNPACK's of three dimensions give
other numbers each time, and a `PReLU` scales positive values too.

"""


def known(name: str, engine: str) -> str:
    """How the twin computes the network around an op."""
    try:
        model, images = quantized(*KNOWN[name], engine)
        model(images.clone())
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):
        return TORCH
    twin = Twin(Backend(model))
    try:
        twin(images)
    except Exception:  # not before it meets values
        try:
            twin.checked(Batch((images,), {}, len(images)))
        except UnsupportedModelError:
            return NOT
    return KERNEL if any(isinstance(part, ByKernel) for part in twin.module.modules()) else EXACT


def table() -> str:
    """The page."""
    found = {name: [known(name, engine) for engine in ENGINES] for name in KNOWN}
    lines = [HEAD + f"| | {' | '.join(ENGINES)} |", "|---|" + "---|" * len(ENGINES)]
    counts = [Counter(row[i] for row in found.values()) for i in range(len(ENGINES))]
    for kind, told in ((EXACT, "known exactly"), (KERNEL, "by kernel"), (NOT, "not known"), (TORCH, "torch cannot")):
        lines.append(f"| **{told}** | " + " | ".join(str(count[kind]) for count in counts) + " |")
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    text = table()
    PAGE.write_text(text)
    print("\n".join(text.splitlines()[9:16]))
