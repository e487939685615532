"""Reports of copies on a GPU wait for the copies, in order; streams and events here are stand-ins."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvrelay.kv_transfer.copy_reports import CudaCopyReports
from kvrelay.kv_transfer.engine_pipes import CLOSED, SAVED, RankReport

SAVED_0, SAVED_1, CLOSED_7 = (
    RankReport(SAVED, 0, 7, 0, 3),
    RankReport(SAVED, 0, 7, 1, 4),
    RankReport(CLOSED, 0, 7, 0, 0),
)


class Stream:
    """Writes down what it waits for."""

    def __init__(self) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)


class Driver:
    """Stands in for `torch.cuda`: events end when the test says so."""

    def __init__(self, register_error: int) -> None:
        self.compute, self.side = Stream(), Stream()
        self.active = self.compute
        self.events: list[threading.Event] = []
        self.registered: list[int] = []
        self.register_error = register_error

    def cudart(self) -> Any:
        def register(address: int, _size: int, _flags: int) -> int:
            self.registered.append(address)
            return self.register_error

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=self.registered.remove)

    def event(self) -> Any:
        over = threading.Event()
        self.events.append(over)
        return SimpleNamespace(record=lambda stream: None, synchronize=over.wait)

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        self.active = stream
        yield
        self.active = self.compute


class Writer:
    """Keeps reports and says when the next has come."""

    def __init__(self) -> None:
        self.reports: list[RankReport] = []
        self.written = threading.Semaphore(0)
        self.closed = False

    def write(self, reports: list[RankReport]) -> None:
        self.reports += reports
        self.written.release()

    def close(self) -> None:
        self.closed = True


@pytest.fixture(params=[0, 1], ids=["pinned", "pageable"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver(request.param)
    for name, value in {
        "Stream": lambda: driver.side,
        "Event": driver.event,
        "current_stream": lambda: driver.active,
        "stream": driver.use,
        "cudart": driver.cudart,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return driver


def test_reports_leave_in_order_when_what_was_copied_before_is_over(driver: Driver) -> None:
    writer = Writer()
    reports = CudaCopyReports(writer, 4096, 100)  # type: ignore[arg-type]
    with reports.saving():
        assert driver.active is driver.side
    assert driver.side.waits[0] is driver.compute, "no block is read before it is computed"
    reports.report([SAVED_0])
    reports.report([SAVED_1])
    reports.report([])
    reports.fence()
    assert driver.compute.waits == [driver.side], "no block is written again before it is read"
    reports.report([CLOSED_7])
    driver.events[1].set()
    assert writer.reports == []
    driver.events[0].set()
    for _ in range(2):
        assert writer.written.acquire(timeout=10)
    assert writer.reports == [SAVED_0, SAVED_1]
    driver.events[2].set()
    reports.close()
    assert writer.reports == [SAVED_0, SAVED_1, CLOSED_7]
    assert writer.closed
    assert driver.registered == ([] if driver.register_error == 0 else [4096])
