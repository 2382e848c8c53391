"""The recipe: what stock prepare_fx cannot take is rewritten into what it can, and computes the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.quick import each_value, some
from helpers.search import small_config
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend


class Window(nn.Module):
    """Pads to whole windows: control flow on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        height, width = x.shape[2:]
        if height % 4 or width % 4:
            x = functional.pad(x, (0, -width % 4, 0, -height % 4))
        for _ in range(len(x.shape) - 3):
            x = self.conv(x)
        if scale is not None:
            x = x * scale
        return x[:, :, :height, :width]


class Biased(nn.Module):
    """A linear called by keywords, with a bias that is put together in forward, like BEiT's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 6, bias=False)
        self.q_bias = nn.Parameter(torch.randn(4))
        self.register_buffer("k_bias", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(input=x, weight=self.qkv.weight, bias=torch.cat((self.q_bias, self.k_bias)))


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weight in forward, like NFNet's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).std(1).reshape(-1, 1, 1, 1)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


Standardized.__module__ = "timm_like"  # modules of torch.nn are leaves of the tracer, this one is not


class DeviceOfWeight(nn.Module):
    """Reads a parameter of a module that convert_fx replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.ones(6, device=self.fc.weight.device)


class Buffered(nn.Module):
    """A method of a buffer with a size as its argument, behind control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("table", torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 6:
            raise ValueError("6 features")
        return self.fc(x) + self.table.expand(x.shape[0], -1)


class Sized(nn.Module):
    """Makes a tensor of as many rows as it is given, number by number, which torch takes no proxies for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        return self.fc(x) + torch.ones(rows, columns, dtype=x.dtype)


class BatchDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if len(x) % 2 else self.fc(x)


class Assigning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.shape[1] > 2:
            y[:, :2] = 0
        return y


class Caching(nn.Module):
    """Keeps what it computes for the next call, like LeViT's attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bias = nn.Linear(6, 6), nn.Parameter(torch.randn(9))
        self.register_buffer("index", torch.tensor([1, 3, 5, 7, 0, 2]))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[self.index]
        return self.fc(x) + self.cache["bias"]


class Masked(nn.Module):
    """FX takes the branch of a mask that is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask.view(-1, 1)
        return self.fc(x)


class Resized(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv, self.mode = nn.Conv2d(3, 4, 3), mode

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(self.conv(x), size=(8, 8), mode=self.mode).mean((2, 3))


def around(module: nn.Module, image: bool) -> nn.Module:
    """A small network with a module in its middle."""
    if image:
        return nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.Flatten(2), nn.AdaptiveAvgPool1d(2), nn.Flatten())
    return nn.Sequential(nn.Linear(6, 6), module, nn.Linear(6, 4))


def converted(ready: cptv_ao.Recipe, batch: Tensor) -> GraphModule:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        custom = ready.prepare_custom_config
        prepared = prepare_fx(ready.model, ready.qconfig_mapping, (batch,), prepare_custom_config=custom)
        prepared(batch)
        return convert_fx(prepared)


def float_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d, nn.BatchNorm2d)]


IMAGES, ROWS = nets.images(4, 3, 12, 12), nets.images(4, 6)
REWRITTEN: dict[str, tuple[Any, Tensor, str]] = {
    "control flow": (lambda: around(Window(), True), IMAGES, "Window"),
    "computed bias": (lambda: around(Biased(), False), ROWS, "Biased"),
    "computed weight": (lambda: around(Standardized(4, 4, 3), True), IMAGES, "Standardized"),
    "device of a weight": (lambda: around(DeviceOfWeight(), False), ROWS, "DeviceOfWeight"),
    "method of a buffer": (lambda: around(Buffered(), False), ROWS, "Buffered"),
    "mask": (Masked, ROWS, "the whole model"),
    "made for a batch": (lambda: around(Sized(), False), ROWS, "Sized"),
}


@pytest.mark.parametrize("name", some(*[*REWRITTEN][::2], others=REWRITTEN))
def test_what_stands_in_the_way_is_rewritten_and_quantized(name: str) -> None:
    make, batch, told = REWRITTEN[name]
    model = nets.seeded(make)
    ready = cptv_ao.recipe(model, (batch,))
    assert [told in note and "rewritten" in note for note in ready.notes] == [True]
    for inputs in (batch, batch[:1]):
        torch.testing.assert_close(ready.model(inputs), model(inputs))
    quantized = converted(ready, batch)
    assert float_layers(quantized) == []
    assert not any(node.target in (functional.linear, functional.conv2d) for node in quantized.graph.nodes)
    error = (quantized(batch[:3]) - model(batch[:3])).norm() / model(batch[:3]).norm()
    assert error < 0.1
    refined = cptv_ao.refine(
        quantized, [batch, batch.flip(0)], float_model=ready.model, config=small_config(evaluations=5), progress=False
    )
    report = cptv_ao.report(refined)
    assert report.after.search <= report.before.search
    kinds = {site.kind for site in cptv_ao.find_sites(quantized).values()}
    assert kinds == {"weight", "activation"}
    assert any(move.kind == "weight" for move in report.moves) or not report.moves


