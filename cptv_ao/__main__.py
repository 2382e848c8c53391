"""The command line: `python -m cptv_ao inspect | diagnose | plan | refine`. Thin: the same functions underneath."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import combinations
from shutil import SpecialFileError
from typing import Any, NoReturn

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.atomic_file import at_once, is_own_output, is_special, same_file, straight, takes_text, target_of
from cptv_ao.core.blocks import find_blocks
from cptv_ao.core.formatting import table
from cptv_ao.verbs.named_objects import UserError, load_data, load_float_model, load_model

_ABOUT = """\
Better scales for a model that torch.ao or torchao has quantized, on unlabelled calibration images.

  inspect    lists every scale of the model, and the blocks that they are searched in
  diagnose   tells which blocks and scales cost how much accuracy, and what to do about it
  plan       tells which layers to leave in float, and what that buys
  refine     searches better scales and writes them into a file; in your program,
             cptv_ao.load_scales(model, file) puts them into the same model
"""

_EXAMPLE = """\
MODEL and DATA name things in your own code, as package.module:name or path/to/file.py:name: an object, or a function
without arguments that returns it. MODEL is the converted model, or a pair (converted model, float model); DATA gives
batches of images. An example; paste all of it:

cat > tiny.py <<'EOF'
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
import cptv_ao

data = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).split(50)

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    prepared = prepare_fx(net, cptv_ao.qconfig_mapping(weight_bits=3), (data[0],))
    for images in data:
        prepared(images)
    return convert_fx(prepared), net
EOF
python -W ignore -m cptv_ao diagnose tiny.py:model --data tiny.py:data
python -W ignore -m cptv_ao refine tiny.py:model --data tiny.py:data --seconds 10 --out scales.safetensors

