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


def eligible_groups(request: RequestShape, workers: Iterable[WorkerView]) -> Sequence[Group]:
    """Those that serve the model, do not drain and have room for the prompt and one token; each has a decode worker.

    Raises `NoWorkersError`, or `InvalidRequestError` when the prompt is too long for every decode worker.
    """
    groups: dict[bytes, Group] = {}
    model, num_tokens = request.model, request.num_prompt_tokens
    longest = 0
    for worker in workers:
        if worker.model != model or worker.draining:
            continue
        decodes = worker.decodes
        if num_tokens >= worker.max_model_len_tokens:
            longest = max(longest, worker.max_model_len_tokens if decodes else 0)
            continue
        group = groups.get(worker.fingerprint)
        if group is None:
            group = groups[worker.fingerprint] = Group()
        if decodes:
            group.decoders.append(worker)
        if worker.prefills and num_tokens >= worker.block_size_tokens:
            group.prefillers.append(worker)
    found = [group for group in groups.values() if group.decoders]
    if found:
        return found
    if longest:
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens; with one generated token it must fit into {longest}", field="prompt"
        )
    raise NoWorkersError(f"no decode worker serves model {model!r} now; try again later")
