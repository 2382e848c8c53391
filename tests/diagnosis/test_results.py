"""What a diagnosis says: its table, its JSON, its data frames and its advice."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest

from cptv_ao.diagnosis.advice import advise
from cptv_ao.diagnosis.results import BlockDiagnosis, Diagnosis, Findings, SiteDiagnosis

TABLE = """\
cptv_ao.diagnose: kl 0.25 on the model's own kernels, 128 images; outputs 9.5 dB, 91 % of the images agree with float

shares below are of the simulation, whose loss is 0.24:
block     causes  loss without  output SQNR  cosine  sites
----------------------------------------------------------
blocks.3    41 %        0.1416       8.2 dB  0.9312     16
blocks.0   2.5 %         0.234        exact  1.0000     16
head           -             -            -       -      3

site                     causes     SQNR  clipped  range used  outlier
----------------------------------------------------------------------
blocks.3.mlp.fc2.output    39 %  11.0 dB    0.0 %        50 %    12.0x
blocks.3.mlp.fc2.weight  -1.0 %  40.0 dB    0.2 %       112 %        -
head.output                   -        -        -           -        -

kernels of this machine saturate on: blocks.0.norm1.output
may saturate on x86 CPUs without VNNI: a, b, c and 2 more
batch norms not fused: bn1
ops in float: GELU 4, softmax 4

head was not measured

