"""Tokens as workers report them, in the shape that vLLM's output processor takes."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from kvrelay.logprobs import proto_to_lists, proto_to_tensors
from kvrelay.v1 import common_pb2, worker_pb2

FINISH_REASONS: dict[int, FinishReason | None] = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
    common_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
    common_pb2.FINISH_REASON_REPETITION: FinishReason.REPETITION,
}


def to_engine_output(delta: worker_pb2.TokenDelta) -> EngineCoreOutput:
    """Raises `ValueError` when the delta contradicts itself."""
    return EngineCoreOutput(
        request_id=delta.request_id,
        new_token_ids=list(delta.token_ids),
        new_logprobs=proto_to_lists(delta.logprobs) if delta.HasField("logprobs") else None,
        new_prompt_logprobs_tensors=(
            proto_to_tensors(delta.prompt_logprobs) if delta.HasField("prompt_logprobs") else None
        ),
        finish_reason=FINISH_REASONS.get(delta.finish_reason, FinishReason.ERROR),
        stop_reason=delta.stop_token_id if delta.HasField("stop_token_id") else None,
        prefill_stats=(
            PrefillStats(num_cached_tokens=delta.num_cached_tokens) if delta.HasField("num_cached_tokens") else None
        ),
    )
