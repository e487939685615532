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
    """Turns the outputs of one call, which hold only what is new, into its responses.

    What `resume` says is what the client has: it comes out first and is left out.
    """

    def __init__(
        self,
        request_id: str,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None,
        resume: inference_pb2.Resume | None = None,
    ) -> None:
        self._num_had_tokens = len(resume.token_ids) if resume else 0
        self._num_had_chars = resume.num_text_chars if resume else 0
        self._request_id = request_id
        self._num_logprobs = num_logprobs
        self._num_prompt_logprobs = num_prompt_logprobs
        self._num_completion_tokens = 0

    def responses(self, output: RequestOutput) -> Iterator[inference_pb2.GenerateResponse]:
        """One response per completion with news; the last one of the call has the usage."""
        for position, completion in enumerate(output.outputs):
            self._num_completion_tokens += len(completion.token_ids)
            response = self._response(completion)
            tokens = list(output.prompt_token_ids or ())[1:]
            # Without rows for them they are what the client has, or have come before.
            if len(output.prompt_logprobs or ()) > 1 and self._num_prompt_logprobs is not None:
                response.prompt_logprobs.extend(
                    _token_logprobs(tokens, output.prompt_logprobs[1:], self._num_prompt_logprobs)
                )
            if output.finished and position == len(output.outputs) - 1:
                response.usage.prompt_tokens = len(output.prompt_token_ids or ())
                response.usage.completion_tokens = self._num_completion_tokens
            if response.token_ids or response.text or response.finish_reason or response.prompt_logprobs:
                yield response

    def _response(self, completion: CompletionOutput) -> inference_pb2.GenerateResponse:
        num_had_tokens = min(self._num_had_tokens, len(completion.token_ids))
        num_had_chars = min(self._num_had_chars, len(completion.text))
        self._num_had_tokens -= num_had_tokens
        self._num_had_chars -= num_had_chars
        token_ids = completion.token_ids[num_had_tokens:]
        response = inference_pb2.GenerateResponse(
            request_id=self._request_id,
            index=completion.index,
            text=completion.text[num_had_chars:],
            token_ids=token_ids,
            finish_reason=_FINISH_REASONS[completion.finish_reason],
        )
        if completion.stop_reason is not None:
            response.stop_reason = str(completion.stop_reason)
        if completion.logprobs is not None and self._num_logprobs is not None:
            response.logprobs.extend(_token_logprobs(token_ids, completion.logprobs, self._num_logprobs))
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