- run refine"""


@pytest.fixture
def made() -> Diagnosis:
    return Diagnosis(
        loss_name="kl",
        loss=0.25,
        simulated=0.24,
        least=0.0,
        floor=0.0,
        sqnr=9.51,
        agreement=0.914,
        images=128,
        blocks=(
            BlockDiagnosis("blocks.3", 0.41, 0.1416, 8.2, 0.9312, "add_9", 16),
            BlockDiagnosis("blocks.0", 0.025, 0.234, math.inf, 1.0, "add_6", 16),
            BlockDiagnosis("head", math.nan, math.nan, None, None, None, 3),
        ),
        sites=(
            SiteDiagnosis("blocks.3.mlp.fc2.output", "activation", "Linear", "blocks.3", 11.0, 0.0, 0.5, 0.39, 12.0, 3),
            SiteDiagnosis("blocks.3.mlp.fc2.weight", "weight", "Linear", "blocks.3", 40.0, 0.002, 1.125, -0.01),
            SiteDiagnosis("head.output", "activation", "Linear", "head"),
        ),
        findings=Findings(
            unfused_norms=("bn1",),
            float_ops={"GELU": 4, "softmax": 4},
            saturating=("blocks.0.norm1.output",),
            saturation_risk=("a", "b", "c", "d", "e"),
        ),
        notes=("head was not measured",),
        advice=("run refine",),
    )


def test_the_table(made: Diagnosis) -> None:
    assert str(made) == TABLE


def test_long_tables_say_what_they_leave_out(made: Diagnosis) -> None:
    many = replace(made, blocks=made.blocks * 5, sites=made.sites * 4)
    assert "(5 more blocks in to_dict() and to_pandas())" in str(many)
    assert "(2 more sites in to_dict() and to_pandas())" in str(many)


def test_it_is_json_safe(made: Diagnosis) -> None:
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert data["blocks"][0] == {
        "name": "blocks.3", "share": 0.41, "loss_without": 0.1416, "sqnr": 8.2, "cosine": 0.9312, "node": "add_9",
        "sites": 16,
    }  # fmt: skip
    assert data["blocks"][1]["sqnr"] is None, "infinite"
    assert data["blocks"][2]["share"] is None, "not known"
    assert data["findings"]["float_ops"] == {"GELU": 4, "softmax": 4}
    assert data["sites"][0]["outlier_channels"] == 3
    assert data["advice"] == ["run refine"]


def test_data_frames(made: Diagnosis) -> None:
    pytest.importorskip("pandas")
    blocks, sites = made.to_pandas()
    assert list(blocks.name) == ["blocks.3", "blocks.0", "head"]
    assert blocks.share[0] == 0.41 and math.isnan(blocks.share[2])
    assert list(blocks.columns) == ["name", "share", "loss_without", "sqnr", "cosine", "node", "sites"]
    assert list(sites.loc[sites.kind == "weight", "name"]) == ["blocks.3.mlp.fc2.weight"]
    assert sites.used.max() == 1.125
    empty, _ = replace(made, blocks=()).to_pandas()
    assert len(empty) == 0 and "share" in empty.columns


def test_without_pandas(made: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas: pip install pandas \(or use to_dict"):
        made.to_pandas()


def advice(made: Diagnosis, *, refined: bool = False, findings: Findings | None = None, **site: object) -> str:
    first = replace(made.sites[0], **site)  # type: ignore[arg-type]
    (told,) = advise(replace(made, sites=(first, *made.sites[1:]), findings=findings or Findings()), refined)
    return told


def test_advice_names_block_site_and_reason(made: Diagnosis) -> None:
    start = "blocks.3 causes 41 % of the loss, nearly all of it from blocks.3.mlp.fc2.output"
    assert advice(made) == f"{start}, whose range is set by 3 outlier channels (12x): run refine"
    assert advice(made, clipped=0.07) == f"{start}, which clips 7.0 % of its values: run refine"
    in_a_stream = Findings(rotatable=(made.sites[0].name,))
    spread = "3 outlier channels (12x), which refine, given float_model, spreads over all if the layers allow it"
    assert advice(made, findings=in_a_stream) == f"{start}, whose range is set by {spread}: run refine"
    moved = "3 outlier channels (12x), which refine, given float_model, moves into the layers behind it: run refine"
    behind_norm = Findings(smoothable=(made.sites[0].name,))
    assert advice(made, findings=behind_norm) == f"{start}, whose range is set by {moved}"
    few = {"outlier_channels": 0, "used": 0.06}
    assert advice(made, **few) == f"{start}, which uses 6.0 % of its code range: run refine"
    assert advice(made, outlier_channels=0) == f"{start}, whose codes are coarse (11 dB): run refine"
    assert advice(made, outlier_channels=0, sqnr=30.0) == f"{start}: run refine"
    assert "most of it from blocks.3.mlp.fc2.output" in advice(made, share=0.25)
    assert "most from blocks.3.mlp.fc2.output (5.0 %)" in advice(made, share=0.05)
    assert advice(made, share=None, outlier_channels=0) == "blocks.3 causes 41 % of the loss: run refine"
    assert advice(made, refined=True).endswith(
        ": refine has been run already: what is left needs a longer search or more bits"
    )


def test_advice_where_no_block_stands_out(made: Diagnosis) -> None:
    even = tuple(replace(block, share=share) for block, share in zip(made.blocks, (0.3, 0.25, 0.2), strict=True))
    told = advise(replace(made, blocks=even, findings=Findings()), False)
    assert told == ("the loss comes from all blocks alike (blocks.3 is the worst with 30 %): run refine",)
    unknown = tuple(replace(block, share=math.nan) for block in made.blocks)
    told = advise(replace(made, blocks=unknown, findings=Findings()), False)
    assert told == ("no block alone brings the loss down: run refine",)


def test_advice_where_nothing_is_to_be_gained(made: Diagnosis) -> None:
    near = replace(made, loss=1e-6, sqnr=41.0, agreement=1.0, findings=Findings())
    assert advise(near, False) == ("little to gain: kl is 1e-06 already, outputs are 41 dB from float",)
    exact = replace(near, loss=0.0, sqnr=math.inf, agreement=None)
    assert advise(exact, False) == ("little to gain: kl is 0 already, outputs are exactly those of the float model",)
    assert "causes 41 %" in advise(replace(near, agreement=0.99), False)[0]
    assert advise(replace(near, loss=2.0, least=2.0), False)[0].startswith("little to gain: kl is 2 already")
    assert "little" not in advise(replace(near, loss=2.0, least=2.0, sqnr=28.0), False)[0], "whatever the loss says"


def test_advice_from_the_graph(made: Diagnosis) -> None:
    findings = Findings(
        unfused_norms=("a", "b"),
        float_layers=("fc",),
        unknown=("celu (quantized.celu)",),
        wide_weights=("w (-4..4 for -4..3)",),
        saturation_risk=("x", "y"),
    )
    told = advise(replace(made, findings=findings), False)
    assert told[0].startswith("2 batch norms are not fused with the convolution before: ")
    assert "cptv_ao.recipe" in told[0]
    assert "blocks.3" in told[1]
    assert [sentence.split(":")[0] for sentence in told[2:]] == [
        "2 activations are using the upper half of 0..255 in front of 8-bit weights",
        "1 weight is using more levels than the bit width says (convert_fx does not clamp)",
        "1 layer is computing in float (fc)",
        "1 quantized op is not understood and left alone by refine",
    ]
    saturating = advise(replace(made, findings=replace(findings, saturating=("x",))), False)
    assert saturating[1].startswith("kernels of this CPU saturate at x: calibrate with reduce_range=True")
    assert not any("upper half" in sentence for sentence in saturating), "said once"


def test_advice_on_what_no_site_explains(made: Diagnosis) -> None:
    told = advise(replace(made, floor=0.06, findings=Findings()), False)
    assert told[-1].startswith("25 % of the loss is in no site")
    infonce = replace(made, least=2.0, simulated=2.24, floor=2.01, findings=Findings())
    assert not any("in no site" in sentence for sentence in advise(infonce, False))
