"""What a site says of itself, and which of its cabinets a run's nodes stand in."""

import pytest

from lab_utils.errors import RecipeError
from lab_utils.runs import site

GROUPS = {"A01": ("npu-00[1-8]",), "A02": ("npu-009", "npu-01*"), "B": ("npu-1[0-9][0-9]",)}


@pytest.mark.parametrize(
    "nodes, found",
    [
        (["npu-001", "npu-008"], ["A01"]),
        (["npu-012.hall.example", "npu-003"], ["A01", "A02"]),
        (["npu-150"], ["B"]),
        (["npu-001", "elsewhere"], None),  # one unknown node: no number is better than a wrong one
        ([], None),
    ],
)
def test_nodes_are_found_in_their_cabinets(nodes, found):
    assert site.places(GROUPS, nodes) == found


def test_a_site_without_cabinets_counts_none():
    assert site.places({}, ["npu-001"]) is None


def test_a_description_is_read_and_copied_without_what_it_leaves_out(tmp_path, monkeypatch):
    path = tmp_path / "site.yaml"
    path.write_text("name: hall 2\nfabric: HCCS\ncabinets: {A01: ['npu-*']}\n")
    monkeypatch.setenv("ASCENT_SITE", str(path))
    assert site.of_environment() == {"name": "hall 2", "fabric": "HCCS", "cabinets": {"A01": ["npu-*"]}}
    monkeypatch.delenv("ASCENT_SITE")
    assert site.of_environment() is None


@pytest.mark.parametrize(
    "content, word",
    [("fabricc: x\n", "fabricc"), ("a: [\n", "YAML"), ("cabinets: 3\n", "cabinets"), (None, "No such file")],
)
def test_a_description_that_is_wrong_is_one_sentence_and_stops_no_launch(
    tmp_path, monkeypatch, content, word
):
    path = tmp_path / "site.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=word) as raised:
        site.read(path)
    assert "a site's keys are" in str(raised.value)
    monkeypatch.setenv("ASCENT_SITE", str(path))
    assert word in site.of_environment()["problem"]
