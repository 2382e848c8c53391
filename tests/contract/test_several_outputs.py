"""What a network returns, whatever it is: every floating output counts, has a line in the report, and gains."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.killed import Killed
from helpers.quick import some
from helpers.search import small_config
from helpers.several_nets import RETURNS, Sequences, made
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.core.output_tree import named_tensors

GRADIENT: dict[str, Any] = {
    "gradient_steps": 20, "loss": "auto", "population": ("curvature",), "evaluations": 2,
}  # fmt: skip
# What networks need that have little to gain.
WHOLE: dict[str, Any] = {
    "gradient_steps": 30, "population": ("output_error", "ranges", "curvature", "biases"), "evaluations": 4,
}  # fmt: skip


def converted(name: str, form: str = "fx") -> tuple[nn.Module, GraphModule, list[Tensor]]:
    net, batches = made(name)
    if form == "fx":
        return net, nets.quantize(net, batches, weight_bits=4)[1], batches
    graph = pt2e.exported(copy.deepcopy(net), (batches[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    prepared = pt2e.torchao().prepare_pt2e(graph, pt2e.x86())
    for batch in batches:
        prepared(batch)
    return net, pt2e.torchao().convert_pt2e(prepared), batches


def refined(name: str, form: str = "fx", **changes: Any) -> tuple[nn.Module, GraphModule, GraphModule, cptv_ao.Report]:
    """The float network, the model as it was and refined, and the report."""
    net, model, batches = converted(name, form)
    given = copy.deepcopy(model)
    config = small_config(**(GRADIENT | changes))
    cptv_ao.refine(model, batches, float_model=net, config=config, progress=False)
    report = cptv_ao.report(model)
    json.dumps(report.to_dict(), allow_nan=False)
    return net, given, model, report


def apart(model: Any, net: nn.Module, name: str) -> float:
    """Mean over the outputs of their squared error over their variance, on images that no search has seen."""
    images = nets.images(200, 3, 8, 8, seed=99)
    with torch.no_grad():
        got, wanted = named_tensors(model(images)), named_tensors(net(images))
    pairs = [(got[one].double(), wanted[one].double()) for one in RETURNS[name][1]]
    return sum(float((g - w).square().mean() / w.var()) for g, w in pairs) / len(pairs)


FORMS = [("fx", name) for name in RETURNS] + [("pt2e", name) for name in RETURNS]
QUICK = {("fx", "heads"), ("fx", "detector"), ("pt2e", "dataclass")}


@pytest.mark.parametrize(
    ("form", "name"), [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in FORMS]
)
def test_every_floating_output_counts(form: str, name: str) -> None:
    short = (form, name) in QUICK and name != "heads"
    net, given, model, report = refined(name, form, **({} if short else WHOLE))
    assert {one.name: one.loss for one in report.outputs} == RETURNS[name][1]
    assert report.after.search < report.before.search
    assert report.after.holdout < report.before.holdout
    assert apart(model, net, name) < 0.95 * apart(given, net, name)
    for side in ("before", "after"):
        for images in ("search", "holdout"):
            total = getattr(getattr(report, side), images)
            each = [getattr(getattr(one, side), images) for one in report.outputs]
            assert sum(each) / len(each) == pytest.approx(total, rel=1e-9)
    text = str(report)
    assert all(f"\n{one.name} " in text for one in report.outputs if len(report.outputs) > 1)


def test_what_cannot_be_compared_is_named() -> None:
    notes = refined("heads", gradient_steps=0, passes=0)[3].notes
    assert "outputs left out: label (int64), anchors (no row for each image, shape (2, 4))" in notes
    assert "outputs left out, for they are the same for all images: 'prior'" in notes
    assert any(note.startswith("loss: the mean of logits mse, age mse, mask mse") for note in notes)


@pytest.mark.parametrize("score_on", some("simulation", others=["kernels"]))
def test_losses_by_name(score_on: Any) -> None:
    def worst(candidate: Tensor, teacher: Tensor) -> Tensor:
        assert candidate.shape[1] == 64, "a map is given as one row of an image"
        return (candidate - teacher).abs().amax(1).mean()

    losses = {"logits": "kl", "age": None, "mask": worst}
    report = refined("heads", loss=losses, score_on=score_on)[3]
    assert {one.name: one.loss for one in report.outputs} == {"logits": "kl", "mask": "worst"}
    assert all(one.after.search < one.before.search for one in report.outputs)
    assert "'mask': " in report.settings["loss"] and " at 0x" not in report.settings["loss"]
    only = refined("heads", loss={"age": None, "mask": None}, score_on=score_on, gradient_steps=4)[3]
    assert [(one.name, one.size) for one in only.outputs] == [("logits", 1.0)]
    assert only.outputs[0].after == only.after


def test_a_loss_by_name_that_cannot_be_followed() -> None:
    def counted(candidate: Tensor, teacher: Tensor) -> float:
        return float((candidate.argmax(1) != teacher.argmax(1)).float().mean())

    report = refined("heads", loss={"logits": counted})[3]
    assert any(note.startswith("output logits: the loss cannot be differentiated") for note in report.notes)
    assert any(stage.startswith("gradient") for stage in report.stages), "the other outputs are followed"
    assert report.after.search < report.before.search


CHOICES: dict[str, Any] = {
    "name": "age", "function": lambda found: found["age"], "names": ("age", "mask"),
    "tree": lambda found: {"years": found["age"], "parts": [found["mask"]]},
}  # fmt: skip


@pytest.mark.parametrize("choice", some("function", "names", others=CHOICES))
def test_outputs_that_are_asked_for(choice: str) -> None:
    wanted = {"name": ["age"], "function": ["output"], "names": ["age", "mask"], "tree": ["years", "parts.0"]}
    report = refined("heads", output=CHOICES[choice], gradient_steps=8)[3]
    assert [one.name for one in report.outputs] == wanted[choice]
    assert report.after.search < report.before.search


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": {"boxes": "mse"}}, r"loss: expected outputs among 'logits', 'age', .* got 'boxes'"),
        ({"output": "boxes"}, r"output: expected outputs among 'logits', 'age', .* got 'boxes'"),
        ({"output": ("age", "label")}, r"output: output 'label' cannot be compared: int64"),
        ({"loss": {"age": "kl"}}, r"one number per image, got 'kl'"),
        ({"loss": {"logits": lambda candidate, teacher: 0 * candidate.sum()}}, "higher for worse outputs"),
        ({"loss": {"logits": None, "age": None, "mask": None, "prior": None}}, "at least one output"),
    ],
)
@pytest.mark.parametrize("verb", some("refine", others=["diagnose"]))
def test_names_that_are_not_there(verb: str, changes: dict[str, Any], match: str) -> None:
    net, model, batches = converted("heads")
    with pytest.raises(ValueError, match=match):
        getattr(cptv_ao, verb)(
            model, batches, float_model=net, config=small_config(**(GRADIENT | changes)), progress=False
        )


@pytest.mark.parametrize("loss", some("kl", "infonce", others=["cosine", "mse", "soft_infonce"]))
def test_one_loss_for_all(loss: str) -> None:
    report = refined("heads", loss=loss, gradient_steps=8)[3]
    assert {one.name: one.loss for one in report.outputs} == {"logits": loss, "age": "mse", "mask": loss}
    assert report.after.search < report.before.search
    told = f"output age: mse, for it is one number per image, which {loss} cannot see"
    assert (told in report.notes) == (loss != "mse")


def test_a_map_is_compared_place_by_place() -> None:
    net, given, _, report = refined("segmenter", loss="kl", gradient_steps=8, holdout=0.0)
    assert report.outputs[0].size == 1.0
    images = torch.cat(made("segmenter")[1])
    with torch.no_grad():
        got, wanted = (f(images).double().log_softmax(1) for f in (given, net))
    by_hand = (wanted.exp() * (wanted - got)).sum(1).mean()
    assert report.before.search == pytest.approx(float(by_hand), rel=1e-5)


def test_large_maps_are_compared_in_some_places() -> None:
    report = refined("detector", cache_bytes=4 * 2 * 96 * 200, gradient_steps=8)[3]
    assert any("% of the places of maps and sequences are compared" in note for note in report.notes)
    whole = refined("detector", gradient_steps=0, population=(), passes=0)[3]
    assert report.before.search == pytest.approx(whole.before.search, rel=0.3), "a fair sample"
    assert report.after.search < 0.9 * report.before.search


class Found(nn.Module):
    """Boxes for as many places as are above the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"scores": y, "boxes": y[y[:, 0] > y[:, 0].mean() - 0.5]}


