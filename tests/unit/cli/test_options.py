"""Do options offer what there is?"""

from __future__ import annotations

from typing import get_args, get_type_hints

from kvrelay.cli.options import LocalPrefill, Policy
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.policies import POLICIES


def test_every_policy_can_be_asked_for() -> None:
    assert list(Policy) == list(POLICIES)


def test_every_way_of_local_prefill_can_be_asked_for() -> None:
    assert list(LocalPrefill) == list(get_args(get_type_hints(CostConfig)["local_prefill"]))
