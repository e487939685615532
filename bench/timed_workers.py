"""Workers that cost next to nothing: the worker's own gRPC service, and tokens by the clock instead of an engine.

    python -m bench.timed_workers --etcd 127.0.0.1:2379 --model m --prefill 16 --decode 16

All of them live in this process, each at a port of its own and registered in etcd. A prompt takes a fixed time whatever
its length; decode workers step on a fixed beat, with one token for every sequence. No KV moves. Writes `ready` to
standard output, then the ids of prompts that are probes with the time they took in fact, for timers are late by
up to a millisecond, or more under load; ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio
import uvloop

from kvrelay import membership
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.grpc_options import MAX_MESSAGE_BYTES, server_options
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.worker.record import WorkerRecord
from kvrelay.worker.service import WorkerService
from kvrelay.worker.submission import Sink

BLOCK_TOKENS = 16
MAX_MODEL_LEN_TOKENS = 8192
PROBE = "-probe."
"""Ids of requests that are timed contain it."""
_FIRST_TOKEN = 1000
_NUM_TOKENS = 500
"""Generated ids come from this range of the vocabulary, where every model has words."""


@dataclass(slots=True)
class _Sequence:
    """One that a decode worker generates."""

    request: worker_pb2.Decode
    sink: Sink
    num_left: int
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class TimedPrefill:
    """The first token of every prompt, `prefill_s` after its message."""

    def __init__(self, prefill_s: float) -> None:
        self._prefill_s = prefill_s

    async def prefill(self, request: worker_pb2.Prefill, sink: Sink) -> None:
        """See `kvrelay.worker.role.PrefillRunner`."""
        began_s = time.perf_counter()
        await asyncio.sleep(self._prefill_s)
        if PROBE in request.request_id:
            print(request.request_id, time.perf_counter() - began_s, flush=True)
        sink(
            worker_pb2.TokenDelta(
                request_id=request.request_id,
                token_ids=[_FIRST_TOKEN],
                finish_reason=common_pb2.FINISH_REASON_LENGTH,
                num_cached_tokens=0,
            )
        )


class TimedDecode:
    """One token for every sequence per step, on a beat that does not drift."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._sequences: dict[str, _Sequence] = {}
        self._filled = asyncio.Event()

    @property
    def num_running(self) -> int:
        return len(self._sequences)

    async def decode(self, request: worker_pb2.Decode, sink: Sink) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""
        sequence = _Sequence(request, sink, request.sampling.max_tokens)
        self._sequences[request.request_id] = sequence
        self._filled.set()
        try:
            await sequence.ended.wait()
        finally:
            self._sequences.pop(request.request_id, None)

    def forget(self, request_id: str) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""

    def session(self, coordinator_id: str) -> contextlib.AbstractContextManager[None]:
        """See `kvrelay.worker.role.DecodeRunner`."""
        return contextlib.nullcontext()

    def end_wait(self, request_id: str) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""

    async def run(self) -> None:
        """Step while there is a sequence, until cancelled."""
        while True:
            self._filled.clear()
            if not self._sequences:
                await self._filled.wait()
            next_s = time.monotonic() + self._step_s
            while self._sequences:
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))
                next_s += self._step_s
                self._step()

    def _step(self) -> None:
        for request_id, sequence in list(self._sequences.items()):
            sequence.num_left -= 1
            delta = worker_pb2.TokenDelta(
                request_id=request_id, token_ids=[_FIRST_TOKEN + sequence.num_left % _NUM_TOKENS]
            )
            if not sequence.num_left:
                delta.finish_reason = common_pb2.FINISH_REASON_LENGTH
                del self._sequences[request_id]
                sequence.ended.set()
            sequence.sink(delta)


@contextlib.asynccontextmanager
async def timed_worker(info: cluster_pb2.WorkerInfo, prefill_s: float, step_s: float) -> AsyncIterator[None]:
    """Serve one worker inside this context; its record gets the address."""
    decode = TimedDecode(step_s)

    def status() -> worker_pb2.WorkerStatus:
        return worker_pb2.WorkerStatus(num_running_requests=decode.num_running)

    server = grpc.aio.server(options=server_options(max_message_bytes=MAX_MESSAGE_BYTES))
    info.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    service = WorkerService(WorkerRecord(info), status, TimedPrefill(prefill_s), decode)
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        stepping = tasks.create_task(decode.run(), name=f"steps of {info.worker_id}")
        try:
            yield
        finally:
            stepping.cancel()
            await server.stop(None)


def worker_info(worker_id: str, role: cluster_pb2.Role.ValueType, model: str) -> cluster_pb2.WorkerInfo:
    return cluster_pb2.WorkerInfo(
        worker_id=worker_id,
        role=role,
        state=cluster_pb2.WORKER_STATE_READY,
        model=model,
        layout=cluster_pb2.KvLayout(block_size_tokens=BLOCK_TOKENS, fingerprint=b"timed"),
        max_model_len_tokens=MAX_MODEL_LEN_TOKENS,
        engine="timed",
        incarnation=secrets.token_hex(8),
    )


async def serve(given: argparse.Namespace) -> None:
    """Until standard input ends."""
    roles = [cluster_pb2.ROLE_PREFILL] * given.prefill + [cluster_pb2.ROLE_DECODE] * given.decode
    async with (
        connect(EtcdConfig(endpoints=[given.etcd])) as etcd,
        contextlib.AsyncExitStack() as stack,
    ):
        for number, role in enumerate(roles):
            kind = "prefill" if role == cluster_pb2.ROLE_PREFILL else "decode"
            info = worker_info(f"{kind}-{number}", role, given.model)
            await stack.enter_async_context(timed_worker(info, given.prefill_s, given.step_s))
            key = membership.worker_key("default", info.worker_id)
            await stack.enter_async_context(membership.register(etcd, key, info))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--etcd", required=True, metavar="HOST:PORT")
    options.add_argument("--model", required=True, help="the name that clients use")
    options.add_argument("--prefill", type=int, default=16, help="prefill workers")
    options.add_argument("--decode", type=int, default=16, help="decode workers")
    options.add_argument("--prefill-s", type=float, default=0.02, help="seconds of a prompt")
    options.add_argument("--step-s", type=float, default=0.02, help="seconds of a decode step")
    uvloop.run(serve(options.parse_args()))


if __name__ == "__main__":
    main()
