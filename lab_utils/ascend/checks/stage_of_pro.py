"""One stage of V4-Pro on device npu: the twin's whole step of a middle rank of a thousand packages."""

from __future__ import annotations

from collections.abc import Iterator

ORDER = 50
RANKS = 2048
PROVES = {
    "stage_of_pro": f"the recipe v4_pro_sft, cut for {RANKS} devices, goes through a whole step of a middle rank on "
    "device npu at its real sizes, and fits the 64 GiB of a die"
}
CAPACITY_GIB = 64


def run() -> Iterator[tuple[str, bool, str]]:
    import torch_npu  # noqa: F401

    from lab_utils.engine.twin.run import step_of
    from lab_utils.recipe import Recipe

    recipe = Recipe.load("v4_pro_sft")
    twin = step_of(recipe, RANKS, 3 * RANKS // 4 + 1, device="npu")
    layers = " and ".join(f"{start}-{stop - 1}" for start, stop in twin.layers)
    found = (
        f"rank {twin.rank}, layers {layers}: {twin.calls} operators, {len(twin.collectives)} collectives, "
        f"{twin.flops / 1e12:.1f} TFLOP, {twin.peak_gib:.1f} GiB at the peak"
    )
    yield "stage_of_pro", twin.peak_gib < CAPACITY_GIB, found
