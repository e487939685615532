"""Which policies are there, by name?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.cost import CostScheduler
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.simple import (
    LeastLoadedScheduler,
    PrefixOnlyScheduler,
    RandomScheduler,
    RoundRobinScheduler,
    WeightedScheduler,
)

_KINDS = (
    CostScheduler,
    LeastLoadedScheduler,
    RoundRobinScheduler,
    WeightedScheduler,
    RandomScheduler,
    PrefixOnlyScheduler,
)
POLICIES: Mapping[str, Callable[[int, CostConfig | None], Scheduler]] = {kind.name: kind for kind in _KINDS}
"""The default first."""


def make_scheduler(name: str, seed: int = 0, config: CostConfig | None = None) -> Scheduler:
    """A scheduler in its first state: the same seed and requests lead to the same plans.

    Only "cost" goes by `config`; the others predict with it. Raises `ValueError` for an unknown name.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown; there are {', '.join(POLICIES)}")
    return POLICIES[name](seed, config)
