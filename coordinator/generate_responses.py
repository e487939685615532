"""vLLM's request outputs as messages of the Inference service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(slots=True)
class _Had:
    """What the client has of a completion that comes out again."""

    num_tokens: int
    num_chars: int
    is_finished: bool

    def leave_out(self, token_ids: Sequence[int], text: str) -> tuple[Sequence[int], str]:
        """What of these is new."""
        num_tokens, num_chars = min(self.num_tokens, len(token_ids)), min(self.num_chars, len(text))
        self.num_tokens -= num_tokens
        self.num_chars -= num_chars
        return token_ids[num_tokens:], text[num_chars:]


class ResponseBuilder:
    """Turns the outputs of one call, which hold only what is new, into its responses.

    What `resume` says is what the client has: it comes out first and is left out.
    """

    def __init__(
        self,
        request_id: str,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None,
        resume: Sequence[inference_pb2.Resume] = (),
    ) -> None:
        self._had = {each.index: _Had(len(each.token_ids), each.num_text_chars, each.is_finished) for each in resume}
        self._request_id = request_id
        self._num_logprobs = num_logprobs
        self._num_prompt_logprobs = num_prompt_logprobs
        self._num_completion_tokens = 0

    def responses(self, output: RequestOutput) -> Iterator[inference_pb2.GenerateResponse]:
        """One response per completion with news; the last one of the call has the usage."""
        self._num_completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        shown = [completion for completion in output.outputs if not self._has_all_of(completion)]
        for position, completion in enumerate(shown):
            response = self._response(completion)
            tokens = list(output.prompt_token_ids or ())[1:]
            # Without rows for them they are what the client has, or have come before.
            if len(output.prompt_logprobs or ()) > 1 and self._num_prompt_logprobs is not None:
                response.prompt_logprobs.extend(
                    _token_logprobs(tokens, output.prompt_logprobs[1:], self._num_prompt_logprobs)
                )
            if output.finished and position == len(shown) - 1:
                response.usage.prompt_tokens = len(output.prompt_token_ids or ())
                response.usage.completion_tokens = self._num_completion_tokens
            yield response

    def _has_all_of(self, completion: CompletionOutput) -> bool:
        had = self._had.get(completion.index)
        return had is not None and had.is_finished

    def _response(self, completion: CompletionOutput) -> inference_pb2.GenerateResponse:
        token_ids, text = completion.token_ids, completion.text
        if had := self._had.get(completion.index):
            token_ids, text = had.leave_out(token_ids, text)
        response = inference_pb2.GenerateResponse(
            request_id=self._request_id,
            index=completion.index,
            text=text,
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
