"""Pictures show the numbers of their plan."""

import pytest

from lab_utils.planner import pictures
from lab_utils.planner.plan import plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flash():
    return plan("v4_flash_sft", "ascend-910c", 128)


def test_a_stack_is_as_high_as_its_stage_needs(flash):
    ax = pictures.memory_stack(flash).axes[0]
    tops: dict[float, float] = {}
    for bar in ax.patches:
        middle = round(bar.get_x() + bar.get_width() / 2)
        tops[middle] = max(tops.get(middle, 0.0), bar.get_y() + bar.get_height())
    peaks = [stage.peak for stage in flash.best.stages]
    assert [tops[i] for i in range(len(peaks))] == pytest.approx(peaks, abs=0.2)


def test_a_waterfall_ends_at_the_step(flash):
    bars = pictures.step_waterfall(flash).axes[0].patches
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert ends[-1] == pytest.approx(flash.best.time.seconds) == pytest.approx(ends[-2])
    assert all(bar.get_width() >= 0 for bar in bars)


def test_a_curve_leaves_out_what_does_not_fit(flash):
    points = pictures.scaling_points(flash, (8, 128))
    assert points[0]["tokens_per_s"] is None and points[1]["mfu"] == pytest.approx(flash.best.time.mfu)
    figure = pictures.scaling(flash, (8, 128))
    assert "none without offload on 8" in figure._suptitle.get_text()


def test_where_nothing_fits_the_picture_says_so():
    nothing = plan("v4_pro_sft", "ascend-910c", 64)
    text = pictures.memory_stack(nothing).axes[0].texts[0].get_text()
    assert "GiB" in text
