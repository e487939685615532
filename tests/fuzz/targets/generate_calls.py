"""Whatever a client asks of the Inference service, it gets an answer or an error that says what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from google.protobuf.message import DecodeError, Message

from kvrelay.coordinator.inference_service import InferenceService
from kvrelay.v1 import common_pb2, inference_pb2
from tests.fuzz.calls import AbortedError, Call
from tests.fuzz.front_end import front_end
from tests.fuzz.target import AsyncCheck, Target, in_loop
from tests.support.fake_cluster import FakeCluster, fake_cluster

_SCRIPT = [5, 6, 7, 8]
_GENERATE, _TOKENIZE, _DETOKENIZE = range(3)


@contextlib.asynccontextmanager
async def _open() -> AsyncIterator[AsyncCheck]:
    async with fake_cluster(front_end(), _SCRIPT) as cluster:
        service = InferenceService(cluster.engine)
        yield lambda data: _check(cluster, service, data)


async def _check(cluster: FakeCluster, service: InferenceService, data: bytes) -> None:
    """The first byte says which call it is."""
    if not data:
        return
    context = cast("Any", Call())
    with contextlib.suppress(DecodeError, AbortedError):
        match data[0] % 3:
            case 0:
                request = inference_pb2.GenerateRequest.FromString(data[1:])
                await service.Generate(request, context)
            case 1:
                await service.Tokenize(inference_pb2.TokenizeRequest.FromString(data[1:]), context)
            case 2:
                await service.Detokenize(inference_pb2.DetokenizeRequest.FromString(data[1:]), context)
    cluster.assert_nothing_requested()
    for worker in (cluster.prefill, cluster.decode):
        worker.received.clear()


def _seeds() -> Iterator[bytes]:
    user = inference_pb2.ChatMessage(role="user", content="Hi?")
    chat = inference_pb2.Chat(messages=[user])
    sampling = common_pb2.SamplingParams(max_tokens=3, temperature=0.5, seed=1, top_k=3, logprobs=2, stop=["x"])
    penalties = common_pb2.SamplingParams(max_tokens=4, presence_penalty=1, min_tokens=2, bad_words=["no"])
    ids = common_pb2.TokenIds(ids=range(1000, 1020))
    requests: list[tuple[int, Message]] = [
        (_GENERATE, inference_pb2.GenerateRequest(chat=chat, sampling=sampling, request_id="r", include_timeline=True)),
        (_GENERATE, inference_pb2.GenerateRequest(token_ids=ids, sampling=penalties, cache_salt="s", priority=3)),
        (_GENERATE, inference_pb2.GenerateRequest(text="one two three", sampling=common_pb2.SamplingParams(n=2))),
        (_TOKENIZE, inference_pb2.TokenizeRequest(chat=chat)),
        (_TOKENIZE, inference_pb2.TokenizeRequest(text="one two", add_special_tokens=False)),
        (_DETOKENIZE, inference_pb2.DetokenizeRequest(token_ids=[1, 2, 3])),
    ]
    for kind, request in requests:
        yield bytes([kind]) + request.SerializeToString()


TARGET = Target("generate_calls", "requests to the Inference service", lambda: in_loop(_open), _seeds)
