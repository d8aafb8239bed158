"""Figures draw what they are given, say so where a metric is missing, and can be saved."""

import numpy as np
import pandas as pd
import pytest

from lab_utils.panels import figures
from lab_utils.panels.layout import OVERVIEW, PANELS


@pytest.fixture
def metrics() -> pd.DataFrame:
    steps = np.arange(1, 61)
    frame = pd.DataFrame(
        {key: np.linspace(0.1, 1.0, 60) for panel in PANELS for key in panel.keys}, index=steps
    )
    frame["eval/loss"] = np.where(steps % 20 == 0, 0.5, np.nan)
    return frame


def test_the_overview_has_its_panels_with_titles_and_units(metrics, tmp_path):
    figure = figures.overview(metrics, title="a run")
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(OVERVIEW)
    assert all(ax.get_ylabel() for ax in figure.axes)
    figure.savefig(tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size > 20_000


def test_a_missing_metric_is_said_not_drawn(metrics):
    figure = figures.overview(metrics.drop(columns="train/indexer_kl"))
    ax = next(a for a in figure.axes if a.get_title(loc="left") == "Indexer KL loss")
    assert "not logged" in ax.texts[0].get_text() and not ax.lines


def test_shares_are_drawn_in_percent(metrics):
    panel = next(p for p in PANELS if p.title == "Token accuracy")
    _figure, axes = figures._canvas(1, 1, 4, 3)
    figures.draw_panel(axes[0, 0], metrics, panel)
    assert axes[0, 0].lines[-1].get_ydata().max() > 50


def test_packed_rows_tell_documents_padding_and_loss_apart():
    documents = np.array([[0, 0, 1, 1, -1]])
    figure = figures.packed_rows(documents, np.array([[0, 1, 0, 1, 0]]))
    image = figure.axes[0].images[0].get_array()[0]
    assert (image[4] == 1).all()
    assert not np.allclose(image[0], image[2]) and not np.allclose(image[0], image[1])
    assert "2 documents" in figure.axes[0].get_title(loc="left") and "20.0 %" in figure.axes[0].get_title(
        loc="left"
    )


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.1.self_attn.compressor.indexer.q_b_proj.weight", "indexer"),
        ("model.layers.1.self_attn.compressor.kv_proj.weight", "compressor"),
        ("model.layers.0.mlp.experts.gate_up_proj", "routed experts"),
        ("model.layers.0.attn_hc.fn", "hyper-connections"),
        ("model.layers.0.self_attn.q_a_norm.weight", "norms"),
        ("lm_head.weight", "head"),
    ],
)
def test_tensors_are_grouped_by_component(name, part):
    assert figures.component_of(name) == part
