"""Which requests does the gRPC API take? The same limits as the OpenAI API, checked before anything is computed."""

from __future__ import annotations

from kvrelay.coordinator.json_checks import string, token_ids
from kvrelay.coordinator.prompt_limits import MAX_CACHE_SALT_CHARS
from kvrelay.coordinator.request_limits import RequestBounds
from kvrelay.coordinator.sampling_checks import check_sampling
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import inference_pb2


def check_generate(request: inference_pb2.GenerateRequest, bounds: RequestBounds) -> None:
    """Raises `InvalidRequestError`. The prompt's length is checked where its tokens are known."""
    string(MAX_CACHE_SALT_CHARS)("cache_salt", request.cache_salt, bounds)
    _check_chat(request.chat, bounds)
    check_sampling(request.sampling, bounds)


def check_tokenize(request: inference_pb2.TokenizeRequest, bounds: RequestBounds) -> None:
    """Raises `InvalidRequestError`. What is tokenized need not fit into the model's context."""
    _check_chat(request.chat, bounds)
    num_chars = len(request.text) + sum(len(message.content) for message in request.chat.messages)
    most = bounds.limits.max_tokenize_chars
    if num_chars > most:
        raise InvalidRequestError(f"the input has {num_chars} characters; at most {most} are taken", field="input")


def check_detokenize(request: inference_pb2.DetokenizeRequest, bounds: RequestBounds) -> None:
    """Raises `InvalidRequestError`."""
    token_ids(lambda bounds: bounds.limits.max_detokenize_tokens)("token_ids", list(request.token_ids), bounds)


def _check_chat(chat: inference_pb2.Chat, bounds: RequestBounds) -> None:
    num_messages, most = len(chat.messages), bounds.limits.max_messages
    if num_messages > most:
        raise InvalidRequestError(f"chat has {num_messages} messages; at most {most} are taken", field="chat.messages")
