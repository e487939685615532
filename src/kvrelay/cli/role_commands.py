"""The commands under `kvrelay role`: what is a running worker for?"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.parsing import Addresses
from kvrelay.cli.running import RunningClusterOption, RunningEtcdOption, etcd_and_cluster
from kvrelay.cli.worker_changes import left_over, worker_errors

if TYPE_CHECKING:
    from kvrelay.client.roles import RoleChange


class RoleName(StrEnum):
    """As in `kvrelay workers`."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


role_app = typer.Typer(
    name="role",
    help=(
        "Change what running workers are for.\n\n"
        "A prefill worker computes prompts, a decode worker generates, and one with both roles does either, as each"
        " request is planned. `kvrelay workers` shows the roles."
    ),
    no_args_is_help=True,
)


@role_app.callback()
def role() -> None:
    """Keeps `set` a command of its own although it is the only one."""


@role_app.command("set")
def set_role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its id, as `kvrelay workers` shows it.")],
    role: Annotated[RoleName, typer.Argument(metavar="prefill|decode|both", help="The new role.")],
    etcd: RunningEtcdOption = None,
    cluster: RunningClusterOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also when nobody is left to decode for its model.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Longest wait for the old role's requests, seconds.")
    ] = 60.0,
) -> None:
    """Give a worker another role while it serves, and wait until its requests under the old one are done.

    No request is lost: what was on its way under the old role is served. A restart brings back the role that the
    worker was started with.

    Example: kvrelay role set decode-1 prefill
    """
    from kvrelay.client.roles import RoleChange
    from kvrelay.v1 import cluster_pb2

    new = cluster_pb2.Role.Value(f"ROLE_{role.name}")
    change = RoleChange(worker_id=worker, role=new, force=force, timeout_s=timeout_s)
    was = _change(*etcd_and_cluster(etcd, cluster), change)
    print(f"{worker}: {was} -> {role}; nothing of the old role is left to do")


def _change(etcd: Addresses, cluster: str, change: RoleChange) -> str:
    """Name of the old role. Leaves with a message when it cannot be, or takes too long."""
    from kvrelay.client.roles import set_role
    from kvrelay.client.workers import role_name

    addresses = [str(address) for address in etcd]
    progress = left_over(change.worker_id, "requests of the old role")
    with worker_errors(etcd):
        return role_name(asyncio.run(set_role(addresses, cluster, change, progress)))
