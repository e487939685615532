"""How does an engine end with nothing left? Its processes, and the shared memory that those had which were killed.

Ranks of one engine exchange tensors through files of shared memory, and remove them only if they end by themselves.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path

from kvrelay import keeper

_KILL_TIMEOUT_MS = 2000


class EngineProcesses:
    """The descendants of this process, those that have ended meanwhile too."""

    def __init__(self) -> None:
        self._handles: dict[int, int] = {}
        self._files: set[Path] = set()

    def note(self) -> None:
        """Remember those that run now, and what they have mapped. Resource trackers are left to end by themselves."""
        for pid in keeper.descendants(os.getpid()):
            if pid not in self._handles and not keeper.is_cleaning_up(pid):
                with suppress(ProcessLookupError):
                    self._handles[pid] = os.pidfd_open(pid)
        self._files |= keeper.shared_memory(list(self._handles))

    def end(self) -> None:
        """Kill what was noted and still runs, and delete what was mapped and no process has mapped any more."""
        for handle in self._handles.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        for handle in self._handles.values():
            # Readable once the process has ended and its memory is unmapped.
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(_KILL_TIMEOUT_MS)
            os.close(handle)
        self._handles.clear()
        keeper.remove_unused(self._files)
        self._files.clear()
