"""How is a cluster used from code without an event loop?"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self, Unpack

import grpc
from google.protobuf.message import Message

from kvrelay.client.connection import OPTIONS, UnreachableError, client_error, trace_metadata
from kvrelay.client.coordinators import Coordinators
from kvrelay.client.encoding import generate_request, to_chunk, tokenize_request
from kvrelay.client.options import GenerateOptions, Messages, Prompt
from kvrelay.client.results import Chunk, Collector, Generation, Model
from kvrelay.client.resumption import RECONNECT_FOR_S, Resumption
from kvrelay.errors import KvrelayError
from kvrelay.v1 import inference_pb2, inference_pb2_grpc


class Stream(Iterator[Chunk]):
    """The chunks of one generation, as they come.

    When its coordinator is lost it goes on with another one at the address, where it was.

    `close`, leaving a `with` block, or dropping the stream cancels the generation everywhere; `close` may be called
    from another thread. Raises the errors of `kvrelay.errors`; after an error or the end there is nothing to close.
    """

    def __init__(
        self,
        coordinators: Coordinators[inference_pb2_grpc.InferenceStub],
        resumption: Resumption,
        timeout_s: float | None,
    ) -> None:
        self._coordinators = coordinators
        self._resumption = resumption
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._start()

    def _start(self) -> None:
        resumption = self._resumption
        self._asked = self._coordinators.choose()
        generate = self._asked.stub.Generate
        self._call: Any = generate(resumption.request, timeout=resumption.timeout_s, metadata=trace_metadata())

    def __next__(self) -> Chunk:
        while not self._closed.is_set():
            try:
                response = next(self._call)
            except grpc.RpcError as error:
                if self._closed.is_set():
                    break
                failure = client_error(error, self._asked.address, self._timeout_s)
                if isinstance(failure, UnreachableError):
                    self._coordinators.lost(self._asked)
                    if self._resumption.is_complete:
                        break
                pause_s = self._resumption.pause_s(failure)
                if pause_s is None:
                    raise failure from None
                if not self._closed.wait(pause_s):
                    self._start()
                continue
            self._resumption.took(response)
            return to_chunk(response)
        raise StopIteration

    def close(self) -> None:
        """Cancel what is still running. Idempotent."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._call.cancel()


class Client:
    """A connection to a cluster, for many calls at once and from any thread.

    `address` is host:port of the coordinator's gRPC port. `credentials` (`grpc.ssl_channel_credentials(...)`) turn TLS
    on. `timeout_s` bounds every call that does not bring its own.

    Several addresses may be given, of coordinators of one cluster: the next one is asked when one does not answer. A
    generation whose coordinator is lost goes on with another one, or with its successor at the address; they are tried
    for `reconnect_for_s`, and with 0 it fails.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float | None = None,
        reconnect_for_s: float = RECONNECT_FOR_S,
    ) -> None:
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._reconnect_for_s = reconnect_for_s
        self._channels: list[grpc.Channel] = []
        self._coordinators = Coordinators(address, self._connect)
        self.address = self._coordinators.addresses

    def _connect(self, address: str) -> inference_pb2_grpc.InferenceStub:
        if self._credentials is None:
            channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            channel = grpc.secure_channel(address, self._credentials, options=OPTIONS)
        self._channels.append(channel)
        return inference_pb2_grpc.InferenceStub(channel)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Start a generation and return its chunks. Raises `InvalidRequestError` for options of the wrong type."""
        request = generate_request(prompt, options)
        timeout_s = options.get("timeout_s", self._timeout_s)
        resumption = Resumption(
            request,
            reconnect_for_s=self._reconnect_for_s,
            timeout_s=timeout_s,
            num_coordinators=len(self._coordinators),
        )
        return Stream(self._coordinators, resumption, timeout_s)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Wait for a whole generation. What had come before an error is in its `generated`."""
        collector = Collector()
        try:
            with self.stream(prompt, **options) as chunks:
                for chunk in chunks:
                    collector.add(chunk)
        except KvrelayError as error:
            error.generated = collector.token_ids
            raise
        return collector.result()

    def models(self) -> list[Model]:
        """The models that can be asked for."""
        response = self._unary("ListModels", inference_pb2.ListModelsRequest())
        return [Model(name=m.name, max_model_len_tokens=m.max_model_len_tokens) for m in response.models]

    def tokenize(self, text: str | Messages, *, model: str = "", add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text, or of a conversation in the model's chat template."""
        request = tokenize_request(text, model, add_special_tokens)
        return list(self._unary("Tokenize", request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return str(self._unary("Detokenize", request).text)

    def close(self) -> None:
        """Cancel what is running and disconnect. Idempotent."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unary(self, method: str, request: Message) -> Any:
        for num_left in reversed(range(len(self._coordinators))):
            asked = self._coordinators.choose()
            try:
                return getattr(asked.stub, method)(request, timeout=self._timeout_s, metadata=trace_metadata())
            except grpc.RpcError as error:
                failure = client_error(error, asked.address, self._timeout_s)
                if not (num_left and isinstance(failure, UnreachableError)):
                    raise failure from None
                self._coordinators.lost(asked)
        raise AssertionError("there is a coordinator to ask")
