"""Whatever a worker says to a coordinator, its clients get an answer or an error, and nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from google.protobuf.message import DecodeError
from vllm.exceptions import VLLMValidationError

from kvrelay.coordinator.vllm_errors import ClusterRequestError
from kvrelay.errors import KvrelayError
from kvrelay.v1 import common_pb2, worker_pb2
from tests.fuzz.front_end import front_end
from tests.fuzz.target import BETWEEN, AsyncCheck, Target, in_loop, joined, pieces
from tests.support.eventually import eventually
from tests.support.fake_cluster import FakeCluster, fake_cluster
from tests.support.fake_worker import delta

_Message = worker_pb2.WorkerMessage
_PROMPT = range(1000, 1020)
_KNOWN = ("outputs could not be processed",)
"""By vLLM: log probabilities that nobody has asked for, for example."""
_ANSWER_S = 0.01
_REQUESTS = ({"max_tokens": 4, "temperature": 0}, {"max_tokens": 3, "n": 2, "logprobs": 1})


@contextlib.asynccontextmanager
async def _open() -> AsyncIterator[AsyncCheck]:
    async with fake_cluster(front_end()) as cluster:
        yield lambda data: _check(cluster, data)


async def _check(cluster: FakeCluster, data: bytes) -> None:
    """The first byte of each message says which worker says it."""
    workers = [cluster.prefill, cluster.decode]
    for worker in workers:  # As if they were new: nobody is avoided for what they said before.
        cluster.pool.leave(worker.info.worker_id)
        cluster.pool.join(worker.info)
        worker.received.clear()
    await eventually(lambda: len(cluster.pool.workers()) == len(workers), "both are connected")
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(_read(cluster, number)) for number in range(len(_REQUESTS))]
        await eventually(lambda: len(cluster.prefill.messages("prefill")) == len(_REQUESTS), "both prompts are sent")
        for piece in pieces(data):
            if piece:
                with contextlib.suppress(DecodeError):
                    message = _about_requests(_Message.FromString(piece[1:]), cluster)
                    workers[piece[0] % 2]._outbox.put_nowait(message)
                    await asyncio.sleep(0)
        await asyncio.wait(clients, timeout=_ANSWER_S)
        for client in clients:
            client.cancel()
    cluster.assert_nothing_requested()


async def _read(cluster: FakeCluster, number: int) -> None:
    with contextlib.suppress(KvrelayError, ClusterRequestError, VLLMValidationError):
        await cluster.generate(list(_PROMPT), f"r{number}", **_REQUESTS[number])


def _about_requests(message: _Message, cluster: FakeCluster) -> _Message:
    """Ids that nobody guesses are put in: which one, the length of the given one says."""
    received = [*cluster.prefill.received, *cluster.decode.received]
    ids = [getattr(each, each.WhichOneof("message")).request_id for each in received]
    told = [message.failed] if message.HasField("failed") else message.step.deltas
    for part in told:
        if len(part.request_id) % 8:
            part.request_id = ids[len(part.request_id) % len(ids)]
    return message


def _seeds() -> Iterator[bytes]:
    length, stop = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP
    row = common_pb2.Logprobs(width=1, token_ids=[5], logprobs=[-0.5], sampled_ranks=[1])

    def said(worker: int, *deltas: worker_pb2.TokenDelta) -> bytes:
        return bytes([worker]) + _Message(step=worker_pb2.StepOutputs(deltas=deltas)).SerializeToString()

    failed = worker_pb2.RequestFailed(request_id="x", reason=worker_pb2.RequestFailed.REASON_INTERNAL, message="no")
    status = worker_pb2.WorkerStatus(worker_id="p1", num_running_requests=3, engine_kv_usage=0.5)
    beat = worker_pb2.Heartbeat(next_message_bytes=1000, busy_ms=100)
    yield joined([said(0, delta("xx", [5], length)), said(1, delta("xx", [6, 7])), said(1, delta("xx", [8], length))])
    yield joined([said(0, delta("x", [5], stop, stop_token_id=5)), b"\0" + _Message(failed=failed).SerializeToString()])
    yield joined([said(0, delta("x", [5], length, logprobs=row, num_cached_tokens=16, kv_failed=True))])
    yield joined(
        bytes([1]) + message.SerializeToString() for message in (_Message(status=status), _Message(heartbeat=beat))
    )
    yield said(0, delta("x", [5], common_pb2.FINISH_REASON_ABORT), delta("xx", [1 << 31]))


TARGET = Target("worker_messages", "a Session stream of a worker", lambda: in_loop(_open, _KNOWN), _seeds, (BETWEEN,))
