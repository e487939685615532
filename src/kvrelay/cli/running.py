"""Where is the cluster that `kvrelay up` runs on this machine?"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.failure import UNREACHABLE, fail
from kvrelay.cli.options import GRPC
from kvrelay.cli.parsing import Address, Addresses, parse_address, parse_addresses

if TYPE_CHECKING:
    from kvrelay.launch.state import RunningCluster

DEFAULT_CLUSTER = "default"

RunningEtcdOption = Annotated[
    Addresses | None,
    typer.Option(
        "--etcd",
        parser=parse_addresses,
        metavar="HOST:PORT[,HOST:PORT]",
        envvar="KVRELAY_ETCD",
        help="The cluster's etcd. Default: that of the `kvrelay up` running here.",
    ),
]
RunningClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", help="Name of the cluster in etcd. Default: that of the running `kvrelay up`."),
]


def running() -> RunningCluster | None:
    """The cluster that runs here now, if one does."""
    from kvrelay.launch.state import default_state_dir, running_cluster

    return running_cluster(default_state_dir(os.environ))


def coordinator_address() -> Address:
    """The gRPC address of the running `up`, or else the default one of a coordinator on this machine."""
    cluster = running()
    return parse_address(cluster.grpc_address) if cluster else GRPC


def etcd_and_cluster(etcd: Addresses | None, cluster: str | None) -> tuple[Addresses, str]:
    """What was given, completed from the running `up`. Leaves with a message when nobody knows where etcd is."""
    if etcd is not None:
        return etcd, cluster or DEFAULT_CLUSTER
    up = running()
    if up is None:
        fail("no `kvrelay up` runs here; name the cluster's etcd with --etcd HOST:PORT", UNREACHABLE)
    return Addresses(parse_address(address) for address in up.etcd), cluster or up.cluster
