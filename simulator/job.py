"""One request on its way through the simulated cluster."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvrelay.simulator.timing import Seconds
from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.trace import TraceRequest

if TYPE_CHECKING:
    from kvrelay.simulator.worker import SimulatedWorker


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """What its coordinator decided, and what came of it."""

    request: TraceRequest
    names: Sequence[bytes]
    """Of the prompt's blocks, the last one full or not."""
    answer_names: Sequence[bytes]
    """Of the blocks that the answer completes."""
    prefill: SimulatedWorker | None
    decode: SimulatedWorker
    source: SimulatedWorker | None
    """Who has more of the prompt; None as soon as that is being fetched."""
    num_cached_tokens: int = 0
    """Of the prompt, where it was computed."""
    token_times_s: list[Seconds] = field(default_factory=list)
    """At the workers."""
    decode_pins: list[int] = field(default_factory=list)
    """Slots of the decode worker that hold blocks of the prompt for it."""
    _settled: bool = False
    _waiting: Callable[[], None] | None = None

    @property
    def request_id(self) -> str:
        return str(self.request.index)

    @property
    def computing(self) -> SimulatedWorker:
        """Who computes the prompt."""
        return self.prefill or self.decode

    def settle(self) -> None:
        """No more blocks are coming to the decode worker."""
        self._settled = True
        if self._waiting is not None:
            self._waiting()

    def when_settled(self, call: Callable[[], None]) -> None:
        """Call once no more blocks are coming: at once when none were, or all are there."""
        if self._settled or self.prefill is None:
            call()
        else:
            self._waiting = call

    def outcome(self, message_s: float) -> Outcome:
        """Once it is completed; tokens take `message_s` from the workers to the client."""
        times_s = array("d", (np.concatenate(self.token_times_s) + message_s).tobytes())
        return Outcome(
            index=self.request.index,
            arrived_s=self.request.arrived_s,
            status=Status.COMPLETED,
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_output_tokens=len(times_s),
            num_cached_tokens=self.num_cached_tokens,
            token_times_s=times_s,
        )
