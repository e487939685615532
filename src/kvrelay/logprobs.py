"""Log probabilities between vLLM's arrays and their message."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from kvrelay.v1 import common_pb2


def lists_to_proto(lists: LogprobsLists) -> common_pb2.Logprobs:
    """Log probabilities of the sampled tokens of one request, one row per token."""
    return _rows_to_proto(lists.logprob_token_ids, lists.logprobs, lists.sampled_token_ranks)


def tensors_to_proto(tensors: LogprobsTensors) -> common_pb2.Logprobs:
    """Log probabilities of prompt tokens, one row per token but the first."""
    return _rows_to_proto(
        tensors.logprob_token_ids.cpu().numpy(),
        tensors.logprobs.cpu().numpy(),
        tensors.selected_token_ranks.cpu().numpy(),
    )


def proto_to_lists(logprobs: common_pb2.Logprobs) -> LogprobsLists:
    """int32 ids `[n, width]`, float32 logarithms `[n, width]`, int32 ranks `[n]`."""
    return LogprobsLists(*_proto_to_rows(logprobs), None)


def proto_to_tensors(logprobs: common_pb2.Logprobs) -> LogprobsTensors:
    """The same as CPU tensors."""
    token_ids, values, ranks = _proto_to_rows(logprobs)
    return LogprobsTensors(torch.from_numpy(token_ids), torch.from_numpy(values), torch.from_numpy(ranks))


def _rows_to_proto(token_ids: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> common_pb2.Logprobs:
    if token_ids.ndim != 2 or token_ids.shape != values.shape or ranks.shape != token_ids.shape[:1]:
        raise ValueError(
            f"log probabilities need ids and values of one shape [n, width] and n ranks, "
            f"got {token_ids.shape}, {values.shape} and {ranks.shape}"
        )
    return common_pb2.Logprobs(
        width=token_ids.shape[1],
        token_ids=token_ids.ravel().tolist(),
        logprobs=values.ravel().tolist(),
        sampled_ranks=ranks.tolist(),
    )


def _proto_to_rows(logprobs: common_pb2.Logprobs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (len(logprobs.sampled_ranks), logprobs.width)
    if len(logprobs.token_ids) != shape[0] * shape[1] or len(logprobs.logprobs) != len(logprobs.token_ids):
        raise ValueError(
            f"log probabilities of {shape[0]} tokens and width {shape[1]} came with "
            f"{len(logprobs.token_ids)} ids and {len(logprobs.logprobs)} values"
        )
    return (
        np.array(logprobs.token_ids, dtype=np.int32).reshape(shape),
        np.array(logprobs.logprobs, dtype=np.float32).reshape(shape),
        np.array(logprobs.sampled_ranks, dtype=np.int32),
    )