(-W ignore hides the warnings of torch.ao.)
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 where the user can put something right."""
    options = _parser().parse_args(arguments)
    try:
        _expect_apart(options)
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except (UserError, cptv_ao.CptvError) as error:
        print(_told(str(error)), file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, _told(f"{message} ({self.prog} --help tells more)") + "\n")


def _told(message: str) -> str:
    return f"cptv_ao: error: {' '.join(message.split())}"


def _parser() -> argparse.ArgumentParser:
    shape: Any = argparse.RawDescriptionHelpFormatter
    parser = _Parser("python -m cptv_ao", description=_ABOUT, epilog=_EXAMPLE, formatter_class=shape)
    commands = parser.add_subparsers(title="commands", metavar="{inspect,diagnose,plan,refine}", required=True)
    inspect = _command(commands, "inspect", "list the scales and blocks of a model", _inspect)
    diagnose = _command(commands, "diagnose", "which blocks and scales cost how much, and what to do", _diagnose)
    plan = _command(commands, "plan", "which layers to leave in float, and what that buys", _plan)
    refine = _command(commands, "refine", "search better scales and write them into a file", _refine)
    for command in (inspect, diagnose, plan, refine):
        command.add_argument("model", metavar="MODEL", help="the converted model, or a pair (converted, float model)")
    for command in (diagnose, plan, refine):
        command.add_argument("--data", required=True, metavar="DATA", help="iterable of batches; labels are not read")
        command.add_argument("--float", metavar="MODEL", help="the float model, where MODEL is not a pair")
        command.add_argument("--json", type=_text_file, metavar="FILE", help="write all of the result as JSON, too")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    plan.add_argument(
        "--budget", type=_share, default=0.1, metavar="X", help="share of the int8 operations (default 0.1)"
    )
    refine.add_argument("--out", required=True, type=_file, metavar="FILE", help="the scales, a .safetensors file")
    refine.add_argument("--seconds", type=_positive, metavar="S", help="end the search after S seconds")
    refine.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the search (default 0)")
    refine.add_argument(
        "--paper", type=int, choices=range(2, 9), metavar="BITS", help="the published search, for weights of BITS bits"
    )
    refine.add_argument(
        "--checkpoint",
        type=_file,
        metavar="FILE",
        help="save the state of the search there, and go on from it if it is",
    )
    return parser


def _command(commands: Any, name: str, does: str, run: Callable[[argparse.Namespace], None]) -> Any:
    command = commands.add_parser(
        name, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog="python -m cptv_ao --help has an example."
    )
    command.set_defaults(run=run)
    return command


def _inspect(options: argparse.Namespace) -> None:
    model, _ = load_model(options.model)
    sites = cptv_ao.find_sites(model)
    print(sites)
    rows = [("block", "sites", "weights", "scales")]
    for block in find_blocks(sites.values()):
        weights = sum(site.kind == "weight" for site in block.sites)
        scales = sum(site.numel for site in block.sites)
        rows.append((block.name, str(len(block.sites)), str(weights), str(scales)))
    print("", *table(rows), sep="\n")


def _diagnose(options: argparse.Namespace) -> None:
    model, float_model = _models(options)
    found = cptv_ao.diagnose(model, load_data(options.data), float_model=float_model, progress=not options.quiet)
    print(found)
    _write_json(options.json, found.to_dict())


def _plan(options: argparse.Namespace) -> None:
    model, float_model = _models(options)
    given = {"float_model": float_model, "budget": options.budget, "progress": not options.quiet}
    found = cptv_ao.plan(model, load_data(options.data), **given)
    print(found)
    _write_json(options.json, found.to_dict())


def _refine(options: argparse.Namespace) -> None:
    model, float_model = _models(options)
    sites = Backend(model).sites  # a reference model can be refined, but its scales have no file: say so at once
    settings = {"seed": options.seed, "max_seconds": options.seconds}
    paper = options.paper
    config = cptv_ao.RefineConfig(**settings) if paper is None else cptv_ao.RefineConfig.paper(paper, **settings)
    if not any(fnmatchcase(name, pattern) for name in sites for pattern in config.include):
        raise UserError(f"--paper searches attention layers ({', '.join(config.include)}), and this model has none")
    refined = cptv_ao.refine(
        model,
        load_data(options.data),
        float_model=float_model,
        config=config,
        progress=not options.quiet,
        checkpoint=options.checkpoint,
    )
    cptv_ao.save_scales(refined, options.out)
    report = cptv_ao.report(refined)
    print(report)
    _write_json(options.json, report.to_dict())


def _models(options: argparse.Namespace) -> tuple[Any, Any]:
    model, float_model = load_model(options.model)
    return model, float_model if options.float is None else load_float_model(options.float)


def _write_json(path: str | None, data: dict[str, Any]) -> None:
    if path is None:
        return
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    if (stream := straight(path)) is not None:
        with stream:
            stream.write(text)
        return
    with at_once(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _expect_apart(options: argparse.Namespace) -> None:
    """Refuse files that would overwrite one another, or the code that is run: before the search, not after it."""
    given = vars(options)
    named = [(f"--{name}", given[name]) for name in ("out", "checkpoint", "json") if given.get(name)]
    named = [(option, path) for option, path in named if not is_special(path)]
    for (one, path), (other, second) in combinations(named, 2):
        if same_file(path, second):
            raise UserError(f"{one} and {other} are the same file, {path}; give each a file of its own")
    for spec in (given.get(name) for name in ("model", "data", "float")):
        source = spec.rpartition(":")[0] if spec else ""
        code = source if source.endswith(".py") else source.replace(".", os.sep) + ".py"
        for option, path in named:
            if same_file(path, code):
                raise UserError(f"{option} would overwrite {code}, which {spec} is in; give another file")


def _file(text: str) -> str:
    """A file that can be written: it is known before the search, not after it."""
    try:
        if is_own_output(text):
            raise SpecialFileError(f"{text} is where this program prints; give another path")
        folder = target_of(text).parent
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot be written")
    return text


def _text_file(text: str) -> str:
    """The same, or a terminal, a FIFO or the like, which text is written straight into."""
    return text if is_own_output(text) or takes_text(text) else _file(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 < value < math.inf:
        return value
    raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text}")


def _share(text: str) -> float:
    value = _positive(text)
    if value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"expected a share, above 0 and up to 1, got {text}")


def _seed(text: str) -> int:
    if text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text}")


if __name__ == "__main__":
    sys.exit(main())
