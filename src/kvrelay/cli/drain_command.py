"""The command `kvrelay drain`: a worker leaves, and no request is lost."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from kvrelay.cli.running import RunningClusterOption, RunningEtcdOption, etcd_and_cluster
from kvrelay.cli.worker_changes import left_over, worker_errors


def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its id, as `kvrelay workers` shows it.")],
    etcd: RunningEtcdOption = None,
    cluster: RunningClusterOption = None,
    drain_s: Annotated[
        float,
        typer.Option(
            "--within",
            min=0.0,
            max=86_400.0,
            help="How long its requests may go on there, seconds; before that is over they go on at other workers.",
        ),
    ] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Also when nobody is left to decode for its model.")] = False,
) -> None:
    """Have a worker leave the cluster without a lost request, and wait until it has left.

    It gets nothing new, finishes what it has, and hands over what would take too long. Its process ends then;
    `kvrelay up` and most supervisors start it again, which makes this a restart.

    Example: kvrelay drain decode-1 --within 20
    """
    from kvrelay.client.drain import Drain
    from kvrelay.client.drain import drain as leave

    addresses, name = etcd_and_cluster(etcd, cluster)
    request = Drain(worker_id=worker, drain_s=drain_s, force=force)
    with worker_errors(addresses):
        asyncio.run(leave([str(each) for each in addresses], name, request, left_over(worker, "requests")))
    print(f"{worker} has left")
