"""Links that hold bytes back, break, are slow, lose packets, or change bits."""

from __future__ import annotations

import random
from collections.abc import Collection

from tests.chaos.faults.base import Fault, Lab
from tests.chaos.links import Corruption, Delay, Harm, Lossy, Partition
from tests.chaos.members import COORDINATORS, DECODE, OVER_GRPC, PREFILL, WORKERS

LINKS = {
    "worker": [f"{name}.grpc" for name in WORKERS],
    "kv": [f"{name}.kv" for name in (*DECODE, *DECODE, *PREFILL)],
    "etcd": [f"{name}.etcd" for name in (*COORDINATORS, *WORKERS)],
    "client": [f"{name}.{kind}" for name in COORDINATORS for kind in ("grpc", "http")],
}
"""By who is at the other end, or by what is sent; decode workers get far more blocks than others."""
_DEAD_S = 30.0
"""gRPC's keepalive takes 15 to 25 s to notice a peer that is silent."""


class LinkFault(Fault):
    """Hits one link of a kind."""

    kind: str

    def __init__(self, rng: random.Random) -> None:
        self.target = rng.choice(LINKS[self.kind])
        self.rng = random.Random(rng.random())

    @property
    def coordinators(self) -> Collection[str]:
        return {self.target.partition(".")[0]} & set(COORDINATORS) if self.kind == "client" else ()


class HarmFault(LinkFault):
    """Something is imposed on the link for a while."""

    longest_s = 8.0

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.hold_s = rng.uniform(1.0, self.longest_s)
        self._harm = self.make(random.Random(rng.random()))

    def make(self, rng: random.Random) -> Harm:
        """What is imposed."""
        raise NotImplementedError

    async def inject(self, lab: Lab) -> None:
        lab.cluster.links[self.target].impose(self._harm)

    async def heal(self, lab: Lab) -> None:
        lab.cluster.links[self.target].lift(self._harm)


class PartitionLink(HarmFault):
    """Bytes are held and connections stay open: all of them, or about half of those that there are.

    One of four lasts until the peer is taken for dead, but not where that is a client's coordinator.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        if rng.random() < 0.25 and self.kind != "client":
            self.hold_s = _DEAD_S

    def make(self, rng: random.Random) -> Harm:
        harm, whole, parity = Partition(), rng.random() < 0.5, rng.randrange(2)
        harm.touches = lambda connection: whole or connection.number % 2 == parity
        return harm


class DelayLink(HarmFault):
    """50 to 300 ms more each way."""

    def make(self, rng: random.Random) -> Harm:
        return Delay(rng.uniform(0.05, 0.3))


class LossyLink(HarmFault):
    """Stalls, as from packets that are sent again."""

    def make(self, rng: random.Random) -> Harm:
        return Lossy(rng)


class ResetLink(LinkFault):
    """RST on every connection of the moment."""

    async def inject(self, lab: Lab) -> None:
        lab.cluster.links[self.target].reset()


class FlipBits(HarmFault):
    """Only on the way of frames, which have checksums: commands are protected by TCP alone, as everywhere."""

    name, kind = "flip-kv", "kv"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.target = f"{OVER_GRPC}.kv"

    def make(self, rng: random.Random) -> Harm:
        return Corruption(rng)


def _named(base: type[LinkFault], verb: str, kind: str) -> type[LinkFault]:
    return type(f"{base.__name__}_{kind}", (base,), {"name": f"{verb}-{kind}", "kind": kind})


LINK_FAULTS = [
    _named(base, verb, kind)
    for verb, base in (("partition", PartitionLink), ("reset", ResetLink), ("delay", DelayLink), ("lossy", LossyLink))
    for kind in LINKS
]
"""Each harm on each kind of link."""
