"""Where do the bytes of the host block store live? In anonymous shared memory, cut into slots."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets

HEADER_BYTES = 4096
"""Room before the first slot, for what the engine has to say about its layout, and for the proof."""
PROOF_BYTES = 16
_GENERATION_BYTES = 8

_FOREIGN_PATH = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,10}")
_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 0x2
_F_SEAL_GROW = 0x4


def size_for(num_slots: int, slot_bytes: int) -> int:
    """Bytes of a segment that holds so many slots."""
    return HEADER_BYTES + num_slots * (slot_bytes + _GENERATION_BYTES) + _GENERATION_BYTES


class Segment:
    """A memfd that the worker creates and its engine's processes map.

    It never has a name in a file system, so nothing is left of it when its processes are gone, however
    they end. Another process of the same user opens it by `path` as long as the creator lives. Its size
    is sealed: nobody can truncate it under the others' feet.

    Layout: `HEADER_BYTES`, then `num_slots` slots of `slot_bytes` each, then the slots' generations. `slot_bytes` is
    known once the engine has told its layout: call `configure` before any slot is touched.
    """

    def __init__(self, fd: int, path: str, *, writable: bool = True) -> None:
        self._fd = fd
        self.path = path
        self.size_bytes = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.size_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        self._view = memoryview(self._map)
        self._generations = self._view[:0].cast("Q")
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
            os.pwrite(fd, secrets.token_bytes(PROOF_BYTES), HEADER_BYTES - PROOF_BYTES)
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

    @classmethod
    def open_foreign(cls, path: str, proof: bytes) -> Segment:
        """Map, to read only, what somebody says is a segment on this machine.

        It is unmapped with the last reference to it or to a view of it; `close` has nothing to do. Raises `OSError`
        when it cannot be opened, and `ValueError` when it is anything else than the segment meant.
        """
        if not _FOREIGN_PATH.fullmatch(path):
            raise ValueError(f"{path!r} is not the path of a segment")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:kvrelay"):
                raise ValueError(f"{path} is not a segment")
            seals = fcntl.fcntl(fd, _F_GET_SEALS)
            if not seals & _F_SEAL_SHRINK:
                raise ValueError(f"{path} may shrink while it is read")
            if len(proof) != PROOF_BYTES or os.pread(fd, PROOF_BYTES, HEADER_BYTES - PROOF_BYTES) != proof:
                raise ValueError(f"{path} is another segment")
            segment = cls(fd, path, writable=False)
            segment._fd = -1
            return segment
        finally:
            os.close(fd)

    def configure(self, slot_bytes: int) -> None:
        """Cut the space after the header into as many slots as fit.

        Raises `ValueError` when not even one fits.
        """
        num_slots = (self.size_bytes - HEADER_BYTES - _GENERATION_BYTES) // (slot_bytes + _GENERATION_BYTES)
        if num_slots < 1:
            raise ValueError(
                f"a host block store of {self.size_bytes} bytes cannot hold one KV block of {slot_bytes} bytes;"
                " raise --kv-host-bytes"
            )
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        end = self.size_bytes - self.size_bytes % _GENERATION_BYTES
        self._generations = self._view[end - num_slots * _GENERATION_BYTES : end].cast("Q")

    @property
    def proof(self) -> bytes:
        """Random bytes that only this segment holds."""
        return bytes(self._view[HEADER_BYTES - PROOF_BYTES : HEADER_BYTES])

    def generation(self, slot: int) -> int:
        """Changes before the slot is written for another block: whoever copies compares before and after."""
        return self._generations[slot]

    def begin_generation(self, slot: int) -> None:
        """The slot is going to be written for another block."""
        self._generations[slot] += 1

    @property
    def header(self) -> memoryview:
        """What the engine may write."""
        return self._view[: HEADER_BYTES - PROOF_BYTES]

    @property
    def slots(self) -> memoryview:
        """All slots, one after the other."""
        return self._view[HEADER_BYTES : HEADER_BYTES + self.num_slots * self.slot_bytes]

    def slot_view(self, slot: int, offset: int = 0, size: int | None = None) -> memoryview:
        """A writable view of `size` bytes of a slot from `offset`; the whole slot by default. Drop it soon."""
        size = self.slot_bytes - offset if size is None else size
        if offset + size > self.slot_bytes:
            raise IndexError(f"bytes {offset}..{offset + size} of a slot of {self.slot_bytes}")
        return self.run_view(slot, offset, size)

    def run_view(self, slot: int, offset: int, size: int) -> memoryview:
        """Like `slot_view`, going on into the slots that follow."""
        start = slot * self.slot_bytes + offset
        if not 0 <= slot < self.num_slots or not 0 <= offset <= self.slot_bytes:
            raise IndexError(f"slot {slot} of {self.num_slots}, byte {offset} of {self.slot_bytes}")
        if size < 0 or start + size > self.num_slots * self.slot_bytes:
            raise IndexError(f"{size} bytes from slot {slot} of {self.num_slots}")
        return self._view[HEADER_BYTES + start : HEADER_BYTES + start + size]

    def close(self) -> None:
        """Unmap. Views handed out must be gone; idempotent."""
        if self._fd < 0:
            return
        self._generations.release()
        self._view.release()
        self._map.close()
        os.close(self._fd)
        self._fd = -1
