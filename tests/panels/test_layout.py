"""The dashboard's layout names only metrics that exist, and every section is a known one."""

from lab_utils.panels.layout import ALIGNMENT, OVERVIEW, PANELS, SECTIONS
from lab_utils.telemetry.names import lookup


def test_every_metric_on_a_panel_is_defined():
    undefined = [key for panel in PANELS for key in panel.keys if lookup(key) is None]
    assert undefined == []


def test_titles_are_unique_and_sections_known():
    titles = [panel.title for panel in PANELS]
    assert len(set(titles)) == len(titles)
    assert {panel.section for panel in PANELS} <= set(SECTIONS)
    for page in (OVERVIEW, *ALIGNMENT.values()):
        assert set(page) <= set(titles) and len(page) % 3 == 0
