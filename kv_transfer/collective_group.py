"""What is a process group of two workers, whatever moves its bytes, and how does it end?

Nothing here touches torch's global default group: a process has as many groups as it has peers, and one that breaks
leaves the others alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SENDER_RANK, RECEIVER_RANK = 0, 1
NUM_STAGINGS = 2
"""Of each side: one is filled or emptied while the other is under way."""
RUN_BYTES = 4 << 20
"""What a run holds, unless one layer of one block is larger. Half as much took more processor time for a byte; four
times as much was not faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveConfig:
    """Times of all groups of one worker."""

    open_s: float = 8.0
    """Within this both sides have built the group. Blocks go by Push meanwhile."""
    deadline_s: float = 5.0
    """So long may a run be under way. Less than a push waits for an ack before it gives up, with room to send again."""
    backoff_s: float = 60.0
    """After a group has failed no other is tried with the same peer for so long."""
    idle_s: float = 60.0
    """A group that nothing was sent through for so long is closed: it takes two threads of the receiver."""
    interface: str = ""
    """The network interface of gloo's connections; the one that leads to the other side when empty."""


class GroupError(ConnectionError):
    """The group could not be built, or it is broken: nothing comes through it any more."""


@dataclass(slots=True, eq=False)
class Staging:
    """Memory that a run goes through, on this side."""

    host: npt.NDArray[np.uint8]
    """What is sent, or was received."""
    device: Any = None
    """A tensor of the same size on the GPU, and the pinned tensor behind `host`, where the backend needs them."""
    pinned: Any = None


Transit = Callable[[], None]
"""Waits until the bytes have gone or come, for the deadline at most; raises `GroupError`."""


class Group(ABC):
    """Two processes, one of which sends. What is sent arrives in order and unchecked.

    One thread of the sender sends, one of the receiver posts and one waits; `abort` and `close` are for any thread.
    """

    @abstractmethod
    def staging(self, num_bytes: int) -> Staging:
        """New memory for a run of up to `num_bytes`. Raises `GroupError` when there is none."""

    @abstractmethod
    def send(self, staging: Staging, num_bytes: int) -> Transit:
        """Begin to send the first `num_bytes`, which must not change until the transit is over. Raises `GroupError`."""

    @abstractmethod
    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        """Begin to receive so many bytes: exactly as many as are sent. Raises `GroupError`."""

    @abstractmethod
    def abort(self) -> None:
        """Break it: whoever waits gets `GroupError` at once, here and on the other side. Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Abort it and let go of its threads and connections. Idempotent."""
