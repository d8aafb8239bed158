"""Clusters: every figure has its source, one file adds one, and a mistake is named."""

import copy

import pytest
import yaml

from lab_utils.errors import LayoutError, RecipeError
from lab_utils.planner import measure
from lab_utils.planner.cluster import SHIPPED, Cluster, Curve, Figure, find, known, read
from lab_utils.planner.network import Group, all_to_all, plane_of, ring

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@pytest.fixture
def tree():
    return yaml.safe_load((SHIPPED / "ascend-910c.yaml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_cluster_is_whole_and_says_where_each_figure_is_from(name):
    cluster = find(name)
    assert cluster.name == name

    def figures(node):
        if isinstance(node, Figure | Curve):
            yield node
        elif hasattr(node, "model_fields_set"):
            for field in type(node).model_fields:
                yield from figures(getattr(node, field))
        elif isinstance(node, tuple):
            for each in node:
                yield from figures(each)

    found = list(figures(cluster))
    assert len(found) > 15 and all(len(figure.source) > 3 for figure in found)


def test_the_910c_is_packages_of_two_dies_in_superpods_of_384():
    cluster = find("ascend-910c")
    assert cluster.devices(1024) == 2048 and cluster.nodes(1024) == (128, 16)
    assert cluster.planes[0].devices == 384 * 2 and cluster.device.memory_gib.value == 64
    assert 2 * cluster.device.tflops.value == 752


def test_a_user_adds_one_file(tmp_path, tree, monkeypatch):
    tree["name"] = "mine"
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "mine.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path))
    assert "mine" in known() and find("mine").name == "mine"
    assert find(tmp_path / "clusters" / "mine.yaml") == find("mine")


def test_a_site_has_its_clusters_beside_its_file(tmp_path, tree, monkeypatch):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "hall.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("ASCENT_SITE", str(tmp_path / "site.yaml"))
    assert "hall" in known()


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (
            ("device", "memory_gb"),
            {"value": 1, "source": "data"},
            "'device.memory_gb' is no key of a cluster, did you mean",
        ),
        (
            ("planes", 0, "gbs"),
            {"value": 1, "source": "data"},
            "'planes.0.gbs' is no key of a cluster, did you mean 'gb_s'",
        ),
        (("device", "tflops"), {"value": 1}, "'device.tflops.source' is missing"),
        (("device", "tflops"), {"value": -1, "source": "data"}, "device.tflops.value"),
        (("efficiency", "memory"), {"value": 0.5, "low": 0.6, "source": "data"}, "must rise"),
        (("planes", 1, "devices"), 5, "the last all"),
        (("kind",), "gpu", "kind"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_that_names_the_key(tmp_path, tree, where, value, says):
    node = tree
    for part in where[:-1]:
        node = node[part]
    node[where[-1]] = value
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError) as error:
        read(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_cluster_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'ascend-910c'"):
        find("ascend-910cc")


def test_a_machine_not_measured_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match="lab doctor --measure"):
        find("local")


def test_chips_come_in_whole_nodes():
    with pytest.raises(LayoutError, match="use 8 or 16"):
        find("ascend-910c").devices(12)
    assert find("ascend-910c").devices(4) == 8


def test_what_was_measured_becomes_a_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path))
    found = {
        "date": "2026-11-25",
        "cores": 2,
        "memory": 24 << 30,
        "products": {64: 2e10, 256: 8e10, 1024: 1e11},
        "attention": 3e10,
        "streams": {2**18: 6e10, 2**26: 1.2e10},
        "disk": 4e8,
        "resident": 450 << 20,
        "message": 9e8,
        "exchange": 1.5e9,
        "latency": 8e-5,
    }
    cluster = find(measure.write(found))
    assert cluster == find("local") and cluster.kind == "cpu" and cluster.devices_per_node == 2
    assert cluster.device.tflops.value == pytest.approx(0.1) and cluster.efficiency.products.at(
        64
    ) == pytest.approx(0.2)
    assert cluster.efficiency.attention.value == pytest.approx(0.3)
    assert cluster.device.bandwidth_tb_s.value == pytest.approx(0.012)
    assert (
        cluster.efficiency.caches.at(2**18) == pytest.approx(5.0)
        and cluster.efficiency.caches.at(2**30) == 1.0
    )


def test_a_curve_holds_its_points_and_rises_between_them():
    curve = Curve(points={1024: 0.2, 4096: 0.8}, source="data")
    assert curve.at(1024) == 0.2 and curve.at(4096) == 0.8 == curve.at(1e6)
    assert curve.at(2048) == pytest.approx(0.5) and curve.at(512) == pytest.approx(0.1)


def test_a_group_inside_a_superpod_stays_on_its_plane_and_one_across_does_not():
    cluster = find("ascend-910c")
    inside, across = Group(128, 128, 128, 2048), Group(1024, 1024, 1024, 2048)
    assert plane_of(cluster, inside).name == "UB" and plane_of(cluster, across).name == "RoCE"
    odd = Group(80, 80, 80, 2048)  # 768 is no multiple of 80: some group is cut
    assert plane_of(cluster, odd).name == "RoCE"
    assert all_to_all(cluster, odd, 1e9, "expected") > 2 * all_to_all(
        cluster, Group(64, 64, 64, 2048), 1e9, "expected"
    )


def test_an_all_reduce_costs_two_halves_and_more_over_the_slow_plane():
    cluster = find("ascend-910c")
    near, far = Group(64, 64, 64, 64), Group(64, 128, 1, 8192)
    assert ring(cluster, near, 1e9, "expected", both_ways=True) == 2 * ring(cluster, near, 1e9, "expected")
    assert ring(cluster, far, 1e9, "expected") > ring(cluster, near, 1e9, "expected")
    assert ring(cluster, Group(1), 1e9, "expected") == 0


def test_low_is_never_faster_than_high():
    cluster = find("ascend-910c")
    for figure in ("sustained", "attention", "memory", "network"):
        share = getattr(cluster.efficiency, figure)
        assert share.of("low") <= share.of("expected") <= share.of("high")
    changed = copy.deepcopy(cluster.model_dump())
    assert Cluster.model_validate(changed) == cluster
