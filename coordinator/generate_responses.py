"""vLLM's request outputs as messages of the Inference service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from kvrelay.v1 import common_pb2, inference_pb2

_FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "abort": common_pb2.FINISH_REASON_ABORT,
    "error": common_pb2.FINISH_REASON_ERROR,
    "repetition": common_pb2.FINISH_REASON_REPETITION,
}


class ResponseBuilder:
    """Turns the outputs of one call, which hold only what is new, into its responses."""

    def __init__(self, request_id: str, num_logprobs: int | None, num_prompt_logprobs: int | None) -> None:
        self._request_id = request_id
        self._num_logprobs = num_logprobs
        self._num_prompt_logprobs = num_prompt_logprobs
        self._num_completion_tokens = 0

    def responses(self, output: RequestOutput) -> Iterator[inference_pb2.GenerateResponse]:
        """One response per completion with news; the last one of the call has the usage."""
        for position, completion in enumerate(output.outputs):
            self._num_completion_tokens += len(completion.token_ids)
            response = self._response(completion)
            if output.prompt_logprobs and self._num_prompt_logprobs is not None:
                tokens = list(output.prompt_token_ids or ())[1:]
                response.prompt_logprobs.extend(
                    _token_logprobs(tokens, output.prompt_logprobs[1:], self._num_prompt_logprobs)
                )
            if output.finished and position == len(output.outputs) - 1:
                response.usage.prompt_tokens = len(output.prompt_token_ids or ())
                response.usage.completion_tokens = self._num_completion_tokens
            yield response

    def _response(self, completion: CompletionOutput) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse(
            request_id=self._request_id,
            index=completion.index,
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=_FINISH_REASONS[completion.finish_reason],
        )
        if completion.stop_reason is not None:
            response.stop_reason = str(completion.stop_reason)
        if completion.logprobs is not None and self._num_logprobs is not None:
            response.logprobs.extend(_token_logprobs(completion.token_ids, completion.logprobs, self._num_logprobs))
        return response


def _token_logprobs(
    token_ids: Sequence[int], rows: Sequence[Mapping[int, Logprob] | None], num_top: int
) -> Iterator[inference_pb2.TokenLogprobs]:
    """One message per token: itself and the `num_top` most likely (all that are known for -1), likeliest first."""
    for token_id, row in zip(token_ids, rows, strict=True):
        if row is None:
            continue
        limit = len(row) if num_top < 0 else num_top
        likely = sorted(row.items(), key=lambda item: item[1].rank or 0)
        yield inference_pb2.TokenLogprobs(
            sampled=_token_logprob(token_id, row[token_id]),
            top=[_token_logprob(id_, logprob) for id_, logprob in likely if 0 < (logprob.rank or 0) <= limit],
        )


def _token_logprob(token_id: int, logprob: Logprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=token_id,
        token=logprob.decoded_token or "",
        logprob=logprob.logprob,
        rank=logprob.rank or 0,
    )
