"""The table of figures, and both of its renderings."""

import pytest

from meshnode.kernel import metrics as metrics_module
from meshnode.kernel.metrics import KERNEL_METRICS, MetricKind, Metrics, MetricSpec


def test_both_renderings_show_every_figure_of_the_table() -> None:
    metrics = Metrics()
    text, figures = metrics.text().decode(), metrics.as_json()
    for spec in KERNEL_METRICS:
        assert spec.name in figures
        assert f"# TYPE {spec.name} {spec.kind.value}" in text
    assert set(figures) == {spec.name for spec in KERNEL_METRICS}
    assert "_created" not in text


def test_names_and_helps_are_in_order() -> None:
    names = [spec.name for spec in KERNEL_METRICS]
    assert len(set(names)) == len(names)
    for spec in KERNEL_METRICS:
        assert spec.name.startswith(("fabric_", "meshnode_"))
        assert spec.help.endswith(".")
        assert spec.name.endswith("_total") == (spec.kind is MetricKind.COUNTER), spec.name


def test_counting() -> None:
    metrics = Metrics()
    metrics.count("fabric_panics_total")
    metrics.count("fabric_panics_total", 2)
    metrics.count("meshnode_api_refused_total", reason="host")
    metrics.count("meshnode_peer_bytes_total", 10, direction="in", transport="udp")
    metrics.set("fabric_nodes_online", 5)
    metrics.observe("meshnode_api_request_seconds", 0.25)
    metrics.track("fabric_uptime_seconds", lambda: 1.5)
    figures = metrics.as_json()
    assert figures["fabric_panics_total"] == 3
    assert figures["meshnode_api_refused_total"] == {"host": 1}
    assert figures["meshnode_peer_bytes_total"] == {"udp,in": 10}
    assert figures["fabric_nodes_online"] == 5
    assert figures["meshnode_api_request_seconds"] == {"count": 1, "sum": 0.25}
    assert figures["fabric_uptime_seconds"] == 1.5
    assert 'meshnode_peer_bytes_total{direction="in",transport="udp"} 10.0' in metrics.text().decode()


def test_two_registries_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.count("fabric_panics_total")
    assert other.as_json()["fabric_panics_total"] == 0


def test_an_unknown_or_doubled_name_is_an_error() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.count("meshnode_no_such_total")
    with pytest.raises(ValueError, match="two figures"):
        Metrics([*KERNEL_METRICS, MetricSpec("fabric_nodes_online", MetricKind.GAUGE, "Again.")])


def test_labels_cannot_make_memory_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "label_sets_max", 3)
    metrics = Metrics()
    for number in range(100):
        metrics.count("meshnode_api_refused_total", reason=f"r{number}")
    assert metrics.as_json()["meshnode_api_refused_total"] == {"r0": 1, "r1": 1, "r2": 1, "other": 97}
