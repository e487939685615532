"""Where do the temporary files and sockets of one run live, and how do they go away?"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrelay.launch.marked_processes import end_marked, mark

_PREFIX = "kvrelay-up-"
_MAX_LENGTH = 40
"""Names of sockets below it must fit into 107 bytes."""


@contextmanager
def run_directory() -> Iterator[Path]:
    """A new directory for this user only; removed at the end with all that is in it."""
    base = tempfile.gettempdir()
    if len(base) + len(_PREFIX) + 8 > _MAX_LENGTH:
        base = "/tmp"  # noqa: S108 - the user's own is too long for sockets
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(path: Path) -> bool:
    """End what is left of a run that could not clean up, by its directory; true when there was anything.

    The caller knows that the run itself is over.
    """
    num_ended = asyncio.run(end_marked(mark(path.name), whole=False))
    existed = path.is_dir() and path.name.startswith(_PREFIX)
    if existed:
        shutil.rmtree(path, ignore_errors=True)
    return existed or num_ended > 0
