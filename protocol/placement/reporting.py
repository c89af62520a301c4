"""What an executor tells its coordinator, and when: whole reports, one at a time, repeated, and at once on a change."""

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from protocol.effects import CancelTimer, SetTimer
from protocol.ids import NodeId
from protocol.placement.commands import ENDED_MAX, Ended, Lent, NodeReport, Running
from protocol.placement.executing_events import SendReport
from protocol.placement.matching import amounts_of

REPORT_S: Final = 2.0
REPORT_IDLE_S: Final = 20.0
REPORT_AGAIN_S: Final = 0.5
MOVED_SHARE: Final = 0.1
NEWS_MAX: Final = 4 * ENDED_MAX
REPORT_TIMER: Final = ("executing", "report")


class Reporting:
    """One node's reports of one boot."""

    def __init__(self, boot: int) -> None:
        self._boot = boot
        self._number = 0
        self._told = Lent()
        self._news: list[Ended] = []
        self._sent_news = 0
        self._to: NodeId | None = None
        self._has_more = False  # since the report that is under way
        self.lent = Lent()
        self.coordinator: NodeId | None = None

    @property
    def next_number(self) -> int:
        """Of the next report that is made."""
        return self._number + 1

    def ended(self, news: Ended) -> None:
        """To be told, until this coordinator has it; of too many the oldest are left to their records."""
        self._news.append(news)

    def has_moved(self) -> bool:
        """Whether what is lent differs so much from what was told that the coordinator should know at once."""
        old, new = self._told, self.lent
        if replace(new, capacity=old.capacity, busy_pm=old.busy_pm) != old:
            return True
        before, after = amounts_of(old.capacity), amounts_of(new.capacity)
        if (before.gpus, before.slots) != (after.gpus, after.slots):
            return True
        moved = any(abs(a - b) > MOVED_SHARE * max(a, b) for a, b in zip(before, after, strict=True))
        return moved or abs(new.busy_pm - old.busy_pm) > 1000 * MOVED_SHARE

    def done(self, to: NodeId, *, ok: bool, now: float) -> tuple[bool, list[SetTimer]]:
        """A report arrived or failed. Whether there is more to say at once."""
        if to != self._to:
            return False, []  # it coordinates no more
        self._to = None
        if not ok:
            return False, [SetTimer(REPORT_TIMER, now + REPORT_AGAIN_S)]
        del self._news[: self._sent_news]
        return self._has_more or bool(self._news), []

    def due(self) -> bool:
        """Whether one may be made now; if another is under way, the next follows it."""
        if self.coordinator is None:
            return False
        if self._to == self.coordinator:
            self._has_more = True
            return False
        return True

    def made(self, running: Sequence[Running], now: float) -> list[SendReport | SetTimer | CancelTimer]:
        """The report, which is due, and when the next one is."""
        assert self.coordinator is not None  # it is due
        del self._news[:-NEWS_MAX]
        self._number += 1
        self._sent_news = min(len(self._news), ENDED_MAX)
        self._to, self._has_more, self._told = self.coordinator, False, self.lent
        report = NodeReport(self._boot, self._number, self.lent, tuple(running), tuple(self._news[: self._sent_news]))
        if running or self.lent.accepts != "nobody":
            again: SetTimer | CancelTimer = SetTimer(REPORT_TIMER, now + (REPORT_S if running else REPORT_IDLE_S))
        else:
            again = CancelTimer(REPORT_TIMER)
        return [SendReport(self.coordinator, report), again]
