"""The NPU-Exporter's page is read by its labels; what a product doesn't have is absent."""

import pytest

from lab_utils.telemetry.chips import aggregate
from lab_utils.telemetry.probes import _exporter, npu
from lab_utils.telemetry.wandb import open_metrics


def test_each_id_is_a_chip_in_the_order_of_numbers(page):
    found = _exporter.parse(page)
    assert [r.more["chip"] for r in found] == ["0", "1", "10"]
    first = found[0]
    assert (first.name, first.util, first.used_mib, first.total_mib) == ("910B3", 87.0, 61440.0, 65536.0)
    assert (first.power, first.temp, first.tx, first.rx) == (305.5, 51.0, 12.5, 12.25)
    assert first.more["health"] == "OK" and "error_code" not in first.more


def test_series_that_are_absent_stay_unknown(page):
    second, third = _exporter.parse(page)[1:]
    assert second.power is None and second.tx is None and second.more["health"] == "Unhealthy"
    assert second.more["error_code"] == "0x80E01801"
    assert third.util is None and third.more["health"] is None  # NaN, and -1
    metrics = aggregate(_exporter.parse(page))
    assert metrics["chip/unhealthy"] == 1.0 and metrics["chip/util_mean"] == pytest.approx((87 + 3) / 2)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("up 1", ("up", {}, 1.0)),
        ('a{id="0"} 2.5 1712345678000', ("a", {"id": "0"}, 2.5)),
        ('a{x="say \\"hi\\", ok",y="1\\\\2"} 1e3', ("a", {"x": 'say "hi", ok', "y": "1\\2"}, 1000.0)),
        ("# TYPE a gauge", None),
        ("", None),
        ("a{ nonsense", None),
        ("a NaN", None),
    ],
)
def test_lines_of_the_format(line, expected):
    assert list(_exporter.series(line)) == ([] if expected is None else [expected])


def test_the_probe_asks_the_exporter_that_the_environment_names(exporter, monkeypatch):
    monkeypatch.setenv("ASCENT_NPU_EXPORTER", exporter.url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy knows no ports of a node
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    probe = npu.make(2)
    assert probe.min_interval == 1.0
    assert [r.power for r in probe.read()] == [305.5, None]
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,0")
    assert [r.more["chip"] for r in npu.make(None).read()] == ["10", "0"]


def test_an_exporter_of_this_node_is_found(exporter, page, monkeypatch):
    monkeypatch.delenv("ASCENT_NPU_EXPORTER", raising=False)
    monkeypatch.setattr(_exporter, "LOCAL", exporter.url)
    assert npu.make(None).exporter == exporter.url
    exporter.page = "some_other_series 1\n"
    assert npu.make(None).exporter is None
    monkeypatch.setenv("ASCENT_NPU_EXPORTER", "off")
    exporter.page = page
    assert npu.make(None).exporter is None


def test_a_page_without_chips_is_said(exporter):
    exporter.page = "up 1\n"
    with pytest.raises(RuntimeError, match="ASCENT_NPU_EXPORTER"):
        npu.NpuProbe(None, exporter=exporter.url).read()


def test_wandb_reads_each_chip_under_a_name_of_its_own(exporter, monkeypatch, capsys):
    monkeypatch.setenv("ASCENT_NPU_EXPORTER", exporter.url)
    found = open_metrics("npu")
    assert found["x_stats_open_metrics_endpoints"] == {f"npu{i}": exporter.url for i in (0, 1, 10)}
    assert found["x_stats_open_metrics_filters"]["npu1.npu_chip_info_.*"] == {"id": "^1$"}
    monkeypatch.setenv("ASCENT_NPU_EXPORTER", "http://127.0.0.1:9/metrics")
    assert open_metrics("npu") == {} and "the run goes on" in capsys.readouterr().err
    monkeypatch.delenv("ASCENT_NPU_EXPORTER")
    assert open_metrics("cpu") == {}