@pytest.mark.parametrize("make", some(Assigning, others=[BatchDependent]))
def test_what_cannot_be_rewritten_stays_float(make: Any) -> None:
    model = nets.seeded(lambda: around(make(), False))
    ready = cptv_ao.recipe(model, (ROWS,))
    assert len(ready.notes) == 1
    assert ready.notes[0].startswith(f"{make.__name__} (1 module) stays float: ")
    assert ready.prepare_custom_config.non_traceable_module_classes == [make]
    for inputs in (ROWS, ROWS[:1]):
        torch.testing.assert_close(ready.model(inputs), model(inputs))
    assert float_layers(converted(ready, ROWS)) == ["1.fc"]


@pytest.mark.parametrize("make", [BatchDependent, Assigning])
def test_a_model_that_cannot_be_traced_at_its_top_is_refused(make: Any) -> None:
    with pytest.raises(cptv_ao.UnsupportedModelError, match=f"top level of {make.__name__}.* a module of its own"):
        cptv_ao.recipe(nets.seeded(make), (ROWS,))


def test_batch_norms_with_an_activation_fuse() -> None:
    layers = pytest.importorskip("timm.layers")
    ConvNormAct = layers.ConvNormAct
    model = nets.seeded(lambda: nn.Sequential(ConvNormAct(3, 8, 3), ConvNormAct(8, 8, 3, groups=8), nn.Flatten()))
    assert isinstance(model[0].bn, layers.BatchNormAct2d)
    stock = cptv_ao.Recipe(copy.deepcopy(model), cptv_ao.qconfig_mapping(), PrepareCustomConfig(), ())
    ready = cptv_ao.recipe(model, (IMAGES,))
    assert ready.notes == ("2 batch norms with an activation taken apart, so that FX fuses them",)
    torch.testing.assert_close(ready.model(IMAGES), model(IMAGES))
    errors = []
    for recipe in (ready, stock):
        quantized = converted(recipe, IMAGES)
        errors.append(float((quantized(IMAGES) - model(IMAGES)).norm() / model(IMAGES).norm()))
        if recipe is ready:
            assert cptv_ao.find_sites(quantized).counts()["ConvReLU2d weight"] == 2
    assert errors[0] < errors[1]


@pytest.mark.parametrize("behind", some(Buffered, others=[nn.Identity]))
def test_what_a_model_caches_while_it_is_traced_is_not_in_the_recipe(behind: Any) -> None:
    model = nets.seeded(lambda: nn.Sequential(Caching(), behind(), nn.Linear(6, 3)))
    ready = cptv_ao.recipe(model, (ROWS,))
    assert ready.model[0].cache == model[0].cache == {}
    quantized = converted(ready, ROWS)
    torch.testing.assert_close(quantized(ROWS), model(ROWS), rtol=0.1, atol=0.1)


def test_an_identity_does_not_keep_a_relu_from_its_batch_norm() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True), nn.Identity(), nn.Flatten()]
    model = nets.seeded(lambda: nn.Sequential(*layers))
    ready = cptv_ao.recipe(model, (IMAGES,))
    assert [type(module).__name__ for module in ready.model] == [
        "Conv2d", "BatchNorm2d", "Through", "ReLU", "Identity", "Flatten",
    ]  # fmt: skip
    assert cptv_ao.find_sites(converted(ready, IMAGES)).counts()["ConvReLU2d weight"] == 1


@pytest.mark.slow
def test_padding_by_name_is_given_in_numbers() -> None:
    same = [nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding="valid"), nn.Conv2d(4, 4, 2, padding="same")]
    model = nets.seeded(lambda: nn.Sequential(*same, nn.Flatten()))
    ready = cptv_ao.recipe(model, (IMAGES,))
    assert ready.notes == (
        "2 stays float: its padding is not the same on both sides",
        "2 convolutions with padding by name got it in numbers",
    )
    torch.testing.assert_close(ready.model(IMAGES), model(IMAGES))
    assert float_layers(converted(ready, IMAGES)) == ["2"]


