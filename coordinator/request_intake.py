"""What is checked and made of a request between its caller and the dispatcher?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreRequest

from kvrelay.coordinator.flow_request import Completion, FlowRequest
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.prompt_limits import check_prompt, check_request, clamp_max_tokens
from kvrelay.coordinator.request_terms import RequestTerms
from kvrelay.errors import InvalidRequestError
from kvrelay.sampling import to_proto
from kvrelay.v1 import inference_pb2

TASKS: tuple[SupportedTask, ...] = ("generate",)


class RequestIntake:
    """vLLM's own processing between our checks."""

    def __init__(self, front_end: FrontEnd, *, max_completions_per_request: int) -> None:
        self._model_config = front_end.model_config
        self._input_processor = front_end.input_processor
        self._vocab_size = self._model_config.get_vocab_size()
        self._max_completions = max_completions_per_request

    async def process(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        *,
        tokenization_kwargs: dict[str, Any] | None = None,
        priority: int = 0,
    ) -> EngineCoreRequest:
        """A prompt in any of vLLM's forms; raw ones are tokenized in a thread. Raises `InvalidRequestError`."""
        if isinstance(prompt, dict) and "type" in prompt:
            return self.process_rendered(prompt, params, request_id, priority=priority)
        check_request(params, priority, max_completions=self._max_completions)
        process = self._input_processor.process_inputs_async
        arguments = {"tokenization_kwargs": tokenization_kwargs, "priority": priority}
        return self._checked(await process(request_id, prompt, params, TASKS, **arguments))

    def process_rendered(
        self, prompt: Any, params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> EngineCoreRequest:
        """What vLLM's renderer has made of a prompt. Raises `InvalidRequestError`."""
        check_request(params, priority, max_completions=self._max_completions)
        if prompt["type"] != "token":
            raise InvalidRequestError(f"prompts of type {prompt['type']!r} are not offered", field="prompt")
        self.check_prompt(prompt["prompt_token_ids"])
        return self._checked(self._input_processor.process_inputs(request_id, prompt, params, TASKS, priority=priority))

    def flow_request(
        self,
        request: EngineCoreRequest,
        children: Sequence[EngineCoreRequest],
        terms: RequestTerms,
        resume: Sequence[inference_pb2.Resume] = (),
    ) -> FlowRequest:
        """What the dispatcher gets of a request that has its id. Raises `InvalidRequestError`."""
        assert request.external_req_id is not None
        assert request.prompt_token_ids is not None
        flow_request = FlowRequest(
            request_id=request.request_id,
            external_id=request.external_req_id,
            prompt_token_ids=request.prompt_token_ids,
            completions=_completions(children, resume),
            max_model_len_tokens=self._model_config.max_model_len,
            cache_salt=request.cache_salt or "",
            priority=request.priority,
            terms=terms,
        )
        if resume:
            self._check_resumed(flow_request)
        return flow_request

    def _check_resumed(self, request: FlowRequest) -> None:
        if not request.open_completions:
            raise InvalidRequestError("resume says that all completions have ended", field="resume")
        for completion in request.open_completions:
            num_had, limit = len(completion.generated_token_ids), completion.sampling.max_tokens
            if num_had >= limit:
                raise InvalidRequestError(
                    f"resume has {num_had} tokens; with max_tokens {limit} nothing would be left", field="resume"
                )
        for completion in request.completions:
            self.check_prompt([*request.prompt_token_ids, *completion.generated_token_ids])

    def _checked(self, request: EngineCoreRequest) -> EngineCoreRequest:
        token_ids = request.prompt_token_ids
        if token_ids is None or request.mm_features or request.prompt_embeds is not None:
            raise InvalidRequestError("only prompts of text or token ids are offered", field="prompt")
        self.check_prompt(token_ids)
        assert request.sampling_params is not None
        clamp_max_tokens(request.sampling_params, len(token_ids), self._model_config.max_model_len)
        return request

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Raises `InvalidRequestError`."""
        check_prompt(token_ids, max_model_len_tokens=self._model_config.max_model_len, vocab_size=self._vocab_size)


def _completions(children: Sequence[EngineCoreRequest], resume: Sequence[inference_pb2.Resume]) -> Sequence[Completion]:
    begun = {each.index: each for each in resume}
    if unknown := [index for index in begun if index >= len(children)]:
        raise InvalidRequestError(f"resume has index {unknown[0]}, and n is {len(children)}", field="resume")
    if any(each.is_finished and not each.token_ids for each in resume):
        raise InvalidRequestError("resume says that a completion without a token has ended", field="resume")
    nothing = inference_pb2.Resume()
    return [
        Completion(
            request_id=child.request_id,
            sampling=to_proto(child.params),
            generated_token_ids=list(begun.get(index, nothing).token_ids),
            is_finished=begun.get(index, nothing).is_finished,
        )
        for index, child in enumerate(children)
    ]
