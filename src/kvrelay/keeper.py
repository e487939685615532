"""How does a child process end together with everything it started?

A keeper is a small process between a parent and one child. It

- forwards the first SIGTERM or SIGINT to the child and kills it and all of its descendants `grace_s` later, or at
  once on a second signal;
- takes the death of its own parent, however it came, for such a signal;
- adopts the descendants that outlive the child, kills them and removes the shared memory that only they had, before
  it ends itself with the child's exit status.

This file runs by itself (`command` says how), so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
LAST_WORDS_S = 3.0
"""For processes that clean up after dead ones, such as multiprocessing's resource tracker; a busy machine is slow."""
KILL_TIMEOUT_S = 30.0
"""A killed process frees all of its memory before its pipes are closed: gigabytes took 10 s on a busy machine."""
_SHM = "/dev/shm/"  # noqa: S108 - read, and only what is listed there is removed


def command(arguments: Sequence[str], *, grace_s: float) -> list[str]:
    """The command line that runs `arguments` under a keeper of the calling process.

    The calling thread must live as long as the child shall.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace_s), *arguments]


def become_subreaper() -> None:
    """Make this process the parent of orphaned descendants, where the system can (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children(pid: int) -> list[int]:
    """The live or unreaped children of a process."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and _parent(entry) == pid]


def descendants(pid: int) -> Iterator[int]:
    """Children, their children, and so on."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def kill(pids: Sequence[int] | Iterator[int]) -> None:
    """SIGKILL; processes that are gone are fine."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def is_cleaning_up(pid: int) -> bool:
    """Whether it is one of Python's resource trackers, which remove what dead processes left and then end."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.startswith(b"from multiprocessing.resource_tracker import main") for word in words)


class LastWords:
    """Whom to kill now: resource trackers only when all others have been gone for `LAST_WORDS_S`.

    A tracker begins to clean up when the last process that told it of something has closed its pipe.
    """

    def __init__(self) -> None:
        self._until_s = time.monotonic() + LAST_WORDS_S

    def over(self, pids: Sequence[int]) -> list[int]:
        """Those of `pids`, which are all that is left, whose time is over."""
        others = [pid for pid in pids if not is_cleaning_up(pid)]
        if others:
            self._until_s = time.monotonic() + LAST_WORDS_S
        return others if time.monotonic() < self._until_s else list(pids)


def shared_memory(pids: Sequence[int]) -> set[Path]:
    """Files of POSIX shared memory and semaphores that the processes have mapped."""
    found: set[Path] = set()
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        found.update(Path(line[line.index(_SHM) :]) for line in maps.splitlines() if _SHM in line)
    return found


def remove_unused(files: set[Path]) -> None:
    """Delete those that no process has mapped any more."""
    if files:
        everybody = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        for path in files - shared_memory(everybody):
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """Run the child and return the status to exit with; a signal counts as 128 + its number, as in a shell."""
    parent, grace_s, child_arguments = int(arguments[0]), float(arguments[1]), arguments[2:]
    watched = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    become_subreaper()
    if os.getppid() != parent:
        return 1
    child = _start(child_arguments, watched)
    status = _wait(child, watched, grace_s)
    _end_descendants()
    return status


def _start(arguments: Sequence[str], blocked: set[signal.Signals]) -> int:
    keeper = os.getpid()
    child = os.fork()
    if child:
        return child
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    if os.getppid() != keeper:
        os._exit(1)
    try:
        os.execvp(arguments[0], list(arguments))  # noqa: S606 - the command is the caller's
    except OSError as error:
        os.write(2, f"cannot run {arguments[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _wait(child: int, watched: set[signal.Signals], grace_s: float) -> int:
    """Until the child is gone, by itself or by a signal; other descendants are reaped on the way."""
    kill_at: float | None = None
    while True:
        status = reap(child)
        if status is not None:
            return status
        timeout_s = 3600.0 if kill_at is None else max(0.0, kill_at - time.monotonic())
        received = signal.sigtimedwait(watched, timeout_s)
        if received is None:
            if kill_at is not None:
                kill([pid for pid in descendants(os.getpid()) if not is_cleaning_up(pid)])
                kill_at = time.monotonic() + KILL_TIMEOUT_S
        elif received.si_signo != signal.SIGCHLD:
            if kill_at is None:
                os.kill(child, signal.SIGTERM)
                kill_at = time.monotonic() + grace_s
            else:
                kill_at = time.monotonic()


def reap(child: int | None = None) -> int | None:
    """Collect whatever has ended; the child's exit status when it is among them."""
    found: int | None = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code


def _end_descendants() -> None:
    own, deadline = os.getpid(), time.monotonic() + KILL_TIMEOUT_S
    files: set[Path] = set()
    last_words = LastWords()
    while time.monotonic() < deadline:
        reap()
        left = list(descendants(own))
        if not left:
            break
        files |= shared_memory(left)
        kill(last_words.over(left))
        signal.sigtimedwait({signal.SIGCHLD}, 0.05)
    remove_unused(files)


def _parent(process: Path) -> int | None:
    try:
        stat = (process / "stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
