"""Which workers may serve a request at all, and which of them together?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.errors import InvalidRequestError, NoWorkersError


@dataclass(slots=True)
class Group:
    """Workers with one KV layout: any of its prefill workers can hand over to any other of its decode workers."""

    decoders: list[WorkerView] = field(default_factory=list)
    prefillers: list[WorkerView] = field(default_factory=list)
    """None for a prompt without one full block: that is not worth a hand-off."""


def eligible_groups(request: RequestShape, workers: Sequence[WorkerView]) -> Sequence[Group]:
    """Those that serve the model, do not drain and have room for the prompt and one token; each has a decode worker.

    Workers to be avoided are among them where no decode worker would be left. Raises `NoWorkersError`, or
    `InvalidRequestError` when the prompt is too long for every decode worker.
    """
    preferred = [worker for worker in workers if not worker.avoided]
    found = _groups(request, preferred)
    if not found and len(preferred) < len(workers):
        found = _groups(request, workers)
    if found:
        return found
    if longest := _longest(request, workers):
        num_tokens = request.num_prompt_tokens
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens; with one generated token it must fit into {longest}", field="prompt"
        )
    raise NoWorkersError(f"no decode worker serves model {request.model!r} now; try again later")


def _groups(request: RequestShape, workers: Iterable[WorkerView]) -> list[Group]:
    groups: dict[bytes, Group] = {}
    model, num_tokens = request.model, request.num_prompt_tokens
    for worker in workers:
        if worker.model != model or worker.draining or num_tokens >= worker.max_model_len_tokens:
            continue
        group = groups.get(worker.fingerprint)
        if group is None:
            group = groups[worker.fingerprint] = Group()
        if worker.decodes:
            group.decoders.append(worker)
        if worker.prefills and num_tokens >= worker.block_size_tokens:
            group.prefillers.append(worker)
    return [group for group in groups.values() if group.decoders]


def _longest(request: RequestShape, workers: Iterable[WorkerView]) -> int:
    """Context of the decode worker that has most; 0 without one."""
    serving = (each for each in workers if each.model == request.model and not each.draining and each.decodes)
    return max((worker.max_model_len_tokens for worker in serving), default=0)
