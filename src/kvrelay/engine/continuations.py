"""How does vLLM's sampler go on where that of another engine was interrupted?

A request that has lost its engine comes again with a prompt that ends with what was generated. The KV of these tokens
is that of any prompt; but penalties and bad words count them as output, and a seeded generator has drawn once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, empty_exponential_noise_like

from kvrelay.kv_transfer.generated_before import generated_before

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class Continuations:
    """Those in one model runner, whose sampler sees them as their first engine's did from now on.

    Not so with speculative decoding: how often a generator draws for a token depends on what was drafted.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner
        self._generated: dict[str, Sequence[int]] = {}
        """By request, what its prompt ends with."""
        self._sample: Callable[..., SamplerOutput] = runner.sampler.forward
        runner.sampler.forward = self._forward

    def follow(self, scheduled: SchedulerOutput) -> None:
        """Call it when the runner knows the requests of a step and has sampled nothing in it."""
        for request_id in scheduled.finished_req_ids:
            self._generated.pop(request_id, None)
        for new in scheduled.scheduled_new_reqs:
            params = new.sampling_params
            if params is None or not (tokens := generated_before(new.prompt_token_ids, params.extra_args)):
                continue
            self._generated[new.req_id] = tokens
            generator = self._runner.requests[new.req_id].generator
            if generator is not None:
                sampler, vocab_size = self._runner.sampler.topk_topp_sampler, self._runner.input_batch.vocab_size
                draw_again(sampler, generator, len(tokens), vocab_size)

    def _forward(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
    ) -> SamplerOutput:
        if self._generated:
            sampling_metadata = self._continued(sampling_metadata)
        return self._sample(logits, sampling_metadata, *args, **kwargs)

    def _continued(self, metadata: SamplingMetadata) -> SamplingMetadata:
        """With the ends of prompts as output."""
        batch = self._runner.input_batch
        indices = batch.req_id_to_index
        rows = {indices[each]: tokens for each, tokens in self._generated.items() if each in indices}
        outputs, prompts = metadata.output_token_ids, metadata.prompt_token_ids
        if outputs:
            outputs = [[*rows.get(row, ()), *output] for row, output in enumerate(outputs)]
        if prompts is not None:
            prompts = prompts.clone()
            for row, tokens in rows.items():
                end = int(batch.num_prompt_tokens[row])
                prompts[row, end - len(tokens) : end] = batch.vocab_size  # As the places after a prompt's end.
        return replace(metadata, output_token_ids=outputs, prompt_token_ids=prompts)


def draw_again(sampler: TopKTopPSampler, generator: torch.Generator, num_tokens: int, vocab_size: int) -> None:
    """Draw from a request's generator what vLLM draws for so many tokens (`forward_cpu` and `random_sample` there)."""
    draws_seeds = sampler.forward == sampler.forward_cpu and not sampler.use_fp64_gumbel
    if draws_seeds:
        for _ in range(num_tokens):
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        return
    probs = torch.empty(vocab_size, dtype=torch.float32, device=generator.device)
    noise = empty_exponential_noise_like(probs, sampler.use_fp64_gumbel)
    for _ in range(num_tokens):
        noise.exponential_(generator=generator)
