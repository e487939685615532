"""Where is the cluster that `kvrelay up` runs on this machine?"""

from __future__ import annotations

from kvrelay.cli.failure import UNREACHABLE, fail
from kvrelay.cli.options import GRPC
from kvrelay.cli.parsing import Address, Addresses


def running_coordinator() -> Address:
    """The gRPC address of the running `up`, or else the default one of a coordinator on this machine."""
    return GRPC


def running_etcd() -> Addresses:
    """The etcd of the running `up`; without one this command cannot know where to look, and says so."""
    fail("no `kvrelay up` runs here; name the cluster's etcd with --etcd HOST:PORT", UNREACHABLE)