@pytest.mark.parametrize("verb", ["refine", "diagnose"])
def test_a_size_that_depends_on_what_images_show(verb: str) -> None:
    net, batches = nets.seeded(Found), list(nets.images(64, 6).split(16))
    _, model = nets.quantize(net, batches, weight_bits=4)
    with pytest.raises(cptv_ao.UnsupportedModelError, match=r"output 'boxes': .* images show.* RefineConfig\(output="):
        getattr(cptv_ao, verb)(model, batches, float_model=net, config=small_config(loss="auto"), progress=False)
    config = small_config(loss="auto", output="scores")
    getattr(cptv_ao, verb)(model, batches, float_model=net, config=config, progress=False)


class PerImage(Found):
    def forward(self, x: Tensor) -> Any:
        return list(self.layer(x))


def test_a_number_of_outputs_that_depends_on_the_images() -> None:
    net, batches = nets.seeded(Found), list(nets.images(64, 6).split(16))
    _, model = nets.quantize(net, batches, weight_bits=4)
    teacher = nets.seeded(PerImage)
    with pytest.raises(cptv_ao.UnsupportedModelError, match=r"as many outputs .* got 4 for 4 of them and 2 for 2"):
        cptv_ao.refine(model, batches, float_model=teacher, config=small_config(loss="auto"), progress=False)


