"""Models of other shapes than an image classifier, and the engines' own demands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import nets
from helpers.search import small_config
from torch import Tensor, nn
from torch.ao.quantization import float_qparams_weight_only_qconfig
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.search.scale_space import ScaleSpace


class Encoder(nn.Module):
    """A text transformer of two layers that returns sentence embeddings, in the manner of BERT."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Parameter(torch.randn(1, 12, width) / 4)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.words(ids) + self.places)
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask.unsqueeze(2).float()
        return {"tokens": x, "sentence": (x * weights).sum(1) / weights.sum(1)}


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None].bool())
        x = self.norm1(x + self.proj(attended))
        return self.norm2(x + self.fc2(functional.gelu(self.fc1(x))))


class Twice(nn.Module):
    """One linear and one convolution that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(functional.relu(self.conv(x)))
        x = functional.adaptive_avg_pool2d(x, 4).flatten(2)
        return self.head(self.fc(functional.relu(self.fc(x)))).mean(1)


class TwoImages(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.left(left), self.right(right)
        joined = functional.adaptive_avg_pool2d(functional.relu(a + b), 1).flatten(1)
        return self.head(joined), joined


def sentences(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        lengths = torch.randint(4, 13, (6, 1), generator=generator)
        mask = (torch.arange(12) < lengths).long()
        batches.append({"ids": torch.randint(0, 50, (6, 12), generator=generator) * mask, "mask": mask})
    return batches


def check(model: GraphModule, float_model: nn.Module, batches: list[Any], **changes: Any) -> cptv_ao.Report:
    """Refine improves, and every site of a weight may move."""
    config = small_config(evaluations=8, gradient_steps=10, population=("output_error",), **changes)
    cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    report = cptv_ao.report(model)
    assert report.after.search < report.before.search
    assert report.after.holdout is not None
    assert report.before.holdout is not None
    assert report.after.holdout <= report.before.holdout
    return report


@pytest.mark.parametrize("embedding", ["float", "quantized"])
def test_a_text_transformer(embedding: str) -> None:
    float_model = nets.seeded(Encoder)
    batches = sentences(5)
    mapping = nets.mapping(3)
    if embedding == "quantized":
        mapping.set_object_type(nn.Embedding, float_qparams_weight_only_qconfig)
    ready = cptv_ao.recipe(float_model, tuple(batches[0].values()), qconfig_mapping=mapping)
    told = (
        "given integers, masks or sizes, so not quantized: getitem, bool, scaled_dot_product_attention, unsqueeze, "
        "float"
    )
    assert ready.notes == (told,)
    inputs = [tuple(batch.values()) for batch in batches]
    _, model = nets.quantize(ready.model, inputs, mapping=ready.qconfig_mapping)
    sites = cptv_ao.find_sites(model)
    assert sites.unknown == ()
    assert sites.weight_only == (("words (Embedding)",) if embedding == "quantized" else ())
    assert sum(site.kind == "weight" for site in sites.values()) == 8
    report = check(model, float_model, batches, loss="cosine", output=lambda out: out["sentence"])
    assert {block.name for block in report.blocks} >= {"layers.0", "layers.1"}
    assert set(model(**batches[0])) == {"tokens", "sentence"}


def test_modules_that_are_called_twice() -> None:
    float_model = nets.seeded(Twice)
    batches = list(nets.images(20, 3, 8, 8).split(5))
    _, model = nets.quantize(float_model, batches, weight_bits=3)
    sites = cptv_ao.find_sites(model)
    assert [len(sites[f"{name}.weight"].nodes) for name in ("conv", "fc", "head")] == [2, 2, 1]
    with pytest.warns(cptv_ao.CptvWarning, match="float_model computes something else"):
        report = check(model, float_model, batches)  # torch has fused the ReLU between two calls into both of them
    assert {move.name for move in report.moves} >= {"conv.weight", "fc.weight"}


def test_several_inputs_and_outputs() -> None:
    float_model = nets.seeded(TwoImages)
    pairs = [tuple(nets.images(5, 3, 8, 8, seed=2 * i + j) for j in range(2)) for i in range(4)]
    _, model = nets.quantize(float_model, pairs, weight_bits=3)
    batches = [{"left": left, "right": right} for left, right in pairs]
    check(model, float_model, batches)
    assert [tuple(part.shape) for part in model(*pairs[0])] == [(5, 5), (5, 4)]


def test_weight_only_linear_layers_are_left_alone() -> None:
    from torch.ao.quantization import default_dynamic_qconfig

    float_model = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)))
    batches = list(nets.images(48, 6).split(6))
    mapping = nets.mapping(2).set_module_name("3", default_dynamic_qconfig)
    _, model = nets.quantize(float_model, batches, mapping=mapping)
    before = model.get_submodule("3").weight().int_repr()
    report = check(model, float_model, batches)
    assert cptv_ao.find_sites(model)["3.weight"].fixed
    assert "3.weight" not in {move.name for move in report.moves}
    assert torch.equal(model.get_submodule("3").weight().int_repr(), before)


def test_an_op_that_is_not_understood_is_warned_of_once() -> None:
    float_model = nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)))
    batches = list(nets.images(8, 3, 4, 4).split(2))
    _, model = nets.quantize(float_model, batches, weight_bits=3)
    first = next(node for node in model.graph.nodes if node.op == "call_module")
    with model.graph.inserting_after(first):
        celu = model.graph.call_function(torch.ops.quantized.celu, (first, 0.1, 60))
    first.replace_all_uses_with(celu, delete_user_cb=lambda user: user is not celu)
    model.recompile()
    with pytest.warns(cptv_ao.CptvWarning) as caught:
        cptv_ao.refine(model, batches, float_model=float_model, config=small_config(), progress=False)
    assert [str(w.message) for w in caught if w.category is cptv_ao.CptvWarning] == [
        "not understood, left alone: celu (quantized.celu)"
    ]
    assert caught[0].filename == __file__
    assert "not understood, left alone: celu (quantized.celu)" in cptv_ao.report(model).notes


def test_qnnpack_gets_no_scales_that_its_add_refuses() -> None:
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch was built without qnnpack")
    float_model = nets.seeded(nets.ConvNet)
    batches = list(nets.images(8, 3, 16, 16).split(4))
    _, model = nets.quantize(float_model, batches, engine="qnnpack")
    backend = Backend(model)
    outputs = {out for out, _ in backend.sums}
    assert len(backend.sums) == 4
    assert len(outputs) == 2
    for moved in (*outputs, *(given for _, given in backend.sums)):
        space = ScaleSpace(backend, {lead: g for lead, g in backend.movable().items() if lead == moved})
        for factor in (1e-9, 1e9):
            model_before = space.vector
            space._reach._start *= 1e12  # far beyond what a search may reach
            vector = space.vector
            group = space.layout.groups[0]
            vector[group.scales] *= factor
            space.write(space.repair(vector))
            assert bool(torch.isfinite(model(batches[0])).all()), "add of qnnpack raises on scales too far apart"
            space.write(model_before)
            space._reach._start /= 1e12
