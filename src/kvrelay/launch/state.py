"""Is a cluster running on this machine, and where? One at a time for each user."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_LOCK_ATTEMPTS = 5
_LOCK_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """What `kvrelay up` says about itself."""

    pid: int
    http_url: str
    """Of the OpenAI API, without /v1."""
    grpc_address: str
    etcd: tuple[str, ...]
    """host:port of every member."""
    cluster: str
    model: str
    log_dir: str
    run_dir: str


class AlreadyRunningError(Exception):
    """Another `up` of this user runs; `cluster` tells where, if it has said so already."""

    def __init__(self, cluster: RunningCluster | None) -> None:
        where = f" at {cluster.http_url} (process {cluster.pid})" if cluster else ""
        super().__init__(f"a cluster runs already{where}")
        self.cluster = cluster


def default_state_dir(environment: Mapping[str, str]) -> Path:
    """By the XDG base directory specification."""
    base = environment.get("XDG_STATE_HOME") or os.path.join(environment.get("HOME", "~"), ".local", "state")
    return Path(base).expanduser() / "kvrelay"


def running_cluster(state_dir: Path) -> RunningCluster | None:
    """The cluster that runs now, by the state file of the process that holds the lock."""
    try:
        with (state_dir / "up.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(state_dir)
    except FileNotFoundError:
        pass
    return None


class StateFile:
    """Held by the one `up`; made by `hold`."""

    def __init__(self, state_dir: Path, previous: RunningCluster | None) -> None:
        self._path = state_dir / "up.json"
        self.previous = previous
        """Of a run that ended without a chance to clean up."""

    def write(self, cluster: RunningCluster) -> None:
        """Replace the state in one step."""
        scratch = self._path.with_suffix(".new")
        scratch.write_text(json.dumps(dataclasses.asdict(cluster), indent=2) + "\n")
        scratch.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def hold(state_dir: Path) -> Iterator[StateFile]:
    """Be the only `up`. The system lets go of the lock however this process ends.

    The state file of a run that fails stays, so that the next one can clean up. Raises `AlreadyRunningError`.
    """
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state_dir / "up.lock").open("ab") as lock:
        if not _acquire(lock.fileno()):
            raise AlreadyRunningError(_read(state_dir))
        state = StateFile(state_dir, _read(state_dir))
        yield state
        state.remove()


def _acquire(descriptor: int) -> bool:
    """A reader holds the lock for a moment, so more than one attempt."""
    for attempt in range(_LOCK_ATTEMPTS):
        if attempt:
            time.sleep(_LOCK_PAUSE_S)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False


def _read(state_dir: Path) -> RunningCluster | None:
    try:
        values = json.loads((state_dir / "up.json").read_text())
        return RunningCluster(**{**values, "etcd": tuple(values["etcd"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
