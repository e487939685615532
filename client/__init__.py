"""The client library: `Client` blocks, `AsyncClient` is for asyncio; both speak the gRPC Inference service.

    from kvrelay.client import Client

    with Client("localhost:50051") as client:
        for chunk in client.stream("The capital of France is", max_tokens=16):
            print(chunk.text, end="")

The names below are the public ones, which is why this file, unlike those of the other components, is not empty.
"""

from kvrelay.client.async_client import AsyncClient, AsyncStream
from kvrelay.client.blocking_client import Client, Stream
from kvrelay.client.connection import UnreachableError
from kvrelay.client.options import GenerateOptions, Message, SamplingOptions
from kvrelay.client.results import (
    Chunk,
    Completion,
    Generation,
    Model,
    Timeline,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from kvrelay.errors import (
    DeadlineError,
    GenerationFailedError,
    InvalidRequestError,
    KvrelayError,
    ModelNotFoundError,
    NoWorkersError,
    OverloadedError,
    RequestTooLargeError,
    WorkerLostError,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineError",
    "GenerateOptions",
    "Generation",
    "GenerationFailedError",
    "InvalidRequestError",
    "KvrelayError",
    "Message",
    "Model",
    "ModelNotFoundError",
    "NoWorkersError",
    "OverloadedError",
    "RequestTooLargeError",
    "SamplingOptions",
    "Stream",
    "Timeline",
    "TokenLogprob",
    "TokenLogprobs",
    "UnreachableError",
    "Usage",
    "WorkerLostError",
]