@pytest.mark.filterwarnings("ignore:refine without float_model")
def test_without_the_float_model() -> None:
    _, model, batches = converted("heads")
    cptv_ao.refine(model, batches, config=small_config(**GRADIENT), progress=False)
    assert len(cptv_ao.report(model).outputs) == 3


def test_batches_with_sizes_of_their_own() -> None:
    net = nets.seeded(Sequences)
    batches = [nets.images(12, length, 6, seed=length) for length in (3, 4, 5, 6)]
    _, model = nets.quantize(net, batches, weight_bits=4)
    cptv_ao.refine(model, batches, float_model=net, config=small_config(**GRADIENT), progress=False)
    report = cptv_ao.report(model)
    assert report.after.search < report.before.search
    assert [one.name for one in report.outputs] == ["0", "1"]


@pytest.mark.slow
def test_single_images() -> None:
    net, batches = made("heads", 32)
    _, model = nets.quantize(net, batches, weight_bits=4)
    singles = [image for batch in batches for image in batch.split(1)]
    cptv_ao.refine(model, singles, float_model=net, config=small_config(**GRADIENT), progress=False)
    report = cptv_ao.report(model)
    assert [one.name for one in report.outputs] == ["logits", "age", "mask"]
    assert report.after.search < report.before.search


def test_a_teacher_with_names_of_its_own() -> None:
    """A graph that was exported from a tuple, a float model that returns a dict."""
    net, model, batches = converted("dataclass")
    other = nets.seeded(lambda: type(net)(lambda n, features, pooled: (n.classes(pooled), n.box(pooled))))
    cptv_ao.refine(model, batches, float_model=other, config=small_config(**GRADIENT), progress=False)
    report = cptv_ao.report(model)
    assert [one.name for one in report.outputs] == ["0", "1"]
    assert report.after.search < report.before.search


def test_outputs_that_only_the_float_model_has() -> None:
    net, model, batches = converted("dataclass")
    more = nets.seeded(
        lambda: type(net)(lambda n, f, pooled: {"logits": n.classes(pooled), "extra": f, "box": n.box(pooled)})
    )
    given = copy.deepcopy(model)
    cptv_ao.refine(model, batches, float_model=more, config=small_config(**GRADIENT), progress=False)
    report = cptv_ao.report(model)
    assert [one.name for one in report.outputs] == ["logits", "box"]
    assert "outputs left out: extra (only the float network returns it)" in report.notes
    assert apart(model, net, "dataclass") < 0.95 * apart(given, net, "dataclass")


