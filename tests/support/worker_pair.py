"""A prefill and a decode worker in this process, real but for their model, and a coordinator written by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio

from kvrelay.decode_worker.runner import DecodeRole
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.grpc_options import server_options
from kvrelay.kv_transfer.disk_file import ALIGNMENT_BYTES
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.segment import size_for
from kvrelay.kv_transfer.service import KvTransferService, add_to_server
from kvrelay.prefill_worker.runner import PrefillRole
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2, common_pb2, kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.record import WorkerRecord
from kvrelay.worker.running_host import open_host
from kvrelay.worker.service import WorkerService
from kvrelay.worker.status import worker_status
from kvrelay.worker.store_config import StoreConfig
from tests.support.eventually import eventually
from tests.support.worker_link import Answer, Link, open_link, over

CONFIG = SimulatedConfig(
    num_layers=2,
    num_kv_heads=1,
    head_elements=16,
    block_size_tokens=4,
    vocab_size=1000,
    max_model_len_tokens=256,
    num_engine_blocks=256,
    max_batched_tokens=32,
    layer_groups=2,
    time_scale=0,
)
Message = TypeVar("Message")
BLOCK = CONFIG.block_size_tokens


class Gate:
    """Lets everybody pass while it is open, and counts who has come."""

    def __init__(self) -> None:
        self.num_arrived = 0
        self._is_open = True
        self._permits = 0
        self._changed = asyncio.Event()

    def shut(self) -> None:
        self._is_open = False

    def open(self) -> None:
        self._is_open = True
        self._changed.set()

    async def let_pass(self, number: int) -> None:
        """Let the one pass who comes as number `number`, and nobody after it."""
        await eventually(lambda: self.num_arrived == number)
        self._permits += 1
        self._changed.set()

    async def pass_through(self, *_: object) -> None:
        self.num_arrived += 1
        await asyncio.sleep(0)
        while not self._is_open:
            if self._permits:
                self._permits -= 1
                return
            self._changed.clear()
            await self._changed.wait()


class GatedPushServer(PushServer):
    """Its threads stop at a gate of the event loop."""

    def __init__(self, receiver: Receiver, gate: Gate) -> None:
        super().__init__(receiver)
        self._gate = gate
        self._loop = asyncio.get_running_loop()

    def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAck]:
        yield from super().push(self._gated(frames), context)

    def copy(self, runs: Iterator[kv_transfer_pb2.LocalRun], context: Any) -> Iterator[kv_transfer_pb2.FrameAck]:
        yield from super().copy(self._gated(runs), context)

    def _gated(self, messages: Iterator[Message]) -> Iterator[Message]:
        for message in messages:
            asyncio.run_coroutine_threadsafe(self._gate.pass_through(), self._loop).result()
            yield message


class GatedKvService(KvTransferService):
    """Stops offers and frames at gates."""

    def __init__(self, receiver: Receiver, lend: Callable[[kv_transfer_pb2.FetchRequest], int]) -> None:
        self.frames = Gate()
        self.push_server = GatedPushServer(receiver, self.frames)
        super().__init__(receiver, f"127.0.0.1:{self.push_server.start('127.0.0.1:0')}", lend)
        self.offers = Gate()

    async def offer(self, request: kv_transfer_pb2.OfferRequest, context: Any) -> None:
        await self.offers.pass_through()
        await super().offer(request, context)


@dataclass(slots=True)
class Node:
    """One worker."""

    worker_id: str
    host: WorkerHost
    kv: GatedKvService
    steps: Gate
    """Every group of layers of every step of the engine passes it."""
    address: str
    server: grpc.aio.Server

    def status(self) -> worker_pb2.WorkerStatus:
        return worker_status(self.host, self.worker_id)

    def is_idle(self) -> bool:
        """Whether nothing of any request is left."""
        status = self.status()
        return not (
            status.num_running_requests
            or status.num_waiting_requests
            or status.num_queued_prompt_tokens
            or status.engine_kv_usage
            or status.store.num_reserved
            or status.store.num_pinned
            or status.num_incoming_transfers
            or status.num_outgoing_transfers
        )


@contextlib.asynccontextmanager
async def open_node(
    worker_id: str,
    *,
    config: SimulatedConfig = CONFIG,
    num_slots: int = 512,
    num_places: int = 0,
    hold_s: float = 60.0,
) -> AsyncIterator[Node]:
    """Run a worker that can do both jobs; it must be idle at the end, with all its slots accounted for.

    `num_places`: blocks that fit on disk.
    """
    steps = Gate()
    engine = SimulatedEngine(config, sleep=steps.pass_through)
    store = StoreConfig(
        size_bytes=size_for(num_slots, config.block_bytes),
        transfer_hold_s=hold_s,
        disk_bytes=num_places * -(-config.block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES,
    )
    async with open_host(engine, store, Tracing()) as host:
        server = grpc.aio.server(options=server_options())
        kv = GatedKvService(host.receiver, host.lender.lend)
        add_to_server(kv, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        host.borrower.address = address
        info = cluster_pb2.WorkerInfo(worker_id=worker_id, address=address, layout=host.info.layout)
        service = WorkerService(
            WorkerRecord(info), lambda: worker_status(host, worker_id), PrefillRole(host), DecodeRole(host)
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
        await server.start()
        node = Node(worker_id, host, kv, steps, address, server)
        try:
            yield node
            for gate in (kv.offers, kv.frames, steps):
                gate.open()
            await eventually(node.is_idle, f"{worker_id} is idle; {node.status()}")
            usage = node.status().store
            assert usage.num_free + usage.num_evictable + usage.num_granted == usage.num_slots
        finally:
            for gate in (kv.offers, kv.frames, steps):
                gate.open()
            await server.stop(None)
            await asyncio.to_thread(kv.push_server.stop)


def sampling(max_tokens: int, **values: Any) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **values)


@dataclass(slots=True)
class Pair:
    """Both workers and a session with each."""

    p: Node
    d: Node
    to_p: Link
    to_d: Link

    def prefill(self, request_id: str, prompt: Sequence[int], **values: Any) -> Answer:
        """Send a Prefill that samples one token."""
        return self.to_p.prefill(
            worker_pb2.Prefill(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling=sampling(1),
                decode_address=self.d.address,
                decode_worker_id=self.d.worker_id,
                **values,
            )
        )

    def decode(
        self, request_id: str, prompt: Sequence[int], num_tokens: int, *, kv_wait_ms: int = 10_000, **values: Any
    ) -> Answer:
        """Send a Decode."""
        values.setdefault("sampling", sampling(num_tokens))
        return self.to_d.decode(
            worker_pb2.Decode(request_id=request_id, prompt_token_ids=prompt, kv_wait_ms=kv_wait_ms, **values)
        )

    async def generate(self, request_id: str, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], Answer]:
        """The whole way: the first token from the prefill worker; all tokens, and the decode worker's answer."""
        first = self.prefill(request_id, prompt)
        await over(first)
        assert first.failed is None, first.failed
        rest = self.decode(request_id, [*prompt, *first.token_ids], num_tokens - 1)
        await over(rest)
        assert rest.failed is None, rest.failed
        return first.token_ids + rest.token_ids, rest

    def cancel(self, request_id: str) -> None:
        """As a coordinator does whose client is gone."""
        self.to_p.cancel(request_id)
        self.to_d.cancel(request_id)

    async def idle(self) -> None:
        await eventually(lambda: self.p.is_idle() and self.d.is_idle(), "both workers are idle", timeout_s=5.0)


@contextlib.asynccontextmanager
async def open_pair(*, p: dict[str, Any] | None = None, d: dict[str, Any] | None = None) -> AsyncIterator[Pair]:
    """Both workers with a session each; `p` and `d` are arguments of `open_node`. Nothing runs at the end."""
    async with (
        open_node("p", **(p or {})) as p_node,
        open_node("d", **(d or {})) as d_node,
        open_link(p_node.address) as to_p,
        open_link(d_node.address) as to_d,
    ):
        yield Pair(p_node, d_node, to_p, to_d)
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if name.startswith(("prefill-", "decode-", "push-", "engine-", "expire"))]