@pytest.mark.parametrize(("mode", "stays"), [("bicubic", True), ("bilinear", False), ("nearest", False)])
def test_interpolation_without_a_kernel_stays_float(mode: str, stays: bool) -> None:
    model = nets.seeded(lambda: Resized(mode))
    ready = cptv_ao.recipe(model, (IMAGES,))
    assert ["interpolate in a mode" in note for note in ready.notes] == [True] * stays
    torch.testing.assert_close(ready.model(IMAGES), model(IMAGES))
    assert bool(torch.isfinite(converted(ready, IMAGES)(IMAGES)).all())


def test_a_model_that_needs_nothing_is_left_as_it_is() -> None:
    model = nets.seeded(nets.ConvNet).train()
    batch = nets.images(4, 3, 16, 16)
    ready = cptv_ao.recipe(model, (batch,))
    assert model.training
    assert not ready.model.training
    model.eval()
    assert str(ready) == "nothing to change: stock prepare_fx takes this model as it is"
    assert ready.model is not model
    before = model.state_dict()
    assert torch.equal(converted(ready, batch)(batch), nets.quantize(model, [batch], mapping=_mapping())[1](batch))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(hasattr(module, "qconfig") for module in model.modules()), "prepare_fx marks the copy only"


def _mapping() -> QConfigMapping:
    return cptv_ao.qconfig_mapping()


def test_the_mapping_that_was_given_is_kept_and_not_changed() -> None:
    mapping = cptv_ao.qconfig_mapping(3)
    model = nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.Conv2d(4, 4, 3), nn.Flatten()))
    ready = cptv_ao.recipe(model, (IMAGES,), qconfig_mapping=mapping)
    assert ready.qconfig_mapping.module_name_qconfigs == {"0": None}
    assert mapping.module_name_qconfigs == {}
    weight = cptv_ao.find_sites(converted(ready, IMAGES))["1.weight"]
    assert (weight.qmin, weight.qmax) == (-4, 3), "inferred from the codes"


def test_example_inputs_are_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"example_inputs: expected a tuple .*, got Tensor"):
        cptv_ao.recipe(nets.seeded(nets.ConvNet), IMAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "engine"), each_value(range(2, 9), ["x86", "fbgemm", "onednn", "qnnpack"]))
def test_weight_codes_stay_in_their_range(bits: int, engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch was built without {engine}")
    model = nets.seeded(nets.ConvNet)
    _, quantized = nets.quantize(
        model, [nets.images(4, 3, 16, 16)], engine=engine, mapping=cptv_ao.qconfig_mapping(bits, engine)
    )
    half = 2 ** (bits - 1)
    backend = Backend(quantized)
    weights = [backend.weight(site.name) for site in backend.sites.values() if site.kind == "weight"]
    assert len(weights) == 7
    codes = torch.cat([w.int_repr().flatten() for w in weights]).int()
    assert -half <= int(codes.min())
    assert int(codes.max()) == half - 1
    assert all(w.qscheme() == torch.per_channel_affine for w in weights)


@pytest.mark.parametrize(
    ("bits", "engine", "told"),
    [
        (1, None, "weight_bits: expected 2 to 8, got 1"),
        (9, None, "got 9"),
        (8, "cuda", "engine: expected one of .*x86"),
    ],
)
def test_mappings_that_do_not_exist(bits: int, engine: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cptv_ao.qconfig_mapping(bits, engine)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the float network's output is the same for all")  # of a tiny_vit that is untrained
@pytest.mark.parametrize("name", ["mobilevit_xxs", "tiny_vit_5m_224", "efficientvit_b0", "vit_tiny_r_s16_p8_224"])
def test_families_that_stock_calls_cannot_trace(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = 224 if name.startswith("vit") else 64
    model = nets.seeded(lambda: timm.create_model(name, num_classes=10))
    batches = [nets.images(2, 3, size, size, seed=seed) for seed in range(2)]
    with pytest.raises(torch.fx.proxy.TraceError):
        prepare_fx(copy.deepcopy(model), cptv_ao.qconfig_mapping(), (batches[0],))
    ready = cptv_ao.recipe(model, (batches[0],))
    assert ready.prepare_custom_config.non_traceable_module_classes == []
    quantized = converted(ready, batches[0])
    assert float_layers(quantized) == []
    sites = cptv_ao.find_sites(quantized)
    assert sites.unknown == ()
    config = small_config(evaluations=1, max_evaluations=3)
    refined = cptv_ao.refine(quantized, batches, float_model=ready.model, config=config, progress=False)
    report = cptv_ao.report(refined)
    assert report.after.search <= report.before.search
    assert refined(batches[1][:1]).shape == (1, 10)
