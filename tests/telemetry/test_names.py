"""One list of metrics stands behind everything that shows or describes them."""

import ast
import sys
from pathlib import Path

import pytest

from lab_utils.panels.layout import PANELS
from lab_utils.panels.layout import SECTIONS as PANEL_SECTIONS
from lab_utils.telemetry import names

ROOT = Path(__file__).resolve().parents[2]


def test_every_panel_draws_described_metrics():
    assert [key for panel in PANELS for key in panel.keys if names.lookup(key) is None] == []
    assert PANEL_SECTIONS == names.SECTIONS


def test_every_literal_key_that_the_engine_logs_is_described():
    """A key of a known family in the engine's or a model's source must be in names.py, whoever added it."""
    found = set()
    for folder in ("engine", "objectives", "models"):
        for path in (ROOT / "lab_utils" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    head, _, leaf = node.value.partition("/")
                    if head in ("train", "eval", "perf", "mem", "moe", "chip") and leaf and " " not in leaf:
                        found.add(node.value.rstrip("/"))
    unknown = sorted(key for key in found if "/" in key and names.lookup(key) is None)
    assert {"train/loss", "perf/tokens_per_s"} <= found
    assert [key for key in unknown if key != "perf/time"] == []


@pytest.mark.parametrize(
    "key",
    [
        "train/rewards/format/mean",
        "eval/entropy",
        "eval/rewards/chosen",
        "eval/teacher_kl/0",
        "eval/gsm8k/score",
        "train/indexer_kl",
    ],
)
def test_placeholders_and_eval_leaves_are_found(key):
    assert names.lookup(key) is not None


@pytest.mark.parametrize(
    "key", ["train/los", "eval/nothing", "eval/rewards/nothing", "loss", "train/rewards/a/b/mean"]
)
def test_an_undescribed_key_is_unknown(key):
    assert names.lookup(key) is None


def test_the_list_imports_only_the_standard_library():
    tree = ast.parse(Path(names.__file__).read_text(encoding="utf-8"))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules <= set(sys.stdlib_module_names)


def test_the_page_of_metrics_is_up_to_date_and_names_each_one():
    page = names.markdown()
    written = Path(names.__file__).parents[2] / "docs" / "metrics.md"
    assert written.read_text(encoding="utf-8").strip() == page.strip(), "make docs/metrics.md again"
    assert all(f"`{key}`" in page for key in names.METRICS)
    assert all(f"## {section}" in page for section in names.SECTIONS)
