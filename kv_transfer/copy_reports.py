"""When is a rank's copy over, so that the worker may be told?"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from kvrelay.kv_transfer.engine_pipes import RankReport, ReportWriter


class CopyReports:
    """Where copies are over when their calls return, as on a CPU: reports leave at once."""

    def __init__(self, writer: ReportWriter) -> None:
        self._writer = writer

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around copies out of the engine's blocks; the forward pass goes on meanwhile."""
        yield

    def fence(self) -> None:
        """What the engine does after this does not reach its blocks before the copies so far are over."""

    def report(self, reports: Iterable[RankReport]) -> None:
        """Send reports in this order, when everything copied before is over."""
        self._writer.write(reports)

    def close(self) -> None:
        """Nothing is reported after this."""
        self._writer.close()


class CudaCopyReports(CopyReports):
    """Saves run on a stream of their own, and a thread waits for their ends: neither holds the engine's thread up.

    The engine's stream waits for the saves of a step after its forward pass (`fence`): its blocks may belong to
    another request in the next. Tested with streams that stand in for CUDA's; it was never run on a GPU.
    """

    def __init__(self, writer: ReportWriter, pool_address: int, pool_bytes: int) -> None:
        """The pool is pinned if the driver can; copies of pageable memory are right, too, but slower."""
        super().__init__(writer)
        self._stream = torch.cuda.Stream()
        self._pool_address = pool_address
        self._pinned = int(torch.cuda.cudart().cudaHostRegister(pool_address, pool_bytes, 0)) == 0
        self._pending: SimpleQueue[tuple[torch.cuda.Event, list[RankReport]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="copy-reports", daemon=True)
        self._thread.start()

    @contextmanager
    def saving(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def fence(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)

    def report(self, reports: Iterable[RankReport]) -> None:
        """Loads run on the engine's stream, so both are waited for."""
        listed = list(reports)
        if listed:
            self._stream.wait_stream(torch.cuda.current_stream())
            event = torch.cuda.Event()
            event.record(self._stream)
            self._pending.put((event, listed))

    def _run(self) -> None:
        while (item := self._pending.get()) is not None:
            event, reports = item
            event.synchronize()
            self._writer.write(reports)

    def close(self) -> None:
        self._pending.put(None)
        self._thread.join()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pool_address)
        super().close()
