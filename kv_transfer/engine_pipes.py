"""How do the worker and its engine's processes tell each other about slots? Over two anonymous pipes.

Reports go from the engine's ranks to the worker, granted slots from the worker to the engine's scheduler.
The other side opens a pipe by its `/proc/<pid>/fd/<n>` path, like the segment; nothing has a name in a
file system and nothing is left behind. A record is small enough for a pipe's atomic writes (pipe(7):
up to PIPE_BUF, 4,096 bytes), so several ranks share one pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

LOADED, SAVED, CLOSED = 1, 2, 3
"""Values of `kvrelay.engine.base.KvReportKind`, which the engine's processes need not import."""

_PIPE_BUF = 4096
_PIPE_BYTES = 1 << 20
_REPORT = struct.Struct("<BBIIIHH")
_SLOT = struct.Struct("<I")


class RankReport(NamedTuple):
    """What one rank has done: `kind` as in `kvrelay.engine.base.KvReportKind`."""

    kind: int
    rank: int
    ticket: int
    block: int
    slot: int
    first_layer: int = 0
    num_layers: int = 0


class Pipe:
    """The worker's end of one pipe, with the path by which the engine opens the other."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(PermissionError):  # The default capacity serves too.
            fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.reader_path = f"/proc/{os.getpid()}/fd/{self.read_fd}"
        self.writer_path = f"/proc/{os.getpid()}/fd/{self.write_fd}"

    def close(self) -> None:
        """Close both ends; idempotent."""
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)
        self.read_fd = self.write_fd = -1


class ReportWriter:
    """A rank's end of the report pipe."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, reports: Iterable[RankReport]) -> None:
        """Send reports. Waits only when the worker is 58,000 of them behind.

        Raises `BrokenPipeError` when the worker is gone.
        """
        packed = b"".join(_REPORT.pack(*report) for report in reports)
        step = _PIPE_BUF // _REPORT.size * _REPORT.size
        for start in range(0, len(packed), step):
            os.write(self._fd, packed[start : start + step])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ReportReader:
    """Cuts what the worker reads from the report pipe into records."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def read(self) -> Iterator[RankReport]:
        """Yield every whole record that is there now."""
        while True:
            try:
                data = os.read(self._fd, _PIPE_BYTES)
            except BlockingIOError:
                return
            if not data:
                return
            data = self._rest + data
            end = len(data) // _REPORT.size * _REPORT.size
            self._rest = data[end:]
            yield from map(RankReport._make, _REPORT.iter_unpack(data[:end]))


def write_grants(fd: int, slots: Sequence[int]) -> int:
    """Write slots to the grant pipe; returns how many went in, the rest does not fit now."""
    step = _PIPE_BUF // _SLOT.size
    for start in range(0, len(slots), step):
        part = slots[start : start + step]
        try:
            os.write(fd, b"".join(_SLOT.pack(slot) for slot in part))
        except BlockingIOError:
            return start
    return len(slots)


class GrantReader:
    """The engine scheduler's end of the grant pipe."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def read(self) -> list[int]:
        """Every slot that is there now."""
        try:
            data = os.read(self._fd, _PIPE_BYTES)
        except BlockingIOError:
            return []
        return [slot for (slot,) in _SLOT.iter_unpack(data)]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
