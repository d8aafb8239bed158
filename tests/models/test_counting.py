"""Parameters, active parameters and FLOPs of the released sizes are the published ones."""

import pytest

from lab_utils.errors import LabError
from lab_utils.models.load import describe
from lab_utils.models.presets import presets

RELEASED = {
    "pro": (1_572_997_179_491, 25_840_145_595, 48_852_379_747, 309.92e9),
    "flash": (284_332_230_231, 6_610_048_635, 13_270_091_351, 84.34e9),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_sizes_are_exact(name):
    total, mtp, active, flops = RELEASED[name]
    found = describe(f"preset:{name}")
    assert found["parameters"] == total
    assert found["parameters_mtp"] == mtp
    assert found["active_parameters"] == active
    assert found["flops_per_token"] == pytest.approx(flops, rel=0.005)
    assert sum(found["by_component"].values()) == total


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_described(name):
    found = describe(f"preset:{name}")
    assert 0 < found["active_parameters"] < found["parameters"]


def test_an_unknown_model_is_answered_with_the_nearest_name():
    with pytest.raises(LabError, match="did you mean"):
        describe("preset:tinny")


def test_the_shipped_base_is_small():
    from lab_utils.models.load import checkpoint_folder

    folder = checkpoint_folder("base:tiny")
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) <= 12e6
    assert (folder / "README.md").exists() and (folder / "recipe.yaml").exists()
