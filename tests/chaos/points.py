"""At which named points of a hand-off can a worker be killed, by itself and at once?

A worker that `tests.chaos.armed_worker` runs looks for a file of its name whenever it comes to one of the points. The
file says which of them is armed, and how often it may be passed before. The product knows nothing of this.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvrelay.kv_transfer.frame_order import FrameOrder, LocalOrder
from kvrelay.kv_transfer.peer import Peer
from kvrelay.kv_transfer.placing import Placing
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.prefill_worker.runner import _Outgoing
from kvrelay.v1.kv_transfer_pb2 import FrameAck
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.submission import Submission

Reached = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the product: calls of `methods`, before they begin or after they have returned what `counts` takes."""

    role: Literal["prefill", "decode"]
    methods: tuple[tuple[type, str], ...]
    before: bool = True
    counts: Callable[[Any], bool] = lambda _: True
    most: int = 1
    """It is passed up to so often before it kills."""


POINTS = {
    "before-offer": Point("prefill", ((Peer, "offered"),)),
    "frames-sent": Point("prefill", ((FrameOrder, "encode"), (LocalOrder, "encode")), most=4),
    "before-first-token": Point("prefill", ((_Outgoing, "_tell"),)),
    "before-commit": Point("prefill", ((Peer, "commit"),)),
    "offer-received": Point("decode", ((Receiver, "offer"),)),
    "frames-landed": Point(
        "decode", ((Placing, "_land"),), before=False, counts=lambda ack: bool(ack == FrameAck.STATUS_STORED), most=4
    ),
    "all-landed": Point("decode", ((Receiver, "_settle"),), before=False),
    "before-submit": Point("decode", ((WorkerHost, "submit"),)),
    "tokens-generated": Point("decode", ((Submission, "add_delta"),), before=False, most=200),
}


class Armory:
    """The files by which points are armed, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def arm(self, worker_id: str, point: str, passes: int) -> None:
        """Kill the worker when it comes to this point for the time after `passes` times from now on."""
        scratch = self._directory / f"{worker_id}.new"
        scratch.write_text(f"{point} {passes} {secrets.token_hex(4)}")
        scratch.rename(self._directory / worker_id)

    def disarm(self, worker_id: str) -> bool:
        """Whether it was armed still."""
        try:
            (self._directory / worker_id).unlink()
        except FileNotFoundError:
            return False
        return True


class Trap:
    """One worker's side: counts how often the armed point is passed."""

    def __init__(self, directory: Path, worker_id: str, end: Callable[[], None]) -> None:
        self._path = directory / worker_id
        self._end = end
        self._order = ""
        self._num_passed = 0

    def reached(self, point: str) -> None:
        """Ends this process if it is the point's turn. Any thread."""
        try:
            order = self._path.read_text()
        except FileNotFoundError:
            return
        armed, passes, _ = order.split()
        if armed != point:
            return
        if order != self._order:
            self._order, self._num_passed = order, 0
        if self._num_passed < int(passes):
            self._num_passed += 1
            return
        try:
            self._path.unlink()
        except FileNotFoundError:  # Disarmed in this moment.
            return
        self._end()

    def set_up(self) -> None:
        """Wrap what the points name, in this process."""
        for name, point in POINTS.items():
            for owner, method in point.methods:
                _wrap(owner, method, point, functools.partial(self.reached, name))


def end_now() -> None:
    """As the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: type, method: str, point: Point, reached: Reached) -> None:
    """Methods that are coroutine functions can only be caught before."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if point.before:
            reached()
        result = original(*args, **kwargs)
        if not point.before and point.counts(result):
            reached()
        return result

    setattr(owner, method, wrapped)
