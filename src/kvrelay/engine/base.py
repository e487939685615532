"""What a worker needs from an inference engine."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from kvrelay.kv_transfer.segment import Segment
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts that are known once the engine is ready."""

    name: str
    layout: cluster_pb2.KvLayout
    max_model_len_tokens: int
    vocab_size: int
    num_engine_blocks: int
    max_running_requests: int = 0
    """Sequences that it computes at a time; 0 when it does not say."""
    max_batched_tokens: int = 0
    """Tokens of one step; 0 when it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPlan:
    """Where the KV blocks of one request come from and go to, as slots of the host block store.

    The first `load_tokens` tokens of the prompt are loaded: block `i` from `load[i]`, of the last one what counts.
    Block `first_save + j` is saved to `save[j]` once it is full. Full blocks after those are saved to granted slots, as
    long as there are any. With `partial_tokens` the last slot of `save` takes the block that is not full when so many
    tokens are computed.
    """

    ticket: int
    """Names this submission in every `KvReport`; below 2**32, not re-used while the worker lives."""
    load: Sequence[int] = ()
    load_tokens: int = 0
    """Less than the prompt: the engine computes at least one token, to sample from it."""
    first_save: int = 0
    save: Sequence[int] = ()
    partial_tokens: int = 0
    """0: blocks that are not full are not saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One submission. The worker has validated it: it cannot harm the engine."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: common_pb2.SamplingParams
    kv: KvPlan
    cache_salt: str = ""
    priority: int = 0
    num_generated_tokens: int = 0
    """So many tokens at the prompt's end another engine has generated for this request: the sampler goes on as that one
    would have."""


class KvReportKind(enum.IntEnum):
    """What the engine has done with slots."""

    LOADED = 1
    """The engine does not read the slots of `load` again; `block` is the number of blocks it took from them."""
    SAVED = 2
    """`num_layers` layers of block `block` from `first_layer` are complete in `slot`. Each layer is reported once.

    A block in a granted slot is reported whole. A block that is begun is completed unless the request is aborted.
    """
    CLOSED = 3
    """The request is over: no slot of it is read or written after this. Sent exactly once for each ticket."""


@dataclass(frozen=True, slots=True)
class KvReport:
    kind: KvReportKind
    ticket: int
    block: int = 0
    slot: int = 0
    first_layer: int = 0
    num_layers: int = 0


@dataclass(slots=True, kw_only=True)
class EngineStep:
    """Everything one engine step produced."""

    deltas: list[worker_pb2.TokenDelta] = field(default_factory=list)
    ended_s: float = 0.0
    """When the engine was done with it, by the monotonic clock that the machine's processes share."""
    has_load: bool = False
    """Whether the three figures below were measured in this step."""
    num_running_requests: int = 0
    num_waiting_requests: int = 0
    kv_usage: float = 0.0
    """Share of the engine's own KV blocks in use, 0..1."""


class EngineDeadError(RuntimeError):
    """The engine is gone for good; the worker process must end."""


class Engine(ABC):
    """Runs a model. All methods belong to one event loop."""

    @abstractmethod
    async def start(self, segment: Segment, on_kv_reports: Callable[[Sequence[KvReport]], None]) -> EngineInfo:
        """Load the model; the engine maps `segment` and copies blocks to and from its slots.

        `on_kv_reports` is called in the event loop. Raises whatever makes loading impossible.
        """

    @abstractmethod
    async def submit(self, request: EngineRequest) -> None:
        """Queue a request. Its tokens appear in `steps` until a delta has a finish reason."""

    @abstractmethod
    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests early; unknown ids are ignored. No delta need follow, but CLOSED does."""

    @abstractmethod
    def grant(self, slots: Sequence[int]) -> None:
        """Lend granted slots for blocks of generated tokens; SAVED gives each back when it is filled."""

    @abstractmethod
    def steps(self) -> AsyncIterator[EngineStep]:
        """Yield every step that produced something, in order. Raises `EngineDeadError`."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine and its processes within a few seconds. Idempotent."""
