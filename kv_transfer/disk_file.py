"""Where do the bytes of the disk tier live? In one file without a name, cut into places."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Self

import xxhash

ALIGNMENT_BYTES = 4096
"""Places begin at pages of the file: neighbours never share one."""


class CorruptBlockError(Exception):
    """The disk gave back something else than was written."""


def check_room(directory: Path, size_bytes: int) -> None:
    """Raises `ValueError` unless this user can keep so many bytes in the directory."""
    try:
        status = os.statvfs(directory)
        num_free = status.f_bavail * status.f_frsize
    except OSError as error:
        raise ValueError(f"{directory} cannot hold KV blocks: {error.strerror}") from error
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"{directory} cannot hold KV blocks: it is not a folder that this user may write to")
    if num_free < size_bytes:
        raise _too_small(directory, size_bytes, num_free)


def _too_small(directory: Path, size_bytes: int, num_free: int) -> ValueError:
    return ValueError(f"{directory} has {num_free} bytes free, {size_bytes} are wanted for KV blocks")


class DiskFile:
    """A file that no name leads to (O_TMPFILE where the file system has it): nothing is left of it when its process is
    gone, however that ends. All its space is taken at once, so it cannot run out later.

    `write` and `read` block; they are for threads. Two of them must not use one place at the same time.
    """

    def __init__(self, fd: int, directory: Path, size_bytes: int) -> None:
        self._fd = fd
        self.directory = directory
        self.size_bytes = size_bytes
        self.num_places = 0
        self._place_bytes = 0

    @classmethod
    def create(cls, directory: Path, size_bytes: int) -> Self:
        """Take the space. It may last where the file system cannot do it in one step.

        Raises `ValueError` telling what is wrong with the directory or how much is missing.
        """
        check_room(directory, size_bytes)
        try:
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
                return cls(os.dup(file.fileno()), directory, size_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                status = os.statvfs(directory)
                raise _too_small(directory, size_bytes, status.f_bavail * status.f_frsize) from error
            raise ValueError(f"{directory} cannot hold KV blocks: {error.strerror}") from error

    def configure(self, block_bytes: int) -> None:
        """Cut the file into places of one block each. Raises `ValueError` when not even one fits."""
        self._place_bytes = -(-block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.num_places = self.size_bytes // self._place_bytes
        if not self.num_places:
            raise ValueError(
                f"{self.size_bytes} bytes on disk cannot hold one KV block of {block_bytes} bytes;"
                " raise --kv-disk-bytes"
            )

    def write(self, place: int, block: memoryview) -> int:
        """Write one block; returns its XXH3-64, to read it with. Raises `OSError`."""
        offset = self._offset(place)
        digest: int = xxhash.xxh3_64_intdigest(block)
        done = 0
        while done < len(block):
            done += os.pwrite(self._fd, block[done:], offset + done)
        return digest

    def read(self, place: int, into: memoryview, expected: int) -> None:
        """Read one block. Raises `OSError`, and `CorruptBlockError` when it is not what was written."""
        offset = self._offset(place)
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if not count:
                raise OSError(errno.EIO, f"the file in {self.directory} ends in place {place}")
            done += count
        if xxhash.xxh3_64_intdigest(into) != expected:
            raise CorruptBlockError(f"place {place} of the file in {self.directory} has changed")

    def _offset(self, place: int) -> int:
        if not 0 <= place < self.num_places:
            raise IndexError(f"place {place} of {self.num_places}")
        return place * self._place_bytes

    def give_up_space(self) -> None:
        """Return the space to the file system; nothing can be read any more. Blocks."""
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Nobody reads or writes any more. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
