"""A source may take the rows of some task families alone."""

from __future__ import annotations

import pytest

from lab_utils.data.columns import family_of
from lab_utils.data.documents import encoding_of
from lab_utils.data.loader import build_loader
from lab_utils.data.manifest import load_manifest
from lab_utils.data.pairs import load_pairs
from lab_utils.errors import DataError
from lab_utils.recipe import Recipe
from lab_utils.rollouts.prompts import build_prompts
from lab_utils.runs.checks import check_data

SFT = "ascent-tasks-sft"


def recipe(manifest: str, *families: str, **more) -> Recipe:
    source = {"manifest": manifest, "split": "validation", "families": list(families)}
    return Recipe.parse(
        {"name": "families", "model": {"source": "base:tiny"}, "data": {"train": [source]}, **more}
    )


def test_rows_are_those_of_the_families_in_their_order():
    whole = list(load_manifest(SFT).rows("validation"))
    some = list(load_manifest(SFT).only(("units", "tools")).rows("validation"))
    assert some == [row for row in whole if family_of(row) in ("units", "tools")]
    assert 0 < len(some) < len(whole)


def test_the_loader_and_its_store_hold_no_other_family():
    tokenizer = encoding_of(recipe(SFT)).tokenizer
    few = build_loader(recipe(SFT, "tools"), tokenizer, rank=0, world_size=1, train=True)
    whole = build_loader(recipe(SFT), tokenizer, rank=0, world_size=1, train=True)
    rows = [row for row in load_manifest(SFT).rows("validation") if family_of(row) == "tools"]
    assert sum(map(len, few._sources)) == len(rows) < sum(map(len, whole._sources))


def test_prompts_and_pairs_too():
    asked = recipe(
        "ascent-tasks-prompts", "tools", objective={"kind": "grpo"}, rollout={"prompts": 4, "group_size": 2}
    )
    encoding = encoding_of(asked)
    prompts = build_prompts(asked, encoding.tokenizer)
    assert {family_of(prompt.row) for prompt in prompts.take(40)} == {"tools"}
    manifest = load_manifest("ascent-tasks-preference")
    pairs = load_pairs(manifest.only(("units",)), "validation", encoding)
    assert len(pairs) == sum(family_of(row) == "units" for row in manifest.rows("validation"))


def test_an_unknown_family_is_refused_before_the_start_with_the_nearest():
    with pytest.raises(DataError, match=r"no row of family 'tool' in split validation: .*tools"):
        check_data(recipe(SFT, "tool"))
