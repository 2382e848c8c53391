"""Which sites are searched together."""

from __future__ import annotations

import pytest
import workloads
from helpers.cases import Case

import cptv_ao
from cptv_ao.core.blocks import block_path, blocks_by_path, find_blocks
from cptv_ao.core.sites import ScaleSite


def site(name: str, kind: str = "activation") -> ScaleSite:
    scope = name.rpartition(".")[0]
    return ScaleSite(name, kind, "op", scope, (), None, 0, 255, True, (name,), name)  # type: ignore[arg-type]


def blocks_of(*names: str) -> list[str]:
    chosen = blocks_by_path([site(name) for name in names])
    return [chosen[name] for name in names]


@pytest.mark.parametrize(
    ("scope", "block"),
    [
        ("blocks.3.attn.qkv", "blocks.3"),  # timm vit, deit
        ("layers.0.blocks.1.mlp.fc1", "layers.0.blocks.1"),  # timm swin
        ("stages.1.blocks.2.attn.qkv.linear", "stages.1.blocks.2"),  # timm levit
        ("stages.1.downsample.mlp.ln1", "stages.1"),
        ("blocks.2.0.conv_pw", "blocks.2.0"),  # timm efficientnet: ModuleList of Sequentials
        ("layer1.0.conv1", "layer1.0"),  # torchvision
        ("layer4.1.downsample.0", "layer4.1"),
        ("features.3.conv.0.0", "features.3"),
        ("encoder.layer.5.output.dense", "encoder.layer.5"),  # BERT-like
        ("s1.b1.conv1.conv", "s1.b1"),  # timm regnet
        ("transformer.resblocks.7.mlp", "transformer.resblocks.7"),  # CLIP
        ("features.denseblock1.denselayer2.conv1", "features.denseblock1.denselayer2"),
        ("patch_embed.proj", ""),
        ("head", ""),
        ("0.conv", ""),  # an nn.Sequential at the top is no container of blocks by name
        ("", ""),
    ],
)
def test_the_block_of_a_path(scope: str, block: str) -> None:
    assert block_path(scope) == block


def test_stem_blocks_and_head() -> None:
    names = ("patch_embed.proj.weight", "scale_0", "blocks.0.norm1.scale_0", "blocks.0.scale_1", "blocks.1.fc.weight")
    assert blocks_of(*names, "scale_4", "head.weight") == [
        *("stem", "stem", "blocks.0", "blocks.0", "blocks.1"),
        *("head", "head"),
    ]


def test_a_site_without_a_path_belongs_to_the_block_before_it() -> None:
    assert blocks_of("blocks.0.fc.weight", "scale_0", "blocks.1.fc.weight") == ["blocks.0", "blocks.0", "blocks.1"]


def test_what_stands_between_the_blocks_of_a_stage_is_a_block() -> None:
    names = ("layers.0.blocks.0.fc.weight", "layers.1.downsample.fc.weight", "layers.1.blocks.0.fc.weight")
    assert blocks_of(*names) == ["layers.0.blocks.0", "layers.1.downsample", "layers.1.blocks.0"]


def test_a_model_without_numbered_modules_is_cut_into_runs_of_weights() -> None:
    sites = [
        site(f"conv{i // 2}.{'weight' if i % 2 else 'output'}", ("activation", "weight")[i % 2]) for i in range(20)
    ]
    blocks = find_blocks(sites)
    assert [block.name for block in blocks] == ["part 0", "part 1", "part 2"]
    assert [sum(s.kind == "weight" for s in block.sites) for block in blocks] == [4, 4, 2]
    assert [s for block in blocks for s in block.sites] == sites


def test_every_site_is_in_exactly_one_block(case: Case) -> None:
    sites = cptv_ao.find_sites(case.converted)
    blocks = find_blocks(sites.values())
    members = [s.name for block in blocks for s in block.sites]
    assert sorted(members) == sorted(sites)
    assert len({block.name for block in blocks}) == len(blocks)


def test_the_vit_has_its_four_blocks_with_norms_and_residual_adds(vit_w3: Case) -> None:
    blocks = find_blocks(cptv_ao.find_sites(vit_w3.converted).values())
    assert [block.name for block in blocks] == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    for block in blocks[1:-1]:
        ops = [s.op for s in block.sites]
        assert ops.count("quantized.layer_norm") == 2 and ops.count("quantized.add") == 2
        assert sum(s.kind == "weight" for s in block.sites) == 4
    assert [s.name for s in blocks[-1].sites] == ["scale_4", "head.weight", "head.output"]


@pytest.mark.parametrize("fold", [True, False])
def test_an_exported_weight_is_in_the_block_that_reads_it(vit_w3: Case, fold: bool) -> None:
    pytest.importorskip("torchao", reason="it makes such graphs")
    graph = workloads.quantize_exported(vit_w3.float_model, vit_w3.batches[:1], fold_quantize=fold)
    blocks = find_blocks(cptv_ao.find_sites(graph).values())
    assert [block.name for block in blocks] == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert [s.name for s in blocks[0].sites] == ["patch_embed.proj.input", "patch_embed.proj.weight"]
    assert [s.name for s in blocks[-1].sites] == ["head.input", "head.weight"]
    assert all(sum(s.kind == "weight" for s in block.sites) == 4 for block in blocks[1:-1])


def test_a_policy_of_ones_own(conv: Case) -> None:
    sites = cptv_ao.find_sites(conv.converted)
    blocks = find_blocks(sites.values(), lambda all_sites: {s.name: s.kind for s in all_sites})
    assert [block.name for block in blocks] == ["activation", "weight"]
    assert sum(len(block.sites) for block in blocks) == len(sites)


def test_a_policy_that_leaves_a_site_out_is_refused(conv: Case) -> None:
    sites = cptv_ao.find_sites(conv.converted)

    def policy(all_sites: object) -> dict[str, str]:
        return {name: "one" for name in sites if not name.startswith("fc")}

    with pytest.raises(ValueError, match=r"must name a block for every site, left out 4, first fc1\.weight"):
        find_blocks(sites.values(), policy)
