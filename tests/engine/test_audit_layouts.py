"""Under every layout of four ranks, training changes every tensor: multi-token prediction, indexer and all experts."""

from __future__ import annotations

from typing import Any

import pytest
from feed_jobs import few, worked
from small_v4 import write_source

from lab_utils.engine.audit import audit
from lab_utils.planner.layouts import layout_names

pytestmark = pytest.mark.slow
LAYOUTS = layout_names(4)
KINDS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]


@pytest.fixture(scope="module")
def audits(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("audits")
    source = write_source(
        root / "small",
        num_hidden_layers=8,  # two a virtual stage of the deepest pipeline
        layer_types=[KINDS[i % 3] for i in range(8)],
        mlp_layer_types=["hash_moe"] + ["moe"] * 7,
        num_nextn_predict_layers=1,
    )
    (root / "data").mkdir()
    # Enough rows that every expert gets tokens, in every layer.
    tree: dict[str, Any] = {
        "model": {"source": source, "mtp_loss": 0.3, "balance_rate": 0.001},
        "data": {"train": [few(root / "data", "ascent-tasks-sft", 200)], "row_tokens": 512},
        "optim": {"kind": "muon", "lr": 1e-3},
        "schedule": {"steps": 2, "batch_tokens": 8192, "micro_rows": 1, "warmup_steps": 0},
    }
    trees = {}
    for name, changes in LAYOUTS.items():
        parallel = {key.removeprefix("parallel."): value for key, value in changes.items()}
        trees[name] = {**tree, "parallel": parallel}
    return {name: audit(run) for name, run in worked(root / "runs", trees, ranks=4).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_changes(audits, layout):
    found = audits[layout]
    assert found["unchanged"] == []
    assert found["indexer_changed"]
    assert found["tensors"] == audits["dp4_ep1_pp1"]["tensors"] == found["changed"]
    assert any(row["name"].startswith("mtp.0.") for row in found["by_tensor"])
