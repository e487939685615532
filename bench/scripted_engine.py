"""An engine without latency and without work, for measuring what is in front of engines."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.engine_controls import EngineControls
from kvrelay.coordinator.front_end import FrontEnd


class ScriptedEngine(EngineControls):
    """Yields `max_tokens` times the same word as vLLM's output processor would, one token per output."""

    is_running = True
    is_stopped = False
    errored = False
    dead_error = RuntimeError("never")

    def __init__(self, front_end: FrontEnd, word: str = " word") -> None:
        self.vllm_config = front_end.vllm_config
        self.model_config = front_end.model_config
        self.renderer = front_end.renderer
        self.input_processor = front_end.input_processor
        self._word = word

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        token_ids = prompt["prompt_token_ids"]
        num_tokens = sampling_params.max_tokens or 1
        if sampling_params.output_kind is RequestOutputKind.FINAL_ONLY:
            yield self._output(request_id, token_ids, num_tokens, "length")
            return
        for position in range(num_tokens):
            yield self._output(request_id, token_ids, 1, "length" if position == num_tokens - 1 else None)

    def _output(self, request_id: str, prompt_ids: list[int], num_tokens: int, finish: str | None) -> RequestOutput:
        completion = CompletionOutput(
            index=0,
            text=self._word * num_tokens,
            token_ids=[2277] * num_tokens,
            cumulative_logprob=None,
            logprobs=None,
            finish_reason=finish,
        )
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=prompt_ids,
            prompt_logprobs=None,
            outputs=[completion],
            finished=finish is not None,
        )

    async def abort(self, *_: Any, **__: Any) -> None: ...

    async def is_tracing_enabled(self) -> bool:
        return False

    async def check_health(self) -> None: ...

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None: ...
