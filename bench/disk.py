"""How fast do KV blocks go to disk and come back? `python -m bench.disk [--path DIR] [--json FILE]`.

The tier's own calls (threads, checksums, one call a block) against plain `pwrite` and `pread` of the same blocks by one
thread. Rounds are interleaved. "cached" reads what the kernel still has in memory, as it does shortly after writing;
for "cold" the file is synced and dropped from that cache before.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.report import Report, parser, spread
from kvrelay.kv_transfer.disk_access import DiskAccess
from kvrelay.kv_transfer.disk_file import DiskFile
from kvrelay.kv_transfer.disk_index import DiskBlock
from kvrelay.kv_transfer.segment import Segment, size_for

GB = 1e9
TOTAL_BYTES = 512 << 20
BLOCK_BYTES = {"0.7 MB": 737_280, "2 MiB": 2 << 20}
ROUNDS = 5


class Tier:
    """The disk tier's threads, without its accounts."""

    def __init__(self, segment: Segment, file: DiskFile) -> None:
        self._access = DiskAccess(segment, file, Counter())
        self._num_blocks = segment.num_slots
        self._checksums: dict[int, int] = {}

    async def write(self) -> None:
        """All slots to disk."""
        all_done = asyncio.Event()

        def done(place: int, checksum: int | None) -> None:
            assert checksum is not None
            self._checksums[place] = checksum
            if len(self._checksums) == self._num_blocks:
                all_done.set()

        self._checksums.clear()
        for number in range(self._num_blocks):
            self._access.write(number, number, partial(done, number))
        await all_done.wait()

    async def read(self) -> None:
        """All blocks into their slots."""
        results: list[bool] = []
        all_done = asyncio.Event()

        def done(succeeded: bool) -> None:
            results.append(succeeded)
            if len(results) == self._num_blocks:
                all_done.set()

        for place, checksum in self._checksums.items():
            self._access.read(DiskBlock(b"", place, checksum), place, done)
        await all_done.wait()
        assert all(results)

    async def close(self) -> None:
        await self._access.close()


@contextmanager
def timed(gb_s: dict[str, list[float]], name: str, num_bytes: int) -> Iterator[None]:
    began = time.perf_counter()
    yield
    gb_s.setdefault(name, []).append(num_bytes / (time.perf_counter() - began) / GB)


def drop_from_cache(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


async def measure(directory: Path, block_bytes: int) -> dict[str, list[float]]:
    """GB/s of every arm, a value for each round."""
    num_blocks = TOTAL_BYTES // block_bytes
    segment = Segment.create(size_for(num_blocks, block_bytes))
    segment.configure(block_bytes)
    for slot in range(num_blocks):
        segment.slot_view(slot)[:] = os.urandom(block_bytes)
    files = [DiskFile.create(directory, num_blocks * (block_bytes + 4096)) for _ in range(2)]
    for file in files:
        file.configure(block_bytes)
    tier, tier_fd, raw = Tier(segment, files[0]), files[0]._fd, files[1]._fd
    views = [segment.slot_view(slot) for slot in range(num_blocks)]
    num_bytes = num_blocks * block_bytes
    gb_s: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        with timed(gb_s, "write, tier", num_bytes):
            await tier.write()
        with timed(gb_s, "write, pwrite", num_bytes):
            for number, view in enumerate(views):
                os.pwrite(raw, view, number * block_bytes)
        for state in ("cached", "cold"):
            if state == "cold":
                drop_from_cache(tier_fd)
                drop_from_cache(raw)
            with timed(gb_s, f"read {state}, tier", num_bytes):
                await tier.read()
            with timed(gb_s, f"read {state}, pread", num_bytes):
                for number, view in enumerate(views):
                    os.preadv(raw, [view], number * block_bytes)
    views.clear()
    del view
    await tier.close()
    files[1].close()
    segment.close()
    return gb_s


async def run(directory: Path) -> Report:
    config = {"total_bytes": TOTAL_BYTES, "rounds": ROUNDS, "block_bytes": list(BLOCK_BYTES.values())}
    measured = {name: await measure(directory, size) for name, size in BLOCK_BYTES.items()}
    report = Report("disk", config)
    for arm in measured["2 MiB"]:
        report.rows.append({"GB/s": arm, **{name: spread(gb_s[arm]) for name, gb_s in measured.items()}})
    return report


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--path", type=Path, default=Path("/var/tmp"), metavar="DIR", help="a folder on the disk")
    arguments = options.parse_args()
    asyncio.run(run(arguments.path)).finish(arguments.json)


if __name__ == "__main__":
    main()
