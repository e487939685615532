"""When have all ranks of an engine done their part? Several ranks report the same thing; it counts once."""

from __future__ import annotations

from kvrelay.kv_transfer.engine_pipes import RankReport


class RankQuorum:
    """Counts equal reports until every rank has sent one; all ranks save the same layers at a time."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._seen: dict[tuple[int, int, int, int], int] = {}

    def complete(self, report: RankReport) -> bool:
        """Whether this report is the last of its kind."""
        if self._num_ranks == 1:
            return True
        key = (report.kind, report.ticket, report.block, report.first_layer)
        count = self._seen.get(key, 0) + 1
        if count < self._num_ranks:
            self._seen[key] = count
            return False
        self._seen.pop(key, None)
        return True
