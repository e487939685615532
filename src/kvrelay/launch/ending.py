"""How does a process end at once, with everything that it has started?"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import NoReturn

from kvrelay import keeper
from kvrelay.signals import ASKING

_KILL_TIMEOUT_S = 1.5
_POLL_S = 0.01


def end_at_once(exit_code: int, scratch: Path) -> NoReturn:
    """Kill every process below this one, remove what they had in shared memory and `scratch`, and exit.

    Nothing else runs any more, no `finally` either. Fit for a signal handler.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    try:
        _kill_descendants()
        shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os._exit(exit_code)


def _kill_descendants() -> None:
    """Resource trackers of multiprocessing are spared: they clean up when this process is gone, and end then."""
    keeper.become_subreaper()
    files: set[Path] = set()
    own, deadline = os.getpid(), time.monotonic() + _KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        keeper.reap()
        left = [pid for pid in keeper.descendants(own) if not keeper.is_cleaning_up(pid)]
        if not left:
            break
        files |= keeper.shared_memory(left)
        keeper.kill(left)
        time.sleep(_POLL_S)
    keeper.remove_unused(files)
