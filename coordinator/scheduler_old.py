"""Which workers serve a request. Pure code: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable

from kvrelay.coordinator.scheduler.decision import Plan
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.errors import InvalidRequestError, NoWorkersError


def plan(request: RequestShape, workers: Iterable[WorkerView]) -> Plan:
    """Take the decode worker with the fewest sequences and the prefill worker with the fewest queued tokens.

    Both serve the model, have room for the prompt and one token, and share one KV layout. Workers with
    equal load take turns. A prompt without one full KV block is not worth a hand-off. Raises
    `NoWorkersError`, or `InvalidRequestError` when the prompt is too long for every worker.
    """
    serving = [worker for worker in workers if worker.model == request.model and not worker.draining]
    decoders = [worker for worker in serving if worker.decodes]
    if not decoders:
        raise NoWorkersError(f"no decode worker serves model {request.model!r} now; try again later")
    fitting = [worker for worker in decoders if _has_room(worker, request)]
    if not fitting:
        limit = max(worker.max_model_len_tokens for worker in decoders)
        raise InvalidRequestError(
            f"the prompt has {request.num_prompt_tokens} tokens; with one generated token it must fit into {limit}",
            field="prompt",
        )
    decode = min(fitting, key=_decode_load)
    if request.num_prompt_tokens < decode.block_size_tokens:
        return Plan(prefill=None, decode=decode)
    prefillers = (
        worker
        for worker in serving
        if worker.prefills
        and worker is not decode
        and worker.fingerprint == decode.fingerprint
        and _has_room(worker, request)
    )
    return Plan(prefill=min(prefillers, key=_prefill_load, default=None), decode=decode)


def _has_room(worker: WorkerView, request: RequestShape) -> bool:
    return request.num_prompt_tokens < worker.max_model_len_tokens


def _decode_load(worker: WorkerView) -> tuple[int, int, str]:
    return worker.num_running_requests, worker.num_assigned, worker.worker_id


def _prefill_load(worker: WorkerView) -> tuple[int, int, str]:
    return worker.num_queued_prompt_tokens, worker.num_assigned, worker.worker_id
