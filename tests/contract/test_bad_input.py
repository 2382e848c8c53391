"""Bad input gets an error that says what was expected, what came and what to do; the model is untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from helpers.search import small_config
from helpers.state import everything
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.packed_params import ModuleParams
from cptv_ao.backends.packed_slots import PackedWeightSlot
from cptv_ao.diagnosis.code_counts import count_codes


class Endless:
    """A loader that gives one batch for ever, and counts how often it did."""

    def __init__(self, batch: Tensor) -> None:
        self.batch, self.read = batch, 0

    def __iter__(self) -> Any:
        while True:
            self.read += 1
            yield self.batch


class EndlessWithLength(Endless):
    """One that says that there are two."""

    def __len__(self) -> int:
        return 2


def check(error: type[Exception], match: str, model: Any, loader: Any, **arguments: Any) -> Any:
    """`refine` raises; the model and the float model are as they were."""
    settings: dict[str, Any] = {"config": small_config(), "progress": False} | arguments
    watched = [m for m in (model, settings.get("float_model")) if isinstance(m, nn.Module)]
    given = [everything(m) for m in watched]
    with pytest.raises(error, match=match) as caught:
        cptv_ao.refine(model, loader, **settings)
    assert [everything(m) for m in watched] == given
    return caught.value


# The model


def test_a_float_model(conv: Case) -> None:
    match = "expected the GraphModule that convert_fx returns, got ConvNet; run prepare_fx, calibrate, convert_fx first"
    check(cptv_ao.UnsupportedModelError, match, conv.float_model, conv.batches)


def test_something_that_is_no_model(conv: Case) -> None:
    check(cptv_ao.UnsupportedModelError, "expected the GraphModule .* got dict", {}, conv.batches)


def test_an_only_prepared_model(conv: Case) -> None:
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = QConfigMapping().set_global(nets.qconfig())
    prepared = prepare_fx(copy.deepcopy(conv.float_model), mapping, (conv.batches[0],))
    match = r"only prepared \(it holds observers\); call convert_fx and pass what it returns"
    check(cptv_ao.UnsupportedModelError, match, prepared, conv.batches)


def test_the_prepared_model_after_convert_fx(conv: Case) -> None:
    """Easily mixed up with the converted one: convert_fx rewrites its graph."""
    check(cptv_ao.UnsupportedModelError, "it holds observers", conv.prepared, conv.batches)


def test_a_reference_model_is_no_lowered_one(conv: Case) -> None:
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

    mapping = QConfigMapping().set_global(nets.qconfig())
    prepared = prepare_fx(copy.deepcopy(conv.float_model), mapping, (conv.batches[0],))
    prepared(conv.batches[0])
    with pytest.raises(cptv_ao.UnsupportedModelError, match="got a reference model"):
        Backend(convert_to_reference_fx(prepared))


def test_a_model_without_quantized_ops(conv: Case) -> None:
    _, model = nets.quantize(conv.float_model, conv.batches, mapping=QConfigMapping())
    match = "found no quantized op in the graph; was the qconfig_mapping empty"
    check(cptv_ao.UnsupportedModelError, match, model, conv.batches)


def test_a_traced_float_model(conv: Case) -> None:
    model = torch.fx.symbolic_trace(conv.float_model)
    check(cptv_ao.UnsupportedModelError, "found no quantized op", model, conv.batches)


def test_a_model_with_an_integer_output(conv: Case) -> None:
    graph = conv.converted.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_method("argmax", (output.args[0],)),)
    conv.converted.recompile()
    match = r"expected an output that holds a floating tensor, got Tensor.*RefineConfig\(output=\.\.\.\)"
    check(cptv_ao.UnsupportedModelError, match, conv.converted, conv.batches, float_model=conv.float_model)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("site", ["conv1.output", "bn2.output", "scale_4", "conv1.weight"])
def test_scales_that_are_zero_or_not_finite_already(conv: Case, site: str, value: float) -> None:
    model = conv.converted
    if site == "scale_4":
        model._scale_4.fill_(value)
    elif site == "bn2.output":
        model.bn2.scale.fill_(value)
    elif site == "conv1.output":
        model.conv1.scale = value
    else:
        weight, bias = model.conv1._weight_bias()
        scales = weight.q_per_channel_scales().clone()
        scales[5] = value
        zeros, axis = weight.q_per_channel_zero_points(), weight.q_per_channel_axis()
        broken = torch._make_per_channel_quantized_tensor(weight.int_repr(), scales, zeros, axis)
        model.conv1.set_weight_bias(broken, bias)
        assert not torch.isfinite(PackedWeightSlot(ModuleParams(model.conv1)).read().scale[5]) or value == 0
    where = " in channel 5" if site == "conv1.weight" else ""
    match = rf"{site}: expected a finite scale > 0 in the model that was given, got {value:.4g}{where}; calibrate again"
    check(cptv_ao.NonFiniteError, match, model, conv.batches, float_model=conv.float_model)
    check(cptv_ao.NonFiniteError, match, model, conv.batches, float_model=conv.float_model, inplace=False)


def test_outputs_that_are_not_finite() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.fc(x) - 100)

    float_model = nets.seeded(Log)
    batches = list(nets.images(8, 6).split(2))
    _, model = nets.quantize(float_model, batches)
    match = "the teacher's output on calibration batch 0 holds NaN or inf"
    check(cptv_ao.NonFiniteError, match, model, batches, float_model=float_model)


def test_only_the_quantized_outputs_are_not_finite(conv: Case) -> None:
    graph = conv.converted.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.log, (output.args[0],)),)
    conv.converted.recompile()
    match = "the quantized model's output on calibration batch 0 holds NaN or inf"
    check(cptv_ao.NonFiniteError, match, conv.converted, conv.batches, float_model=conv.float_model)


def test_a_loss_that_is_not_finite_at_the_start(conv: Case) -> None:
    config = small_config(loss=lambda candidate, teacher: candidate.sum() * float("nan"))
    match = "the loss of the model that was given is NaN or inf"
    check(cptv_ao.NonFiniteError, match, conv.converted, conv.batches, float_model=conv.float_model, config=config)


# The loader


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        ([], "calib_loader: expected at least one batch, got an empty iterable"),
        (iter(()), "calib_loader: expected at least one batch, got an empty iterable"),
        (None, "calib_loader: expected an iterable of batches, got NoneType"),
        (torch.ones(4, 3, 16, 16), r"got Tensor; wrap it in a list: \[images\]"),
        ({"x": torch.ones(4, 3, 16, 16)}, "calib_loader: expected an iterable of batches, got dict"),
        ("images", "calib_loader: expected an iterable of batches, got str"),
        ([None], "calib_loader, batch 0: expected a tensor, a tuple whose first item is the input tensor, .* NoneType"),
        ([()], "calib_loader, batch 0: expected a tensor, .* got tuple"),
        ([("image.png", 3)], "calib_loader, batch 0: expected a tensor, .* got tuple"),
        ([torch.ones(4, 3, 16, 16), {"y": 3}], "calib_loader, batch 1: expected a dict of the model's inputs"),
        ([torch.tensor(1.0)], r"calib_loader, batch 0: expected a batch dimension .* got a tensor of shape \(\)"),
        ([torch.ones(0, 3, 16, 16)], r"calib_loader, batch 0: .* at least one image, .* shape \(0, 3, 16, 16\)"),
        ([torch.full((4, 3, 16, 16), float("nan"))], "calib_loader, batch 0: the input holds NaN or inf"),
        (
            [torch.ones(4, 3, 16, 16), torch.full((4, 3, 16, 16), float("inf"))],
            "calib_loader, batch 1: the input holds NaN or inf",
        ),
        (
            [torch.ones(4, 3, 16, 16), torch.ones(4, 3, 8, 8)],
            r"calib_loader, batch 1: expected images of shape \(3, 16, 16\) .* as in batch 0, got \(3, 8, 8\)",
        ),
        (
            [torch.ones(4, 3, 16, 16), torch.ones(4, 3, 16, 16).double()],
            "batch 1: expected images .* torch.float32 as in batch 0, got .* torch.float64",
        ),
        (
            [torch.ones(4, 3, 16, 16), {"x": torch.ones(4, 3, 16, 16)}],
            "calib_loader, batch 1: its inputs differ from those of batch 0",
        ),
        ([torch.ones(4, 3, 8, 8)] * 2, r"batch 0: the model failed on inputs of shape \[\(4, 3, 8, 8\)\]"),
        ([{"images": torch.ones(4, 3, 16, 16)}] * 2, r"batch 0: .* got none of them among \['images'\]"),
        ([torch.ones(1, 3, 16, 16)], "calib_loader: expected at least 2 images, got 1; one part is held out"),
        ([torch.ones(4, 3, 16, 16).numpy()], r"batch 0: expected a tensor, got a numpy array; give torch.from_numpy"),
        ([[1.0, 2.0]], "calib_loader, batch 0: expected a tensor, .* got list"),
        ([{"x": torch.ones(4, 3, 16, 16).numpy()}], "batch 0, input 'x': expected a tensor, got a numpy array"),
        ([{"x": 3}], "calib_loader, batch 0: expected a tensor, .* got dict"),
        ([{"x": torch.tensor(3.0)}], r"batch 0: expected a batch dimension .* shape \(\)"),
        ([{3: torch.ones(4, 3, 16, 16)}], "batch 0: the model failed on inputs .* keywords must be strings"),
        ([torch.ones(4, 3, 16, 16).to_sparse()], r"batch 0: expected a dense tensor .* torch.sparse_coo; .*to_dense"),
        ([torch.ones(4, 768).to_sparse_csr()], "batch 0: expected a dense tensor .* torch.sparse_csr"),
        ([torch.ones(4, 3, 16, 16).to_mkldnn()], "batch 0: expected a dense tensor .* torch._mkldnn"),
        ([torch.ones(4, 3, 16, 16, device="meta")], "batch 0: .* on the meta device, which holds no numbers"),
        ([torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(3, 5)])], "batch 0: .* nested one; pad"),
        (
            [torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged)],
            "batch 0: .* nested one; pad",
        ),
        (
            [torch.quantize_per_tensor(torch.ones(4, 3, 16, 16), 0.1, 0, torch.quint8)],
            r"batch 0: .* a quantized one \(torch.quint8\); give tensor.dequantize\(\)",
        ),
        ([torch.masked.masked_tensor(torch.ones(4, 3), torch.ones(4, 3) > 0)], "batch 0: .* a MaskedTensor, which is"),
        ([torch.full((4, 3), complex(0, float("nan")))], "batch 0: the input holds NaN or inf"),
        ([torch.full((4, 3), float("nan")).to(torch.float8_e4m3fn)], "batch 0: the input holds NaN or inf"),
        ([torch.ones(4, 3, 16, 16).cfloat()] * 2, "batch 0: the model failed on inputs"),
        (
            [{"x": [torch.ones(4, 3), torch.full((4, 3), float("nan"))]}],
            "batch 0, input 'x': the input holds NaN or inf",
        ),
    ],
)
def test_a_bad_loader(conv: Case, loader: Any, match: str) -> None:
    check(cptv_ao.CalibrationDataError, match, conv.converted, loader, float_model=conv.float_model)


@pytest.mark.parametrize("kind", ["refine", "count_codes"])
@pytest.mark.parametrize("length", [None, 2])
def test_a_loader_without_an_end(conv: Case, monkeypatch: pytest.MonkeyPatch, length: int | None, kind: str) -> None:
    """Read up to a limit, whatever it says of its length."""
    monkeypatch.setattr("cptv_ao.core.loader._IMAGES", 40)
    loader = Endless(conv.batches[0]) if length is None else EndlessWithLength(conv.batches[0])
    told = "and it has no length" if length is None else "more than its length"
    match = rf"calib_loader: expected an end, got 44 images .* in 11 batches so far, {told}; .*list\(itertools.islice\("
    if kind == "refine":
        check(cptv_ao.CalibrationDataError, match, conv.converted, loader, float_model=conv.float_model)
    else:
        with pytest.raises(cptv_ao.CalibrationDataError, match=match):
            count_codes(conv.converted, "conv1.output", loader)
    assert loader.read == 11


@pytest.mark.parametrize("loader", [Endless, EndlessWithLength])
def test_a_few_images_of_a_loader_without_an_end_are_diagnosed(
    conv: Case, monkeypatch: pytest.MonkeyPatch, loader: type[Endless]
) -> None:
    """However many would be too many."""
    monkeypatch.setattr("cptv_ao.core.loader._IMAGES", 40)
    given = loader(torch.cat(conv.batches))
    assert cptv_ao.diagnose(conv.converted, given, float_model=conv.float_model, progress=False).images == 128


def test_large_images_without_an_end(conv: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptv_ao.core.loader._BYTES", 3 * conv.batches[0].nbytes)
    loader = Endless(conv.batches[0])
    match = r"expected an end, got 16 images \(4.6e-05 GiB\) in 4 batches so far"
    check(cptv_ao.CalibrationDataError, match, conv.converted, loader, float_model=conv.float_model)


def test_a_loader_that_fails_midway(conv: Case) -> None:
    def loader() -> Any:
        yield conv.batches[0]
        raise ZeroDivisionError("in the user's code")

    check(ZeroDivisionError, "in the user's code", conv.converted, loader(), float_model=conv.float_model)


@pytest.mark.parametrize("loss", ["infonce", "soft_infonce"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_batch_of_one_image_with_infonce(conv: Case, loss: Any, index: int) -> None:
    batches = list(conv.batches)
    batches[index] = batches[index][:1]
    match = (
        rf"calib_loader, batch {index}: {loss} needs at least 2 images per batch for its negatives, got 1; use larger"
    )
    error = check(
        cptv_ao.CalibrationDataError,
        match,
        conv.converted,
        batches,
        float_model=conv.float_model,
        config=small_config(loss=loss),
    )
    assert error.batch == index


# The float model


def differing(case: Case, change: Any) -> nn.Module:
    model = copy.deepcopy(case.float_model)
    with torch.no_grad():
        change(model)
    return model


def replace(name: str, module: nn.Module) -> Any:
    return lambda model: setattr(model, name, module)


@pytest.mark.parametrize(
    ("change", "module", "match"),
    [
        (lambda m: delattr(m, "right"), "right", "expected a module right as in the quantized model, found none"),
        (replace("fc1", nn.Linear(128, 13)), "fc1", r"expected a weight of shape \(12, 128\), got \[\(13, 128\)\]"),
        (replace("last", nn.Identity()), "last", r"expected a weight of shape \(8, 8, 3, 3\), got none"),
        (lambda m: m.gate.weight.mul_(1.5), "gate", "its weights are not those that were quantized"),
        (lambda m: m.fc2.weight[3, 4].add_(0.3), "fc2", "its weights are not those that were quantized"),
        (lambda m: m.conv1.weight.add_(0.2), "conv1", "its weights are not those that were quantized"),
        (lambda m: m.bn1.weight.mul_(2), "conv1", "its weights are not those that were quantized"),
        # conv1 and bn1 negated together are the same function
        (lambda m: [p.mul_(-1) for p in m.parameters()], "left", "its weights are not those that were quantized"),
    ],
)
def test_a_float_model_that_does_not_match_names_the_first_module(
    conv: Case, change: Any, module: str, match: str
) -> None:
    other = differing(conv, change)
    error = check(cptv_ao.FloatModelMismatchError, match, conv.converted, conv.batches, float_model=other)
    assert error.module == module
    assert module in str(error)
    assert "pass the " in str(error)


def test_a_functional_weight_that_does_not_match(functional: Case) -> None:
    other = differing(functional, lambda m: m.weight.mul_(-1))
    match = r"does not match at packed_weight_1: its weights are not those that were quantized"
    check(cptv_ao.FloatModelMismatchError, match, functional.converted, functional.batches, float_model=other)


def test_a_float_model_of_another_network(conv: Case, functional: Case) -> None:
    match = "expected a module conv1 as in the quantized model, found none"
    check(
        cptv_ao.FloatModelMismatchError,
        match,
        conv.converted,
        conv.batches,
        float_model=functional.float_model,
    )


def test_a_float_model_with_other_outputs(conv: Case) -> None:
    class Wrapped(type(conv.float_model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x)] * 2, 1)

    other = copy.deepcopy(conv.float_model)
    other.__class__ = Wrapped
    match = r"float_model: expected outputs of shape \(4, 5\) .* on batch 0, got \(4, 10\)"
    check(cptv_ao.FloatModelMismatchError, match, conv.converted, conv.batches, float_model=other)


@pytest.mark.parametrize("value", ["model.pt", 3])
def test_a_float_model_that_is_no_module(conv: Case, value: Any) -> None:
    match = f"float_model: expected an nn.Module, got {type(value).__name__}"
    check(TypeError, match, conv.converted, conv.batches, float_model=value)


@pytest.mark.filterwarnings("ignore:the float network's output is the same for all")
def test_a_zero_weight_fits_only_a_zero_weight(conv: Case) -> None:
    float_model = differing(conv, lambda m: m.fc2.weight.zero_())
    _, model = nets.quantize(float_model, conv.batches, weight_bits=3)
    check(cptv_ao.FloatModelMismatchError, "at fc2", model, conv.batches, float_model=conv.float_model)
    cptv_ao.refine(model, conv.batches, float_model=float_model, config=small_config(), progress=False)


# The rest


def test_a_config_of_another_type(conv: Case) -> None:
    match = "config: expected a RefineConfig, got dict"
    check(TypeError, match, conv.converted, conv.batches, float_model=conv.float_model, config={"passes": 1})


def test_a_float_model_of_another_dtype(conv: Case) -> None:
    other = copy.deepcopy(conv.float_model).double()
    match = "its parameters are torch.float64, the images are not"
    check(cptv_ao.CptvError, match, conv.converted, conv.batches, float_model=other)


def test_a_reference_model_that_torch_cannot_lower() -> None:
    float_model = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 4)))
    batches = list(nets.images(16, 6).split(4))
    with torch.no_grad():
        prepared = prepare_fx(float_model, nets.mapping(), (batches[0],))
        for batch in batches:
            prepared(batch)
        reference = convert_to_reference_fx(prepared)
    check(cptv_ao.UnsupportedModelError, "torch cannot lower this reference model", reference, batches)
