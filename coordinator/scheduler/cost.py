"""Which plan costs least? The default policy.

    ttft(p, d) = wait(p) + prefill(tokens not stored at p) + what of the transfer to d is not hidden behind that
    gap(p, d)  = that transfer + loading the prompt's blocks at d + d's wait that is longer than the ttft
    cost(p, d) = ttft(p, d) + gap(p, d) and the other times between tokens, weighted + what others lose, weighted

Others lose when more prompts follow at p, when d's steps take longer with one more sequence, and when d computes the
prompt itself and its sequences stand still meanwhile. Where d computes the prompt itself there is no such gap.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from operator import itemgetter

from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.coordinator.scheduler.eligible import eligible_groups
from kvrelay.coordinator.scheduler.option import Candidates, Option
from kvrelay.coordinator.scheduler.pairing import Pairing
from kvrelay.coordinator.scheduler.targets import too_late, within_targets
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView

_by_cost = itemgetter(0)
_MAX_OTHERS = 5


class CostScheduler(Scheduler):
    """Takes the cheapest plan that meets the targets; of plans as good as equal the less loaded of two at random."""

    name = "cost"

    def __init__(self, seed: int = 0, config: CostConfig | None = None) -> None:
        self._random = random.Random(seed).random  # noqa: S311
        self._config = config or CostConfig()
        self.may_prefill_locally = self._config.local_prefill != "never"

    def plan(self, request: RequestShape, workers: Sequence[WorkerView]) -> Decision:
        """See `Scheduler.plan`."""
        config, chance = self._config, self._random
        pairings = [Pairing(request, group, config, chance) for group in eligible_groups(request, workers)]
        options = [option for pairing in pairings for option in pairing.best()]
        left = within_targets(options, request)
        if not left:
            options = [option for pairing in pairings for option in pairing.all_in_time()]
            left = within_targets(options, request)
        if not left:
            raise too_late(options, request)
        chosen = self._choose(left)
        others = [option for option in sorted(options, key=_by_cost)[: _MAX_OTHERS + 1] if option is not chosen]
        return Decision(
            plan=chosen.plan(),
            policy=self.name,
            basis="lowest cost",
            num_prompt_tokens=request.num_prompt_tokens,
            chosen=chosen.candidate(),
            others=Candidates(others[:_MAX_OTHERS]),
        )

    def _choose(self, options: Sequence[Option]) -> Option:
        """Of two random ones that are near the best: all coordinators would send their requests to the very best."""
        best = min(options, key=_by_cost)
        limit = best.cost + max(self._config.near_s, self._config.near_share * best.ttft_s)
        near = [option for option in options if option.cost <= limit]
        # A small share of a long prompt's time is all that a short one takes: first comes who has nothing to compute.
        near = [option for option in near if not option.prompt.worker.num_queued_prompt_tokens] or near
        if len(near) == 1:
            return near[0]
        one, other = (near[int(self._random() * len(near))] for _ in range(2))
        return min(one, other, key=_load)


def _load(option: Option) -> tuple[float, int, int]:
    prompt, decode = option.prompt.worker, option.decode.worker
    num_assigned = decode.num_assigned if option.is_local else prompt.num_assigned + decode.num_assigned
    return option.prompt.wait_s, decode.num_running_requests, num_assigned
