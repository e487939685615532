"""Whatever a coordinator says to a worker, the worker lives on, and nothing of it is left when its session ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from google.protobuf.message import DecodeError

from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2
from tests.fuzz.calls import AbortedError, Call
from tests.fuzz.target import BETWEEN, AsyncCheck, Target, in_loop, joined, pieces
from tests.support.eventually import eventually
from tests.support.simulated_cluster import SimulatedWorker, is_idle, simulated_worker

_CONFIG = SimulatedConfig(num_layers=2, num_kv_heads=1, max_model_len_tokens=256, num_engine_blocks=64, time_scale=0)
_START_S, _ANSWER_S = 0.002, 0.03
"""For what the last message asks for; then the session ends in the middle of it."""
_Message = worker_pb2.CoordinatorMessage


@contextlib.asynccontextmanager
async def _open() -> AsyncIterator[AsyncCheck]:
    async with simulated_worker("w", cluster_pb2.ROLE_BOTH, "m", _CONFIG, Tracing()) as worker:

        async def check(data: bytes) -> None:
            call = Call()
            with contextlib.suppress(AbortedError):
                await worker.service.Session(_messages(data, worker), cast("Any", call))
            await eventually(lambda: is_idle(worker), "nothing is held")
            for message in call.written:
                assert message.failed.reason != worker_pb2.RequestFailed.REASON_INTERNAL, message

        yield check


async def _messages(data: bytes, worker: SimulatedWorker) -> AsyncIterator[_Message]:
    for piece in pieces(data):
        try:
            message = _Message.FromString(piece)
        except DecodeError:
            return
        match message.WhichOneof("message"):
            case "prefill":
                _lead_home(message.prefill, worker)
            case "decode":
                _lead_home(message.decode, worker)
        yield message
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ANSWER_S):
            await asyncio.sleep(_START_S)
            while not is_idle(worker):
                await asyncio.sleep(0)


def _lead_home(request: worker_pb2.Prefill | worker_pb2.Decode, worker: SimulatedWorker) -> None:
    """No name is looked up and nobody else is called."""
    if request.prefix_address:
        request.prefix_address = worker.info.address
    if isinstance(request, worker_pb2.Prefill) and len(request.decode_address) % 2:
        request.decode_address = worker.info.address


def _seeds() -> Iterator[bytes]:
    hello = _Message(hello=worker_pb2.CoordinatorHello(coordinator_id="c", heartbeat_ms=2000))
    sampling = common_pb2.SamplingParams(max_tokens=4, temperature=0, all_stop_token_ids=[2])
    prompt = list(range(40))
    prefill = worker_pb2.Prefill(
        request_id="r", prompt_token_ids=prompt, sampling=sampling, decode_address="a", decode_worker_id="w"
    )
    decode = worker_pb2.Decode(
        request_id="r", prompt_token_ids=[*prompt, 7], sampling=sampling, kv_wait_ms=100, num_generated_tokens=1
    )
    alone = worker_pb2.Decode(request_id="q", prompt_token_ids=prompt, sampling=sampling, prefix_address="a")
    cancel, lost = worker_pb2.Cancel(request_id="r"), worker_pb2.KvLost(request_id="r")
    beat = worker_pb2.Heartbeat(next_message_bytes=1 << 20, busy_ms=100)
    conversations = [
        [hello, _Message(prefill=prefill), _Message(decode=decode)],
        [hello, _Message(decode=alone), _Message(heartbeat=beat), _Message(decode=alone)],
        [hello, _Message(prefill=prefill), _Message(decode=decode), _Message(kv_lost=lost), _Message(cancel=cancel)],
        [_Message(decode=decode)],
    ]
    for conversation in conversations:
        yield joined(message.SerializeToString() for message in conversation)


TARGET = Target("worker_sessions", "a Session stream of a coordinator", lambda: in_loop(_open), _seeds, (BETWEEN,))
