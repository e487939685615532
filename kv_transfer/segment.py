"""Where do the bytes of the host block store live? In anonymous shared memory, cut into slots."""

from __future__ import annotations

import fcntl
import mmap
import os

HEADER_BYTES = 4096
"""Room before the first slot, for what the engine has to say about its layout."""

_F_ADD_SEALS = 1033
_F_SEAL_SHRINK = 0x2
_F_SEAL_GROW = 0x4


class Segment:
    """A memfd that the worker creates and its engine's processes map.

    It never has a name in a file system, so nothing is left of it when its processes are gone, however
    they end. Another process of the same user opens it by `path` as long as the creator lives. Its size
    is sealed: nobody can truncate it under the others' feet.

    Layout: `HEADER_BYTES`, then `num_slots` slots of `slot_bytes` each. `slot_bytes` is known once the
    engine has told its layout: call `configure` before any slot is touched.
    """

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path
        self.size_bytes = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.size_bytes)
        self._view = memoryview(self._map)
        self.slot_bytes = 0
        self.num_slots = 0

    @classmethod
    def create(cls, size_bytes: int) -> Segment:
        """Make a segment of `size_bytes`; pages take memory only once they are written.

        Raises `ValueError` when not even the header fits, `OSError` when the system refuses.
        """
        if size_bytes <= HEADER_BYTES:
            raise ValueError(f"a segment of {size_bytes} bytes has no room for slots; give at least {HEADER_BYTES + 1}")
        fd = os.memfd_create("kvrelay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            return cls(fd, f"/proc/{os.getpid()}/fd/{fd}")
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, path: str) -> Segment:
        """Map the segment that another process of this user created; `path` is the creator's `path`."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            raise

    def configure(self, slot_bytes: int) -> None:
        """Cut the space after the header into as many slots as fit.

        Raises `ValueError` when not even one fits.
        """
        num_slots = (self.size_bytes - HEADER_BYTES) // slot_bytes
        if num_slots < 1:
            raise ValueError(
                f"a host block store of {self.size_bytes} bytes cannot hold one KV block of {slot_bytes} bytes;"
                " raise --kv-host-bytes"
            )
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots

    @property
    def header(self) -> memoryview:
        """The first `HEADER_BYTES` bytes."""
        return self._view[:HEADER_BYTES]

    @property
    def slots(self) -> memoryview:
        """All slots, one after the other."""
        return self._view[HEADER_BYTES : HEADER_BYTES + self.num_slots * self.slot_bytes]

    def slot_view(self, slot: int, offset: int = 0, size: int | None = None) -> memoryview:
        """A writable view of `size` bytes of a slot from `offset`; the whole slot by default. Drop it soon."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        size = self.slot_bytes - offset if size is None else size
        if offset < 0 or offset + size > self.slot_bytes:
            raise IndexError(f"bytes {offset}..{offset + size} of a slot of {self.slot_bytes}")
        start = HEADER_BYTES + slot * self.slot_bytes + offset
        return self._view[start : start + size]

    def close(self) -> None:
        """Unmap. Views handed out must be gone; idempotent."""
        if self._fd < 0:
            return
        self._view.release()
        self._map.close()
        os.close(self._fd)
        self._fd = -1
