"""Have the workers room for more, and what would they take for it?"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from kvrelay.coordinator.scheduler.estimates import wait_s
from kvrelay.coordinator.scheduler.view import WorkerView

_LEAST_TOKEN_S = 1e-6
_SEQUENCES_AHEAD = 1.25
"""Of those that a worker computes at a time: some of what it is given is still prefilled elsewhere, or about to end."""


class Capacity(Protocol):
    """What the queue asks before it lets requests go."""

    def has_room(self) -> bool:
        """Whether a worker would stand idle soon without more requests."""

    def has_workers(self) -> bool:
        """Whether anybody serves the model."""

    def tokens_per_s(self) -> float:
        """About how many tokens of prompts all workers compute; 0 when unknown."""


class WorkerCapacity:
    """Of the workers that a coordinator sees.

    There is room while one that computes prompts is done with those it has within `dispatch_ahead_s`, and one that
    generates can take another sequence soon. So requests wait here, where their order can still change, and a little
    of the work waits at the workers, so that none of them is idle while a request is on its way. Decode workers compute
    prompts where there is no prefill worker, and when they have nothing else to do; beside other work only where the
    policy may choose them for it, and then it also decides when that is worth while.
    """

    def __init__(
        self,
        views: Callable[[], Collection[WorkerView]],
        model: str,
        *,
        dispatch_ahead_s: float,
        may_prefill_locally: bool,
    ) -> None:
        self._views = views
        self._model = model
        self._ahead_s = dispatch_ahead_s
        self._may_prefill_locally = may_prefill_locally

    def has_room(self) -> bool:
        computes = generates = any_prefill = any_decode = busy_decode_computes = False
        for view in self._views():
            if view.model != self._model or view.draining:
                continue
            any_prefill = any_prefill or view.prefills
            if view.decodes:
                any_decode = True
                generates = generates or _takes_sequences(view)
            if not computes and (not view.num_queued_prompt_tokens or wait_s(view) < self._ahead_s):
                computes = view.prefills or self._may_prefill_locally or not view.num_running_requests
                busy_decode_computes = True
            if computes and generates:
                return True
        # That there is nobody at all is for the scheduler to tell.
        return not any_decode or (generates and busy_decode_computes and not any_prefill)

    def has_workers(self) -> bool:
        return any(view.serves(self._model) for view in self._views())

    def tokens_per_s(self) -> float:
        serving = [view for view in self._views() if view.model == self._model and not view.draining]
        prefilling = [view for view in serving if view.prefills] or serving
        return sum(1.0 / (view.times.prefill_token_s or _LEAST_TOKEN_S) for view in prefilling)


def _takes_sequences(view: WorkerView) -> bool:
    if view.max_running_requests and view.num_running_requests >= view.max_running_requests * _SEQUENCES_AHEAD:
        return False
    return not view.capacity_tokens or view.num_context_tokens < view.capacity_tokens
