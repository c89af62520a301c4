"""The figures this agent keeps about itself: one table says which there are, one object holds them.

Its job is counting and rendering, as Prometheus text and as JSON. It leaves to the services what to count; a
subsystem with figures of its own hands its `MetricSpec`s to the constructor. A name that is in no table is a
programming error and raises KeyError at the first use.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

label_sets_max: Final = 512


class MetricKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One figure: its name, what kind it is, what it means, its labels and, for a histogram, its bounds."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_C, _G, _H = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM

KERNEL_METRICS: Final[tuple[MetricSpec, ...]] = (
    MetricSpec("fabric_uptime_seconds", _G, "Seconds since this agent started."),
    MetricSpec("fabric_nodes_online", _G, "Members this node sees online, itself included."),
    MetricSpec("fabric_node_evictions_total", _C, "Members evicted, as applied by this node."),
    MetricSpec("meshnode_nodes_left_total", _C, "Members that left the mesh by themselves, as applied by this node."),
    MetricSpec("fabric_peer_messages_total", _C, "Messages received from peers and accepted."),
    MetricSpec("fabric_panics_total", _C, "Unexpected errors caught at a boundary; each has a record in the log."),
    MetricSpec("fabric_wal_entries_total", _C, "Acknowledged writes to the database."),
    MetricSpec("fabric_wal_checkpoints_total", _C, "Checkpoints of the database's write-ahead log."),
    MetricSpec("meshnode_peer_messages_refused_total", _C, "Messages from the network that were dropped.", ("reason",)),
    MetricSpec("meshnode_peer_bytes_total", _C, "Bytes exchanged with peers.", ("transport", "direction")),
    MetricSpec("meshnode_links_open", _G, "Mutual TLS links that are open."),
    MetricSpec("meshnode_service_restarts_total", _C, "Services started again after a failure.", ("service",)),
    MetricSpec("meshnode_log_records_lost", _G, "Log records that could not be written."),
    MetricSpec("meshnode_bus_subscribers", _G, "Observers of the event bus."),
    MetricSpec("meshnode_bus_events", _G, "Events published on the bus since the start."),
    MetricSpec("meshnode_api_requests_total", _C, "Answers of the local API.", ("status",)),
    MetricSpec("meshnode_api_request_seconds", _H, "Time to the first byte of an answer.", (), _SECONDS),
    MetricSpec("meshnode_api_refused_total", _C, "Requests the guard refused.", ("reason",)),
    MetricSpec("meshnode_api_connections_open", _G, "Connections to the local API that are open."),
    MetricSpec("meshnode_api_connections_failed_total", _C, "Connections that ended by an error of their own."),
    MetricSpec("meshnode_api_connections_cut_total", _C, "Connections cut at a deadline or limit.", ("reason",)),
    MetricSpec("meshnode_api_streams_open", _G, "Event streams that are open."),
    MetricSpec("meshnode_api_streams_dropped_total", _C, "Event streams ended because the reader fell behind."),
)
"""Names that begin with `fabric_` are those other clients of this kind of system already know."""


class Metrics:
    """Holds every figure of the agent. Constructed once and handed to whoever counts; nothing about it is global.

    Labels must come from small closed sets; past `label_sets_max` combinations of one figure, further ones are
    counted under the label value `other`, so that no caller can make the agent's memory grow.
    """

    def __init__(self, specs: Iterable[MetricSpec] = KERNEL_METRICS) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._specs: dict[str, MetricSpec] = {}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._label_sets: dict[str, set[tuple[str, ...]]] = {}
        for spec in specs:
            self._add(spec)

    def _add(self, spec: MetricSpec) -> None:
        if spec.name in self._specs:
            raise ValueError(f"two figures are named {spec.name}")
        self._specs[spec.name] = spec
        match spec.kind:
            case MetricKind.COUNTER:
                self._counters[spec.name] = Counter(spec.name, spec.help, spec.labels, registry=self._registry)
            case MetricKind.GAUGE:
                self._gauges[spec.name] = Gauge(spec.name, spec.help, spec.labels, registry=self._registry)
            case MetricKind.HISTOGRAM:
                self._histograms[spec.name] = Histogram(
                    spec.name, spec.help, spec.labels, registry=self._registry, buckets=spec.bounds or _SECONDS
                )

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """Every figure there is, in the order of the tables."""
        return tuple(self._specs.values())

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add `amount` to a counter."""
        counter = self._counters[name]
        (counter.labels(*self._label_values(name, labels)) if labels else counter).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(*self._label_values(name, labels)) if labels else gauge).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram, in the unit its name says."""
        histogram = self._histograms[name]
        (histogram.labels(*self._label_values(name, labels)) if labels else histogram).observe(value)

    def track(self, name: str, read: Callable[[], float]) -> None:
        """Let a gauge without labels be read from `read` whenever the figures are rendered; `read` must not block."""
        self._gauges[name].set_function(read)

    def _label_values(self, name: str, labels: dict[str, str]) -> tuple[str, ...]:
        values = tuple(labels[label] for label in self._specs[name].labels)
        seen = self._label_sets.setdefault(name, set())
        if values not in seen:
            if len(seen) >= label_sets_max:
                return ("other",) * len(values)
            seen.add(values)
        return values

    def text(self) -> bytes:
        """Every figure in Prometheus' text format, version 0.0.4."""
        # The registry's own type asks for more than generate_latest uses, which is `collect` alone.
        return generate_latest(cast(CollectorRegistry, _WithoutCreated(self._registry)))

    def as_json(self) -> dict[str, object]:
        """Every figure as a flat map: a number; with labels, a map from the label values, joined by a comma, to
        the number; for a histogram, its `count` and `sum`. A figure with labels nobody counted yet is `{}`.
        """
        figures: dict[str, object] = {}
        for family in _WithoutCreated(self._registry).collect():
            spec = self._specs.get(family.name) or self._specs[f"{family.name}_total"]
            if spec.kind is MetricKind.HISTOGRAM:
                figures[spec.name] = _histogram_json(family, labelled=bool(spec.labels))
            elif spec.labels:
                figures[spec.name] = {
                    ",".join(sample.labels[label] for label in spec.labels): _number(sample.value)
                    for sample in family.samples
                }
            else:
                figures[spec.name] = _number(family.samples[0].value)
        return figures


class _WithoutCreated:
    """The families of a registry without the `_created` samples, which double the text and say nothing here."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _histogram_json(family: Metric, *, labelled: bool) -> dict[str, object]:
    figures: dict[str, object] = {}
    for sample in family.samples:
        part = "count" if sample.name.endswith("_count") else "sum" if sample.name.endswith("_sum") else None
        if part is not None:
            key = ",".join(sample.labels.values())
            if labelled:
                cast(dict[str, object], figures.setdefault(key, {}))[part] = _number(sample.value)
            else:
                figures[part] = _number(sample.value)
    return figures


def _number(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else value
