"""Cached entries: any byte budget, any order of blocks and any write give what the whole model gives, bit for bit."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.blocks import find_blocks
from cptv_ao.core.loader import read_batches
from cptv_ao.core.losses import kl
from cptv_ao.core.qparams import QParams
from cptv_ao.evaluation.entry_cache import EntryCache
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.teacher import teacher_outputs
from cptv_ao.fx.segments import Segments


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.conv(x)) + x)


class _Net(nn.Module):
    """Residual blocks whose first node works in place on what crosses the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.acts = nn.ModuleList(nn.ReLU6(inplace=True) for _ in range(3))
        self.blocks = nn.ModuleList(_Block(4) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for act, block in zip(self.acts, self.blocks, strict=True):
            x = block(act(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def start() -> tuple[GraphModule, list[Batch], list[Tensor]]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = _Net().eval()
        images = [torch.randn(n, 1, 6, 6, generator=generator) for n in (8, 8, 5)]
        prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("x86"), (images[0],))
        with torch.no_grad():
            prepared(images[0])
        model = convert_fx(prepared)
    batches = read_batches(images)
    return model, batches, teacher_outputs(net, batches)


def _blocks(model: GraphModule) -> dict[str, tuple[str, ...]]:
    blocks = find_blocks(Backend(model).sites.values())
    return {b.name: tuple(node for site in b.sites for node in site.nodes) for b in blocks}


def _write(model: GraphModule, name: str, factor: float) -> None:
    backend = Backend(model)
    qparams = backend.read(name)
    backend.write(name, QParams((qparams.scale * factor).float().double(), qparams.zero_point))


def _activation(model: GraphModule, block: str) -> str:
    sites = next(b for b in find_blocks(Backend(model).sites.values()) if b.name == block).sites
    return next(s.name for s in sites if s.kind == "activation" and not s.fixed)


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("budget", [0, 600, 1 << 40])
def test_any_budget_and_order_gives_the_whole_model(start, budget: int, order: str) -> None:
    model, batches, teacher = copy.deepcopy(start[0]), start[1], start[2]
    cached = Evaluator(model, batches, teacher, kl, cache_bytes=budget)
    whole = Evaluator(model, batches, teacher, kl)
    blocks = _blocks(model)
    for number, name in enumerate(list(blocks) if order == "forward" else list(blocks)[::-1]):
        cached.enter(blocks[name])
        for factor in (1.0, 1.3 + number / 10):
            _write(model, _activation(model, name), factor)
            for _ in range(2):  # a tail that wrote into its entry would differ the second time
                assert _equal(cached.outputs(), whole.outputs())
            assert cached.score() == whole.score()
        cached.leave()


def test_the_small_budget_holds_some_batches_only(start) -> None:
    model, batches, _ = start
    held = []
    for budget in (0, 600, 1 << 40):
        pieces = Segments(model)
        entries = EntryCache(pieces, batches, budget, lambda _: True)
        sizes = {}
        for name, nodes in _blocks(model).items():
            entries.move(pieces.cut(nodes))
            sizes[name] = entries.bytes
        assert max(sizes.values()) <= budget
        held.append(sizes["blocks.1"])
        entries.clear()
        assert entries.bytes == 0
    assert 0 == held[0] < held[1] < held[2]


def test_entries_advance_instead_of_starting_again(start) -> None:
    model, batches, teacher = copy.deepcopy(start[0]), start[1], start[2]
    calls = [0]
    model.stem.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    evaluator = Evaluator(model, batches, teacher, kl)
    for nodes in list(_blocks(model).values())[1:]:
        evaluator.enter(nodes)
        evaluator.leave()
    assert calls[0] == len(batches)
    evaluator.invalidate()
    evaluator.enter(_blocks(model)["blocks.1"])
    assert calls[0] == 2 * len(batches)


@pytest.mark.parametrize("change", ["scale", "weight", "module"])
def test_a_write_before_the_cut_is_noticed(start, change: str) -> None:
    model, batches, teacher = copy.deepcopy(start[0]), start[1], start[2]
    evaluator, whole = Evaluator(model, batches, teacher, kl), Evaluator(model, batches, teacher, kl)
    blocks = _blocks(model)
    evaluator.enter(blocks["blocks.1"])
    evaluator.leave()
    before = whole.outputs()
    if change == "scale":
        _write(model, _activation(model, "stem"), 2.0)
    elif change == "weight":
        backend = Backend(model)
        site = next(s.name for s in backend.sites.values() if s.kind == "weight")
        backend.weights.set_float(site, backend.weight(site).dequantize() * 0.5)
        backend.write(site, backend.read(site))
    else:
        model.get_submodule("blocks.0.conv").scale *= 2
    assert not _equal(before, whole.outputs())
    evaluator.enter(blocks["blocks.2"])
    assert _equal(evaluator.outputs(), whole.outputs())


def test_values_written_in_place_are_handed_over_as_copies(start) -> None:
    model, batches, teacher = start
    evaluator = Evaluator(model, batches, teacher, kl)
    expected = evaluator.outputs()
    evaluator.enter(["acts_1"])  # ReLU6(inplace=True), on the very value that crosses the cut
    for _ in range(2):
        assert _equal(evaluator.outputs(), expected)
    pieces = Segments(model)
    assert pieces.copies(pieces.cut(["acts_1"])) == (True,)
    assert pieces.copies(pieces.cut(_blocks(model)["blocks.1"])) == (False,)


def test_early_rejection_changes_no_result(start) -> None:
    model, batches, teacher = start
    evaluator = Evaluator(model, batches, teacher, kl)
    loss = evaluator.score()
    assert evaluator.score(math.nextafter(loss, math.inf)) == loss
    assert evaluator.score(loss) == math.inf
    spent = evaluator.image_forwards
    assert evaluator.score(loss / 1e6) == math.inf
    assert evaluator.image_forwards == spent + batches[0].images


def test_a_raced_candidate_is_accepted_only_on_all_images(start) -> None:
    model, batches, teacher = copy.deepcopy(start[0]), start[1], start[2]
    evaluator = Evaluator(model, batches, teacher, kl)
    parent = evaluator.score()
    assert evaluator.score(parent * 2, race=True) == parent  # no parent kept: as without a race
    evaluator.keep()
    assert evaluator.score(math.inf, race=True) == parent  # nowhere behind itself
    _write(model, _activation(model, "blocks.0"), 64.0)
    spent = evaluator.image_forwards
    assert evaluator.score(parent, race=True) == math.inf
    assert evaluator.image_forwards - spent < evaluator.images


def test_the_model_is_left_as_it_was(start) -> None:
    model, batches, teacher = start
    names = set(dict(model.named_modules())), set(vars(model))
    code, inputs = model.code, [b.args[0].clone() for b in batches]
    evaluator = Evaluator(model, batches, teacher, kl)
    evaluator.enter(_blocks(model)["blocks.1"])
    evaluator.score()
    assert (set(dict(model.named_modules())), set(vars(model))) == names
    assert model.code == code
    assert all(torch.equal(a, b.args[0]) for a, b in zip(inputs, batches, strict=True))
