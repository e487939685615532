"""Which blocks are copied in this engine step? The connector's scheduler side, without vLLM and without I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Copies:
    """What every rank does in one step. Crosses to the ranks with the scheduler's output."""

    loads: list[tuple[int, int]] = field(default_factory=list)
    """(slot, engine block): read before the forward pass."""
    streamed: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(slot, engine block, ticket, index of the block in its request): blocks of prompts, which another worker may
    wait for. Written group of layers by group of layers, while the forward pass computes later ones."""
    saves: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Likewise, blocks of generated tokens: written after the forward pass."""
    loaded: list[tuple[int, int]] = field(default_factory=list)
    """(ticket, number of its blocks among `loads`): its slots are not read after this step's loads."""
    closed: list[int] = field(default_factory=list)
    """Tickets that are over: no copy for them follows."""


@dataclass(slots=True)
class _Request:
    ticket: int
    load: list[int]
    load_tokens: int
    save: list[int]
    first_save: int
    next_save: int
    partial_tokens: int
    loaded: bool = False


class ConnectorPlan:
    """Follows the requests that carry a plan from admission to their end.

    The caller (`vllm_connector`) tells it what the engine's scheduler decided and sends `take` to the ranks
    once a step. Blocks of one request are saved in order; a preempted request that computes a block again
    does not save it again.
    """

    def __init__(self, block_size: int, *, save_generated: bool = True) -> None:
        self._block_size = block_size
        self._save_generated = save_generated
        self._requests: dict[str, _Request] = {}
        self._grants: deque[int] = deque()
        self._copies = Copies()

    def add(self, request_id: str, params: dict[str, object]) -> None:
        """Admit a request; `params` has the fields of `kvrelay.engine.base.KvPlan`."""
        first_save = _int(params["first_save"])
        self._requests[request_id] = _Request(
            ticket=_int(params["ticket"]),
            load=_slots(params["load"]),
            load_tokens=_int(params["load_tokens"]),
            save=_slots(params["save"]),
            first_save=first_save,
            next_save=first_save,
            partial_tokens=_int(params["partial_tokens"]),
        )

    def matched_tokens(self, request_id: str, num_computed_tokens: int) -> int:
        """Tokens after the first `num_computed_tokens` whose KV can be loaded. Has no side effect."""
        state = self._requests.get(request_id)
        if state is None or state.loaded:
            return 0
        return max(0, state.load_tokens - num_computed_tokens)

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """The scheduler gave the request engine blocks; load the last `num_external_tokens` of the matched ones."""
        state = self._requests.get(request_id)
        if state is None or state.loaded:
            return
        first = (state.load_tokens - num_external_tokens) // self._block_size
        blocks = range(first, len(state.load)) if num_external_tokens else ()
        self._copies.loads.extend((state.load[i], block_ids[i]) for i in blocks)
        self._copies.loaded.append((state.ticket, len(blocks)))
        state.loaded = True

    def scheduled(self, request_id: str, num_tokens: int, block_ids: Callable[[], Sequence[int]]) -> None:
        """After this step the request's first `num_tokens` tokens have their KV: save the blocks they complete."""
        state = self._requests.get(request_id)
        if state is None:
            return
        end = num_tokens // self._block_size
        if num_tokens == state.partial_tokens and num_tokens % self._block_size:
            state.partial_tokens = 0
            end += 1
        if state.next_save >= end:
            return
        blocks = block_ids()
        while state.next_save < end:
            index = state.next_save - state.first_save
            if index < len(state.save):
                saves, slot = self._copies.streamed, state.save[index]
            elif self._save_generated and self._grants:
                saves, slot = self._copies.saves, self._grants.popleft()
            else:
                return
            saves.append((slot, blocks[state.next_save], state.ticket, state.next_save))
            state.next_save += 1

    def grant(self, slots: Iterable[int]) -> None:
        """Slots for blocks beyond the requests' own."""
        self._grants.extend(slots)

    def finished(self, request_id: str) -> None:
        """The request is over, whether it ran or not."""
        state = self._requests.pop(request_id, None)
        if state is not None:
            self._copies.closed.append(state.ticket)

    def take(self) -> Copies:
        """Everything decided since the last call."""
        copies, self._copies = self._copies, Copies()
        return copies


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not an int")
    return value


def _slots(value: object) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(slot, int) for slot in value):
        raise TypeError(f"slots are a list of ints, not {value!r}")
    return value
