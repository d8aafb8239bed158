"""Which tensor goes to which optimizer, and the matrices inside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config, small_model
from torch import nn
from transformers import Qwen3Config

from lab_utils.models.presets import preset
from lab_utils.optim.groups import MatrixView, matrices, parameter_groups
from lab_utils.optim.table import assignment_table, shapes_of, totals
from lab_utils.recipe import OptimSection

MUON = OptimSection(kind="muon", weight_decay=0.1)
PRO = preset("pro")


def sizes(name: str, shape: tuple[int, ...], config=PRO) -> list[tuple[int, int]] | None:
    views = matrices(name, shape, config)
    return None if views is None else [(view.rows, view.cols) for view in views]


def covers(name: str, shape: tuple[int, ...], config) -> bool:
    """The matrices follow one another from the first element to the last."""
    at = 0
    for view in matrices(name, shape, config) or [MatrixView(0, 1, math.prod(shape))]:
        if view.start != at or view.rows < 1 or (view.rows > 1 and view.cols != shape[-1]):
            return False
        at += view.rows * view.cols
    return at == math.prod(shape)


@pytest.mark.parametrize("name", ["tiny", "mini", "pro"])
def test_the_matrices_of_a_preset_cover_each_parameter_once(name):
    config = preset(name)
    for parameter, shape in shapes_of(config, mtp=True):
        assert covers(parameter, shape, config), parameter


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([2, 4, 8]),
    groups=st.sampled_from([1, 2]),
    experts=st.integers(2, 5),
    streams=st.integers(1, 5),
    index_width=st.sampled_from([8, 16]),  # 16 is also the width of a head
    hidden=st.sampled_from([16, 32]),
)
def test_the_matrices_of_any_configuration_cover_each_parameter_once(
    heads, groups, experts, streams, index_width, hidden
):
    config = small_config(
        num_attention_heads=heads,
        o_groups=groups,
        n_routed_experts=experts,
        hc_mult=streams,
        index_head_dim=index_width,
        hidden_size=hidden,
    )
    for name, shape in shapes_of(config):
        assert covers(name, shape, config), name
        if name.endswith("o_a_proj.weight"):
            assert len(sizes(name, shape, config)) == groups
        if name.endswith("_hc.fn"):
            n, wide = streams, streams * hidden
            assert sizes(name, shape, config) == [(n, wide), (n, wide), (n * n, wide)]


L = "model.layers.7."
ATTENTION = L + "self_attn."


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        (ATTENTION + "q_a_proj.weight", (1536, 7168), [(1536, 7168)]),
        (ATTENTION + "q_b_proj.weight", (65536, 1536), [(65536, 1536)]),
        (ATTENTION + "kv_proj.weight", (512, 7168), [(512, 7168)]),
        (ATTENTION + "o_a_proj.weight", (16384, 4096), [(1024, 4096)] * 16),
        (ATTENTION + "o_b_proj.weight", (7168, 16384), [(7168, 16384)]),
        (ATTENTION + "compressor.kv_proj.weight", (1024, 7168), [(512, 7168)] * 2),  # CSA
        (ATTENTION + "compressor.gate_proj.weight", (512, 7168), [(512, 7168)]),  # HCA
        (ATTENTION + "compressor.indexer.gate_proj.weight", (256, 7168), [(128, 7168)] * 2),
        (ATTENTION + "compressor.indexer.q_b_proj.weight", (8192, 1536), [(8192, 1536)]),
        (ATTENTION + "compressor.indexer.scorer.weights_proj.weight", (64, 7168), [(64, 7168)]),
        (L + "mlp.gate.weight", (384, 7168), [(384, 7168)]),
        (L + "mlp.experts.gate_up_proj", (384, 6144, 7168), [(3072, 7168)] * 768),
        (L + "mlp.experts.down_proj", (384, 7168, 3072), [(7168, 3072)] * 384),
        (L + "mlp.experts.gate_up_proj", (3, 6144, 7168), [(3072, 7168)] * 6),  # one rank's share
        (L + "mlp.shared_experts.gate_proj.weight", (3072, 7168), [(3072, 7168)]),
        (L + "attn_hc.fn", (24, 28672), [(4, 28672), (4, 28672), (16, 28672)]),
        ("model.hc_head.hc_fn", (4, 28672), [(4, 28672)]),
        ("mtp.0.e_proj.weight", (7168, 7168), [(7168, 7168)]),
        ("mtp.0.h_proj.weight", (7168, 7168), [(7168, 7168)]),
        ("mtp.0.self_attn.o_a_proj.weight", (16384, 4096), [(1024, 4096)] * 16),
        ("mtp.0.hc_head.hc_fn", (4, 28672), [(4, 28672)]),
    ],
)
def test_matrices_of_deepseek_v4(name, shape, expected):
    assert sizes(name, shape) == expected
    assert covers(name, shape, PRO)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.embed_tokens.weight", (129280, 7168)),
        ("lm_head.weight", (129280, 7168)),
        ("mtp.0.embed_tokens.weight", (129280, 7168)),
        ("mtp.0.head.weight", (129280, 7168)),
        ("mtp.0.enorm.weight", (7168,)),
        (L + "input_layernorm.weight", (7168,)),
        (L + "attn_hc.base", (24,)),
        (L + "ffn_hc.scale", (3,)),
        (ATTENTION + "sinks", (128,)),
        (ATTENTION + "compressor.position_bias", (4, 1024)),
        (ATTENTION + "compressor.indexer.position_bias", (4, 256)),
    ],
)
def test_what_adamw_keeps(name, shape):
    assert matrices(name, shape, PRO) is None


def test_experts_are_whole_whichever_share_of_them_a_rank_holds():
    name, whole = L + "mlp.experts.gate_up_proj", matrices(L + "mlp.experts.gate_up_proj", (8, 12, 5), PRO)
    parts = [matrices(name, (2, 12, 5), PRO) for _ in range(4)]
    moved = [
        MatrixView(v.start + 2 * 12 * 5 * i, v.rows, v.cols) for i, part in enumerate(parts) for v in part
    ]
    assert moved == whole


def test_a_shape_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match=r"o_a_proj.*16383 rows"):
        matrices(ATTENTION + "o_a_proj.weight", (16383, 4096), PRO)
    with pytest.raises(ValueError, match=r"kv_proj"):
        matrices(ATTENTION + "compressor.kv_proj.weight", (700, 7168), PRO)
    with pytest.raises(ValueError, match=r"fn"):
        matrices(L + "attn_hc.fn", (23, 28672), PRO)


def test_any_other_model_gives_every_matrix_but_embedding_and_head():
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=8,
    )
    table = assignment_table(shapes_of(config), config, MUON)
    muon = {row["name"].split(".")[-2] for row in table if row["algorithm"] == "muon"}
    assert muon == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sizes("transformer.h.0.attn.c_attn.weight", (32, 96), None) == [(32, 96)]
    assert sizes("model.layers.0.mlp.experts.gate_up_proj", (4, 96, 32), config) == [(96, 32)] * 4
    for name in ("transformer.wte.weight", "gpt_neox.embed_out.weight", "lm_head.weight"):
        assert matrices(name, (50, 32)) is None
    assert matrices("decoder.projection.weight", (97, 32), config) is None  # by its shape, the vocabulary
    assert matrices("backbone.layers.0.mixer.conv1d.weight", (64, 1, 4)) is None


def test_groups_say_algorithm_and_decay():
    model = small_model()
    groups = parameter_groups(model, MUON)
    assert [(g["algorithm"], g["weight_decay"]) for g in groups] == [
        ("muon", 0.1),
        ("adamw", 0.1),
        ("adamw", 0.0),
    ]
    named = dict(model.named_parameters())
    found = {name: p for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    assert found.keys() == named.keys() and all(found[name] is named[name] for name in named)
    assert all(p.ndim == 1 for p in groups[2]["params"])
    assert {name.rsplit(".", 1)[-1] for name in groups[1]["names"]} == {"weight", "position_bias"}
    adamw = parameter_groups(model, OptimSection(weight_decay=0.1))
    assert [(g["algorithm"], g["weight_decay"]) for g in adamw] == [("adamw", 0.1), ("adamw", 0.0)]


def test_a_bias_and_a_frozen_matrix_are_not_trained_by_muon():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    groups = parameter_groups(model, MUON)
    assert [(g["algorithm"], g["names"]) for g in groups] == [
        ("muon", ["0.weight"]),
        ("adamw", ["0.bias", "1.bias"]),
    ]


def test_the_table_of_pro_has_every_parameter():
    table = assignment_table(shapes_of(PRO), PRO, MUON)
    found = totals(table)
    assert (
        found["muon"] + found["adamw"] >= 1_572_997_179_491
    )  # the released count, without multi-token prediction
    assert found["state_bytes"] == 4 * found["muon"] + 8 * found["adamw"]
    rows = {(row["name"], tuple(row["shape"])): row for row in table}
    experts = rows["model.layers.*.mlp.experts.gate_up_proj", (3072, 7168)]
    assert experts["count"] == 61 * 384 * 2 and experts["algorithm"] == "muon"
    assert rows["model.layers.*.self_attn.compressor.kv_proj.weight", (512, 7168)]["count"] == 2 * 30 + 31
    assert all(row["parameters"] == row["count"] * math.prod(row["shape"]) for row in table)


def test_the_table_of_a_model_is_that_of_its_configuration():
    model = small_model()
    table = assignment_table(model, model.config, MUON)
    assert table == assignment_table(shapes_of(model.config), model.config, MUON)
    assert sum(row["parameters"] for row in table) == sum(p.numel() for p in model.parameters())
    assert {row["algorithm"] for row in assignment_table(model, model.config, OptimSection())} == {"adamw"}


def test_shapes_are_those_of_the_model_and_leave_the_default_device():
    assert [name for name, _ in shapes_of(small_config())] == [n for n, _ in small_model().named_parameters()]
    assert torch.empty(1).device.type == "cpu"


def test_the_page_shows_the_table_of_tiny():
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    config = preset("tiny")
    for row in assignment_table(shapes_of(config), config, MUON):
        if len(row["shape"]) > 1:
            name = row["name"].removeprefix("model.layers.*.").removesuffix(".weight")
            shape = " × ".join(map(str, row["shape"]))
            line = f"| {name} | {row['algorithm']} | {shape} | {row['count']} | {row['parameters']:,} |"
            assert line in page, line


def test_the_command_prints_the_table():
    from typer.testing import CliRunner

    from lab_utils.models.commands import app

    printed = CliRunner().invoke(app, ["optimizer", "tiny", "--json"])
    assert printed.exit_code == 0
    found = json.loads(printed.stdout)
    config = preset("tiny")
    assert found["rows"] == assignment_table(
        shapes_of(config), config, MUON.model_copy(update={"weight_decay": 0.0})
    )
    assert found["muon"] == sum(r["parameters"] for r in found["rows"] if r["algorithm"] == "muon")
    assert "q_b_proj" in CliRunner().invoke(app, ["optimizer", "tiny", "--mtp"]).stdout
