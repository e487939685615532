"""What may happen to a frame on its way? Faults for a `FrameProxy`, all drawn from one seeded generator."""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

_HEADER_BYTES = 40
"""No header of a frame is much longer: half of what is done to a frame is done there."""
_MAX_REMEMBERED = 64


class FrameFault(ABC):
    """Turns each frame into those that go on instead. Called by a thread for each stream."""

    def __init__(self, rng: random.Random, rate: float) -> None:
        """`rate`: the share of frames that it strikes."""
        self.counts: Counter[str] = Counter()
        """What was done, by kind."""
        self._rng = rng
        self._rate = rate
        self._lock = threading.Lock()

    @abstractmethod
    def frames(self, frame: bytes, stopped: threading.Event) -> Iterator[bytes]:
        """What goes on for `frame`; a wait ends early when `stopped` is set."""

    @property
    def num_injected(self) -> int:
        return sum(self.counts.values())

    def _strikes(self) -> bool:
        return self._rng.random() < self._rate


class Delay(FrameFault):
    """A frame waits up to `most_s`, and those behind it on its stream."""

    def __init__(self, rng: random.Random, rate: float = 1.0, *, most_s: float = 0.01) -> None:
        super().__init__(rng, rate)
        self._most_s = most_s

    def frames(self, frame: bytes, stopped: threading.Event) -> Iterator[bytes]:
        with self._lock:
            struck = self._strikes()
            wait_s = self._rng.random() * self._most_s if struck else 0.0
            self.counts["delayed"] += struck
        stopped.wait(wait_s)
        yield frame


class _Change(FrameFault):
    """Puts other frames in the place of those that it strikes, at once."""

    def frames(self, frame: bytes, stopped: threading.Event) -> Iterator[bytes]:
        with self._lock:
            frames = self._change(frame) if frame and self._strikes() else [frame]
        yield from frames

    @abstractmethod
    def _change(self, frame: bytes) -> Sequence[bytes]:
        """What goes on instead. Under the lock."""

    def _position(self, frame: bytes) -> int:
        near = self._rng.random() < 0.5
        return self._rng.randrange(min(len(frame), _HEADER_BYTES) if near else len(frame))


class Loss(_Change):
    """The frame does not come, and its stream goes on."""

    def _change(self, frame: bytes) -> Sequence[bytes]:
        self.counts["lost"] += 1
        return []


class Flip(_Change):
    """One bit is another one, in the header or in the payload."""

    def _change(self, frame: bytes) -> Sequence[bytes]:
        position = self._position(frame)
        self.counts["flipped in header" if position < _HEADER_BYTES else "flipped in payload"] += 1
        changed = bytearray(frame)
        changed[position] ^= 1 << self._rng.randrange(8)
        return [bytes(changed)]


class Truncate(_Change):
    """The end of the frame does not come."""

    def _change(self, frame: bytes) -> Sequence[bytes]:
        self.counts["truncated"] += 1
        return [frame[: self._position(frame)]]


class Disorder(_Change):
    """Frames come twice, late, or long after their transfer, be it over another stream.

    A frame that is held back comes after a later one. Without a later one it is lost until it is sent again.
    """

    def __init__(self, rng: random.Random, rate: float) -> None:
        super().__init__(rng, rate)
        self._held: list[bytes] = []
        self._remembered: list[bytes] = []

    def frames(self, frame: bytes, stopped: threading.Event) -> Iterator[bytes]:
        with self._lock:
            self._remember(frame)
            if self._strikes():
                frames = self._change(frame)
            else:
                frames = [frame, *self._held]
                self._held.clear()
        yield from frames

    def _change(self, frame: bytes) -> Sequence[bytes]:
        match self._rng.randrange(3):
            case 0:
                self.counts["repeated"] += 1
                return [frame, frame]
            case 1:
                self.counts["held back"] += 1
                self._held.append(frame)
                return []
            case _:
                self.counts["replayed"] += 1
                return [self._rng.choice(self._remembered), frame]

    def _remember(self, frame: bytes) -> None:
        if len(self._remembered) < _MAX_REMEMBERED:
            self._remembered.append(frame)
        elif self._rng.random() < 0.1:
            self._remembered[self._rng.randrange(_MAX_REMEMBERED)] = frame


class Chain(FrameFault):
    """One fault after the other."""

    def __init__(self, faults: Sequence[FrameFault]) -> None:
        super().__init__(random.Random(0), 1.0)
        self._faults = faults

    def frames(self, frame: bytes, stopped: threading.Event) -> Iterator[bytes]:
        yield from self._through(self._faults, frame, stopped)

    def _through(self, faults: Sequence[FrameFault], frame: bytes, stopped: threading.Event) -> Iterator[bytes]:
        if not faults:
            yield frame
            return
        for passed in faults[0].frames(frame, stopped):
            yield from self._through(faults[1:], passed, stopped)

    @property
    def num_injected(self) -> int:
        return sum(fault.num_injected for fault in self._faults)
