"""The figures of tasks at this node."""

from collections.abc import Callable
from typing import Final

from meshnode.kernel.metrics import MetricKind, Metrics, MetricSpec
from meshnode.tasks.model import TaskSubmitted, TaskUpdated
from protocol.ids import NodeId

TASK_METRICS: Final[tuple[MetricSpec, ...]] = (
    MetricSpec("meshnode_tasks_submitted_total", MetricKind.COUNTER, "Tasks submitted on this node."),
    MetricSpec(
        "meshnode_tasks_ended_total",
        MetricKind.COUNTER,
        "Tasks that were submitted on this node and ended.",
        ("status",),
    ),
    MetricSpec("meshnode_tasks_known", MetricKind.GAUGE, "Tasks of the mesh that this node knows of."),
    MetricSpec("meshnode_tasks_running", MetricKind.GAUGE, "Attempts at tasks that run on this node."),
    MetricSpec("meshnode_tasks_queued", MetricKind.GAUGE, "Tasks in the queue, where this node coordinates."),
)
_ENDED: Final = frozenset({"completed", "failed", "cancelled", "lost"})


class Figures:
    """Counts what the bus is told. The gauges are read when somebody looks."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        me: NodeId,
        known: Callable[[], int],
        running: Callable[[], int],
        queued: Callable[[], int],
    ) -> None:
        self._metrics = metrics
        self._me = me
        metrics.track("meshnode_tasks_known", lambda: float(known()))
        metrics.track("meshnode_tasks_running", lambda: float(running()))
        metrics.track("meshnode_tasks_queued", lambda: float(queued()))

    def heard(self, event: object) -> None:
        """One event of tasks."""
        if not isinstance(event, TaskSubmitted | TaskUpdated) or event.task.submitter != self._me:
            return
        if isinstance(event, TaskSubmitted):
            self._metrics.count("meshnode_tasks_submitted_total")
        if event.task.status in _ENDED:
            self._metrics.count("meshnode_tasks_ended_total", status=event.task.status)
