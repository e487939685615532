"""A sampler that goes on for another one draws and counts as that one would have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from kvrelay.engine.continuations import Continuations, draw_again
from kvrelay.kv_transfer.generated_before import NUM_GENERATED_TOKENS

VOCAB = 32


def seeded(seed: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator


@pytest.mark.parametrize("way", ["forward_cpu", "forward_native"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_a_generator_stands_where_the_other_stood(way: str, num_tokens: int) -> None:
    current_platform.import_kernels()
    sampler = TopKTopPSampler()
    sampler.forward = getattr(sampler, way)
    logits = torch.randn(12, VOCAB, generator=seeded(1))

    def draw(generator: torch.Generator, rows: range) -> list[int]:
        sampled = [sampler.forward(logits[row : row + 1].clone(), {0: generator}, None, None)[0] for row in rows]
        return [int(each) for each in sampled]

    whole = draw(seeded(5), range(12))
    other = seeded(5)
    draw_again(sampler, other, num_tokens, VOCAB)
    assert draw(other, range(num_tokens, 12)) == whole[num_tokens:]


class Runner:
    """What of a model runner is used: two requests, of which the second goes on for another engine."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.sampler: Any = SimpleNamespace(forward=self._sample, topk_topp_sampler=TopKTopPSampler())
        self.requests = {name: SimpleNamespace(generator=None) for name in "ab"}
        self.input_batch: Any = SimpleNamespace(
            vocab_size=VOCAB, req_id_to_index={"a": 0, "b": 1}, num_prompt_tokens=[2, 5]
        )

    def _sample(self, logits: Any, metadata: Any, **_: Any) -> None:
        self.seen.append(metadata)


def scheduled(*new: tuple[str, list[int], int], finished: set[str] | None = None) -> Any:
    requests = [
        SimpleNamespace(
            req_id=name,
            prompt_token_ids=prompt,
            sampling_params=SimpleNamespace(extra_args={NUM_GENERATED_TOKENS: num_generated}),
        )
        for name, prompt, num_generated in new
    ]
    return SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=finished or set())


def metadata(output: list[list[int]], prompts: torch.Tensor | None) -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    nothing = torch.zeros(2)
    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=prompts is None,
        prompt_token_ids=prompts,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=output,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def test_the_end_of_a_prompt_counts_as_output_until_the_request_is_over() -> None:
    runner: Any = Runner()
    continuations = Continuations(runner)
    continuations.follow(scheduled(("a", [1, 2], 0), ("b", [3, 4, 5, 6, 7], 2)))
    prompts = torch.tensor([[1, 2, VOCAB, VOCAB, VOCAB], [3, 4, 5, 6, 7]])
    output: list[list[int]] = [[8], []]
    for count in range(2):
        runner.sampler.forward(None, metadata(output, prompts))
        seen = runner.seen[-1]
        assert seen.output_token_ids == [[8], [6, 7, *([9] * count)]]
        assert seen.prompt_token_ids.tolist() == [[1, 2, VOCAB, VOCAB, VOCAB], [3, 4, 5, VOCAB, VOCAB]]
        output[1].append(9)
    assert prompts[1].tolist() == [3, 4, 5, 6, 7]
    continuations.follow(scheduled(finished={"b"}))
    unchanged = metadata(output, prompts)
    runner.sampler.forward(None, unchanged)
    assert runner.seen[-1] is unchanged


def test_what_needs_no_account_of_tokens_gets_none() -> None:
    runner: Any = Runner()
    continuations = Continuations(runner)
    continuations.follow(scheduled(("b", [3, 4, 5, 6, 7], 2)))
    runner.sampler.forward(None, metadata([], None))
    assert runner.seen[-1].output_token_ids == []
    assert runner.seen[-1].prompt_token_ids is None
