"""A prefill and a decode worker whose KV blocks pass a proxy that does harm to them, and what must be true of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from kvrelay.block_hash import BlockHasher
from kvrelay.decode_worker.runner import DecodeRole
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig, TokenChain, check_block, expected_tokens
from kvrelay.grpc_options import server_options
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.segment import size_for
from kvrelay.kv_transfer.service import KvTransferService, add_to_server
from kvrelay.kv_transfer.transport import KvTransport
from kvrelay.prefill_worker.runner import PrefillRole
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.record import WorkerRecord
from kvrelay.worker.running_host import open_host
from kvrelay.worker.service import WorkerService
from kvrelay.worker.status import worker_status
from kvrelay.worker.store_config import StoreConfig
from tests.support.eventually import eventually
from tests.support.worker_link import Answer, Link, open_link, over

CONFIG = SimulatedConfig(
    num_layers=4,
    num_kv_heads=8,
    head_elements=128,
    block_size_tokens=16,
    vocab_size=1000,
    max_model_len_tokens=256,
    num_engine_blocks=512,
    max_batched_tokens=64,
    layer_groups=2,
    time_scale=0,
)
"""A block has 128 KiB, and a step of the engine gives a frame of up to four half blocks."""
NUM_SLOTS = 400
"""What some hundred hand-offs need goes through them several times: a frame that lands too late would show."""
BLOCK = CONFIG.block_size_tokens
NUM_PREFIXES = 6
FETCH_RATE = 0.2

Proxy = Callable[[str], AbstractAsyncContextManager[str]]
"""Stands before the address that it is called with; yields its own."""


@dataclass(slots=True)
class FaultyWorker:
    worker_id: str
    host: WorkerHost
    address: str

    def status(self) -> worker_pb2.WorkerStatus:
        return worker_status(self.host, self.worker_id)

    def is_idle(self) -> bool:
        """Whether nothing of any request is left."""
        status = self.status()
        usage = status.store
        return not (
            usage.num_reserved
            or usage.num_pinned
            or status.num_incoming_transfers
            or status.num_outgoing_transfers
            or status.num_running_requests
            or status.num_waiting_requests
            or status.num_queued_prompt_tokens
            or self.host.jobs.total()
        )

    def check_content(self, prompt: Sequence[int]) -> int:
        """Whatever the store has of a prompt holds what its tokens would have computed; returns how many blocks."""
        hashes = BlockHasher(self.host.info.layout, "", prompt).hashes
        digests = TokenChain(CONFIG, prompt).block_digests
        slots = [self.host.store.find(block_hash) for block_hash in hashes]
        for block, slot in enumerate(slots):
            if slot is not None:
                check_block(CONFIG, [digests[block]], block, slot, bytes(self.host.segment.slot_view(slot)))
        return sum(slot is not None for slot in slots)


@contextlib.asynccontextmanager
async def _faulty_worker(worker_id: str, proxy: Proxy, compression: Compression) -> AsyncIterator[FaultyWorker]:
    store = StoreConfig(
        size_bytes=size_for(NUM_SLOTS, CONFIG.block_bytes), transport=KvTransport.GRPC, compression=compression
    )
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(open_host(SimulatedEngine(CONFIG), store, Tracing()))
        push_server = PushServer(host.receiver)
        port = push_server.start("127.0.0.1:0")
        stack.push_async_callback(asyncio.to_thread, push_server.stop)
        push_address = await stack.enter_async_context(proxy(f"127.0.0.1:{port}"))
        server = grpc.aio.server(options=server_options())
        add_to_server(KvTransferService(host.receiver, push_address, host.lender.lend), server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        info = cluster_pb2.WorkerInfo(worker_id=worker_id, address=address, layout=host.info.layout)
        host.borrower.address = address
        service = WorkerService(
            WorkerRecord(info), lambda: worker_status(host, worker_id), PrefillRole(host), DecodeRole(host)
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
        await server.start()
        stack.push_async_callback(server.stop, None)
        yield FaultyWorker(worker_id, host, address)


@dataclass(slots=True)
class HandOffs:
    """What some hundred requests came to."""

    num_right: int = 0
    num_whole: int = 0
    """Hand-offs of which the decode worker computed nothing but what it must."""


@dataclass(slots=True)
class FaultyPair:
    p: FaultyWorker
    d: FaultyWorker
    to_p: Link
    to_d: Link
    kv_wait_ms: int
    prompts: list[list[int]]

    async def hand_off(self, number: int, rng: random.Random, sums: HandOffs) -> None:
        """One request, as a coordinator sends it; its tokens must be those of a single engine."""
        prompt = _prompt(rng)
        self.prompts.append(prompt)
        num_tokens = rng.randrange(2, 6)
        request_id = f"r{number}"
        first = self.to_p.prefill(
            worker_pb2.Prefill(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling=_sampling(1),
                decode_address=self.d.address,
            )
        )
        if rng.random() < 0.7:  # The others are decoded without the first token, while P still works on them.
            await over(first)
            assert first.failed is None, first.failed
        rest = self._decode(request_id, [*prompt, *first.token_ids], num_tokens - len(first.token_ids))
        tokens = [*first.token_ids, *(await self._tokens(rest))]
        await over(first)
        assert tokens == expected_tokens(prompt, num_tokens, CONFIG), f"{request_id} has other tokens"
        sums.num_right += 1
        sums.num_whole += rest.counters["decode.tokens_stored"] >= len(prompt) - 1

    async def fetch(self, number: int, rng: random.Random) -> None:
        """A request of which the decode worker asks the other one for what that may have."""
        shared = rng.choice(self.prompts)
        prompt = [*shared, *rng.choices(range(3, CONFIG.vocab_size), k=rng.randrange(1, BLOCK))]
        answer = self._decode(f"f{number}", prompt, 2, kv_wait_ms=0, prefix_address=self.p.address)
        assert await self._tokens(answer) == expected_tokens(prompt, 2, CONFIG), "other tokens after a prefix came"

    def _decode(self, request_id: str, prompt: Sequence[int], num_tokens: int, **values: Any) -> Answer:
        values.setdefault("kv_wait_ms", self.kv_wait_ms)
        return self.to_d.decode(
            worker_pb2.Decode(request_id=request_id, prompt_token_ids=prompt, sampling=_sampling(num_tokens), **values)
        )

    async def _tokens(self, answer: Answer) -> list[int]:
        await over(answer)
        assert answer.failed is None, answer.failed
        return answer.token_ids

    async def run(self, num_requests: int, rng: random.Random, *, num_at_once: int) -> HandOffs:
        """So many hand-offs, some at a time, and some fetches of prefixes.

        Both workers are idle afterwards and hold nothing wrong.
        """
        sums = HandOffs()
        numbers = iter(range(num_requests))

        async def one_after_the_other() -> None:
            for number in numbers:
                await self.hand_off(number, rng, sums)
                if rng.random() < FETCH_RATE:
                    await self.fetch(number, rng)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_at_once):
                tasks.create_task(one_after_the_other())
        for worker in (self.p, self.d):
            await eventually(worker.is_idle, f"{worker.worker_id} is idle; {worker.status()}", timeout_s=20.0)
            assert sum(worker.check_content(prompt) for prompt in self.prompts) > 0
        return sums


def _prompt(rng: random.Random) -> list[int]:
    """Of several blocks; some begin like others, and some end with a block."""
    prefix = random.Random(rng.randrange(NUM_PREFIXES)).choices(range(3, CONFIG.vocab_size), k=2 * BLOCK)
    own = rng.choices(range(3, CONFIG.vocab_size), k=rng.randrange(3, 7) * BLOCK + rng.choice([0, 1, 7, BLOCK - 1]))
    return own if rng.random() < 0.7 else [*prefix, *own]


def _sampling(max_tokens: int) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)


@contextlib.asynccontextmanager
async def faulty_pair(
    proxy: Proxy, *, kv_wait_ms: int = 5_000, compression: Compression = Compression.NONE
) -> AsyncIterator[FaultyPair]:
    """Both workers; frames to the decode worker pass `proxy`. No thread and no connection is left at the end."""
    before = _own_connections()
    async with (
        _faulty_worker("p", contextlib.nullcontext, compression) as p,
        _faulty_worker("d", proxy, compression) as d,
        open_link(p.address) as to_p,
        open_link(d.address) as to_d,
    ):
        yield FaultyPair(p, d, to_p, to_d, kv_wait_ms, [])
    await eventually(lambda: not _kv_threads(), f"threads are left: {_kv_threads()}")
    await eventually(lambda: _own_connections() <= before, f"connections are left: {_own_connections() - before}")


def _kv_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("kv-", "proxy"))]


def _own_connections() -> set[str]:
    """Inodes of this process's TCP sockets, listening ones too."""
    inodes = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        inodes |= {line.split()[9] for line in Path(table).read_text().splitlines()[1:]}
    own = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            own.add(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix("socket:[").removesuffix("]"))
    return inodes & own
