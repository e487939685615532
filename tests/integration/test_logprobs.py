"""Do log probabilities cross the network unchanged?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from kvrelay.logprobs import lists_to_proto, proto_to_lists, proto_to_tensors, tensors_to_proto
from kvrelay.v1 import common_pb2


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 22), st.integers(0, 2**32 - 1))
def test_lists_arrive_exactly(num_tokens: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sent = LogprobsLists(
        random.integers(0, 2**31, (num_tokens, width)).astype(np.int32),
        -random.exponential(10, (num_tokens, width)).astype(np.float32),
        random.integers(1, 2**31, num_tokens).astype(np.int32),
    )
    got = proto_to_lists(common_pb2.Logprobs.FromString(lists_to_proto(sent).SerializeToString()))
    for mine, theirs in zip(got[:3], sent[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype


def test_tensors_arrive_exactly_with_infinities() -> None:
    sent = LogprobsTensors(
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
        torch.tensor([[-0.5, float("-inf")], [-1.25, -3.0]]),
        torch.tensor([1, 7], dtype=torch.int32),
    )
    got = proto_to_tensors(tensors_to_proto(sent))
    assert torch.equal(got.logprob_token_ids, sent.logprob_token_ids)
    assert torch.equal(got.logprobs, sent.logprobs)
    assert torch.equal(got.selected_token_ranks, sent.selected_token_ranks)


def test_contradicting_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens and width 2"):
        proto_to_lists(common_pb2.Logprobs(width=2, token_ids=[1], logprobs=[0.0], sampled_ranks=[1, 1]))
    with pytest.raises(ValueError, match="one shape"):
        lists_to_proto(LogprobsLists(np.zeros((1, 2)), np.zeros((1, 3)), np.zeros(1)))
