"""Only the tail of the graph runs per candidate, and nobody can tell from the result."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from helpers.state import same_bits
from torch import Tensor, nn

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core import losses
from cptv_ao.core.batches import Batch
from cptv_ao.core.blocks import Block, find_blocks
from cptv_ao.core.qparams import QParams
from cptv_ao.evaluation.evaluator import Evaluator


class Reference:
    """The same model run in full, by its own forward."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.backend = Backend(case.converted)
        attach_float_weights(self.backend, case.float_model)
        with torch.no_grad():
            self.teacher = [case.float_model(batch) for batch in case.batches]

    def evaluator(self) -> Evaluator:
        batches = [Batch((batch.clone(),), {}, len(batch)) for batch in self.case.batches]
        return Evaluator(self.case.converted, batches, self.teacher, losses.kl)

    def outputs(self) -> list[Tensor]:
        with torch.inference_mode():
            return [copy.deepcopy(self.case.converted)(batch.clone()).flatten(1) for batch in self.case.batches]

    def loss(self) -> float:
        pairs = zip(self.outputs(), self.teacher, strict=True)
        total = sum(float(losses.kl(o, t.flatten(1))) * len(o) for o, t in pairs)
        return total / sum(len(batch) for batch in self.case.batches)

    def move(self, block: Block, factor: float) -> None:
        for site in block.sites:
            now = self.backend.read(site.name)
            step = (now.zero_point + 3).clamp(site.qmin, site.qmax) if site.affine else now.zero_point
            if not site.fixed:
                self.backend.write(site.name, QParams(now.scale * factor, step))


def nodes(block: Block) -> list[str]:
    return [node for site in block.sites for node in site.nodes]


def check_every_block(case: Case, blocks: tuple[Block, ...]) -> None:
    reference, evaluator = Reference(case), None
    evaluator = reference.evaluator()
    for block in blocks:
        evaluator.enter(nodes(block))
        before = reference.outputs()
        assert all(same_bits(a, b) for a, b in zip(evaluator.outputs(), before, strict=True)), block.name
        changed = False
        for factor in (1.2, 0.3, 5.0):
            reference.move(block, factor)
            wanted = reference.outputs()
            for _ in range(2):  # what ran on the cached entries must not have changed them
                got = evaluator.outputs()
                assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True)), (block.name, factor)
            changed |= not all(same_bits(a, b) for a, b in zip(wanted, before, strict=True))
            assert evaluator.score() == reference.loss()
        assert changed, f"writing {block.name} does nothing"
        evaluator.leave()
        assert all(same_bits(a, b) for a, b in zip(evaluator.outputs(), wanted, strict=True)), block.name


def blocks_of(case: Case, one_per_site: bool) -> tuple[Block, ...]:
    sites = cptv_ao.find_sites(case.converted).values()
    return find_blocks(sites, (lambda found: {s.name: s.name for s in found}) if one_per_site else None)


def test_the_tail_equals_the_full_forward_for_every_block(case: Case) -> None:
    check_every_block(case, blocks_of(case, one_per_site=False))


@pytest.mark.slow
def test_the_tail_equals_the_full_forward_backwards(vit_w3: Case) -> None:
    check_every_block(vit_w3, blocks_of(vit_w3, one_per_site=False)[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("backwards", [False, True])
def test_the_tail_equals_the_full_forward_for_every_single_site(conv: Case, functional: Case, backwards: bool) -> None:
    """Cuts everywhere, also right before and right behind the in-place ReLU."""
    for each in (conv, functional):
        blocks = blocks_of(each, one_per_site=True)
        check_every_block(each, blocks[::-1] if backwards else blocks)


@pytest.mark.slow
def test_the_tail_equals_the_full_forward_of_deit() -> None:
    """timm's functional norm1 belongs to its block although no module of the graph says so."""
    timm = pytest.importorskip("timm")

    float_model = nets.seeded(lambda: timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3))
    batches = list(nets.images(4, 3, 64, 64).split(2))
    prepared, converted = nets.quantize(float_model, batches)
    case = Case(float_model, prepared, converted, batches)
    blocks = blocks_of(case, one_per_site=False)
    assert [block.sites[0].name for block in blocks[1:4]] == [f"blocks.{i}.norm1.scale_0" for i in range(3)]
    check_every_block(case, blocks)


def test_batches_of_different_size(conv: Case) -> None:
    conv.batches = [conv.batches[0], conv.batches[1][:1], conv.batches[2][:3]]
    check_every_block(conv, blocks_of(conv, one_per_site=False))


class InPlace(nn.Module):
    """Reads a value, then works on it in place: a second run on the same cached value would read another one."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act = nn.functional.relu_ if functional else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.a(x), 2)
        y = self.b(x)
        return self.c(y + self.act(x)).flatten(1)


@pytest.mark.parametrize("functional", [False, True])
def test_a_cached_value_that_the_tail_works_on_in_place(functional: bool) -> None:
    float_model = nets.seeded(lambda: InPlace(functional))
    batches = list(nets.images(8, 3, 8, 8).split(4))
    prepared, converted = nets.quantize(float_model, batches)
    case = Case(float_model, prepared, converted, batches)
    check_every_block(case, blocks_of(case, one_per_site=True))


def test_a_partial_loss_above_the_threshold_is_inf(vit_w3: Case) -> None:
    reference = Reference(vit_w3)
    evaluator = reference.evaluator()
    loss = evaluator.score()
    assert evaluator.score(threshold=loss * 1.001) == loss
    assert evaluator.score(threshold=loss) == math.inf
    before = evaluator.image_forwards
    assert evaluator.score(threshold=loss / 100) == math.inf
    assert evaluator.image_forwards - before < evaluator.images


def test_the_loss_weighs_batches_by_their_images(conv: Case) -> None:
    conv.batches = [conv.batches[0], conv.batches[1][:1]]
    reference = Reference(conv)
    whole = copy.copy(reference)
    whole.case = Case(conv.float_model, conv.prepared, conv.converted, [torch.cat(conv.batches)])
    whole.teacher = [torch.cat(reference.teacher)]
    assert reference.evaluator().score() == pytest.approx(whole.evaluator().score(), rel=1e-5)