@pytest.mark.parametrize("spoiled", [False, True])
def test_what_ships_accepts(spoiled: bool) -> None:
    net, model, batches = converted("heads")
    made = []

    def ship(own: Any) -> Any:
        made.append(own)
        factor = 3.0 if spoiled and len(made) > 1 else 1.0
        return lambda x: {**(found := own(x)), "mask": found["mask"] * factor}

    config = small_config(**GRADIENT, score_on="simulation", accept_on=ship, equalize=False)
    cptv_ao.refine(model, batches, float_model=net, config=config, progress=False)
    report = cptv_ao.report(model)
    assert len(made) == 2, "measured with the verdict, not again"
    assert (report.status is cptv_ao.Status.REJECTED) == spoiled
    for side in ("before", "after"):
        each = [getattr(one, side).search for one in report.outputs]
        assert sum(each) / 3 == pytest.approx(getattr(report, side).search, rel=1e-9)


def test_diagnose_tells_of_each() -> None:
    net, model, batches = converted("heads")
    found = cptv_ao.diagnose(model, batches, float_model=net, progress=False)
    assert [one.name for one in found.outputs] == ["logits", "age", "mask"]
    assert sum(one.loss for one in found.outputs) / 3 == pytest.approx(found.loss, rel=1e-9)
    assert found.sqnr == min(one.sqnr for one in found.outputs)
    with torch.no_grad():
        got, wanted = (f(torch.cat(batches))["mask"].double() for f in (model, net))
    by_hand = 10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum())
    assert found.outputs[2].sqnr == pytest.approx(float(by_hand), rel=1e-5)
    assert all(f"\n{one.name} " in str(found) for one in found.outputs)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_float_model_with_other_sizes() -> None:
    net, model, batches = converted("dataclass")
    other = nets.seeded(lambda: type(net)(lambda n, features, pooled: {"logits": n.box(pooled), "box": n.box(pooled)}))
    with pytest.raises(
        cptv_ao.FloatModelMismatchError, match=r"'logits' \(16, 5\), 'box' \(16, 4\) as .* 'logits' \(16, 4"
    ):
        cptv_ao.refine(model, batches, float_model=other, config=small_config(**GRADIENT), progress=False)


def test_an_output_that_is_no_number_is_named() -> None:
    net, model, batches = converted("heads")
    with torch.no_grad():
        net.number.bias.fill_(float("nan"))
    with pytest.raises(cptv_ao.NonFiniteError, match="teacher's output 'age' on calibration batch 0"):
        cptv_ao.refine(model, batches, float_model=net, config=small_config(**GRADIENT), progress=False)


def test_the_page_has_a_row_for_each(tmp_path: Path) -> None:
    report = refined("heads", gradient_steps=4, passes=0)[3]
    page = tmp_path / "report.html"
    report.save_html(page)
    text = page.read_text()
    for one in report.outputs:
        assert f"<td>{one.name}</td><td>{one.loss}</td>" in text
        assert f'<td class="n">{one.after.search:.5g}</td>' in text


def test_a_reference_model() -> None:
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

    net, batches = made("heads")
    prepared = prepare_fx(copy.deepcopy(net), nets.mapping(4), (batches[0],))
    for batch in batches:
        prepared(batch)
    model = convert_to_reference_fx(prepared)
    cptv_ao.refine(model, batches, config=small_config(**GRADIENT), progress=False)
    report = cptv_ao.report(model)
    assert report.after.search < report.before.search and len(report.outputs) == 3


@pytest.mark.slow
def test_a_search_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    net, model, batches = converted("heads")
    config = small_config(**(GRADIENT | {"loss": {"age": "mse"}}))
    path = tmp_path / "state"

    def refine(**changes: Any) -> cptv_ao.Report:
        own = cptv_ao.refine(model, batches, float_model=net, config=config, inplace=False, progress=False, **changes)
        return cptv_ao.report(own)

    def killed(event: cptv_ao.Event) -> None:
        if event.kind == "candidate":
            raise Killed

    whole = refine()
    with pytest.raises(Killed):
        refine(checkpoint=path, callback=killed)
    again = refine(checkpoint=path)
    assert (again.after, again.outputs, again.moves) == (whole.after, whole.outputs, whole.moves)
