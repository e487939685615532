"""Which fault strikes when? All follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.chaos.faults.armed import ARMED_FAULTS
from tests.chaos.faults.base import Fault
from tests.chaos.faults.clients import CancelBurst, SlowReader, Vanish
from tests.chaos.faults.network import LINK_FAULTS, FlipBits
from tests.chaos.faults.processes import (
    DrainCoordinator,
    DrainDecode,
    DrainPrefill,
    KillCoordinator,
    KillDecode,
    KillEtcd,
    KillPrefill,
    StopCoordinator,
    StopDecode,
    StopEtcd,
    StopPrefill,
)
from tests.chaos.faults.roles import ChangeRole
from tests.chaos.faults.store import Compact, Revoke, Wipe

_KINDS: Sequence[type[Fault]] = (
    *(KillPrefill, KillDecode, KillCoordinator, KillEtcd),
    *(DrainPrefill, DrainDecode, DrainCoordinator),
    *(StopPrefill, StopDecode, StopCoordinator, StopEtcd),
    *LINK_FAULTS,
    FlipBits,
    *(Wipe, Compact, Revoke),
    ChangeRole,
    *(CancelBurst, SlowReader, Vanish),
    *ARMED_FAULTS,
)
CATALOGUE = {kind.name: kind for kind in _KINDS}
"""Every kind, by name."""

EVERY_S = 5.0
COORDINATOR_REST_S = 30.0
"""Between two faults that end a coordinator: it takes half a minute to come back while the machine is busy."""
_ENDS_COORDINATORS = ("kill-coordinator", "drain-coordinator")


@dataclass(frozen=True, slots=True)
class Due:
    """A fault and its time since the load began."""

    at_s: float
    fault: Fault


def schedule(seed: int, seconds: float, names: Sequence[str] = (), every_s: float = EVERY_S) -> list[Due]:
    """One fault after the other, each at a random moment of its `every_s`; the first seconds belong to the load.

    Every kind comes once before any comes again. None strikes in the last seconds. Raises `KeyError` for a name that
    is none.
    """
    rng = random.Random(f"{seed} faults")
    kinds = [CATALOGUE[name] for name in names or CATALOGUE]
    deck = _deck(rng, kinds)
    postponed: list[type[Fault]] = []
    due: list[Due] = []
    coordinators_free_s = 0.0
    for number in range(int(seconds / every_s)):
        at_s = (number + rng.uniform(0.2, 0.8)) * every_s
        kind = postponed.pop(0) if postponed and at_s >= coordinators_free_s else next(deck)
        while kind.name in _ENDS_COORDINATORS and at_s < coordinators_free_s and len(kinds) > len(_ENDS_COORDINATORS):
            postponed.append(kind)
            kind = next(deck)
        if kind.name in _ENDS_COORDINATORS:
            coordinators_free_s = at_s + COORDINATOR_REST_S
        due.append(Due(at_s, kind(rng)))
    return due


def once_each(seed: int, names: Sequence[str] = ()) -> list[Due]:
    """Every kind once, in a random order; the times mean nothing. Raises like `schedule`."""
    rng = random.Random(f"{seed} faults in turn")
    kinds = [CATALOGUE[name] for name in names or CATALOGUE]
    return [Due(0.0, kind(rng)) for kind in rng.sample(kinds, len(kinds))]


def _deck(rng: random.Random, kinds: Sequence[type[Fault]]) -> Iterator[type[Fault]]:
    while True:
        yield from rng.sample(kinds, len(kinds))
