"""etcd loses what it knows: everything, its history, or one member's lease."""

from __future__ import annotations

import random
from contextlib import suppress

from kvrelay.etcd import EtcdError
from kvrelay.membership.records import coordinator_key, worker_key
from tests.chaos.etcd_member import WIPE
from tests.chaos.faults.base import Fault, Lab
from tests.chaos.faults.processes import Kill
from tests.chaos.members import CLUSTER, COORDINATORS, ETCD, WORKERS


class Wipe(Kill):
    """Killed, and started again as an empty cluster at the same address."""

    name, members = "wipe-etcd", (ETCD,)

    async def inject(self, lab: Lab) -> None:
        (lab.cluster.directory / ETCD / WIPE).touch()
        await super().inject(lab)


class Compact(Fault):
    """Everything before this moment is forgotten: watches that were behind must read all again."""

    name, target = "compact-etcd", ETCD

    def __init__(self, rng: random.Random) -> None:
        """Nothing is drawn."""

    async def inject(self, lab: Lab) -> None:
        with suppress(EtcdError):
            async with lab.cluster.etcd() as client:
                await client.compact((await client.list_prefix(b"/")).revision)


class Revoke(Fault):
    """A member's lease ends while it lives."""

    name = "revoke-lease"

    def __init__(self, rng: random.Random) -> None:
        self.target = rng.choice((*WORKERS, *COORDINATORS))

    async def inject(self, lab: Lab) -> None:
        make_key = coordinator_key if self.target in COORDINATORS else worker_key
        with suppress(EtcdError):
            async with lab.cluster.etcd() as client:
                for entry in (await client.list_prefix(make_key(CLUSTER, self.target))).entries:
                    await client.revoke_lease(entry.lease)
