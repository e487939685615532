"""`kvrelay explain`: why did a request go where it went?"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.failure import FAILED, UNREACHABLE, fail
from kvrelay.cli.parsing import Addresses
from kvrelay.cli.running import RunningClusterOption, RunningEtcdOption, etcd_and_cluster

if TYPE_CHECKING:
    from rich.table import Table

    from kvrelay.v1 import cluster_pb2, inference_pb2


def explain(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST", help="Its id: the answer's, or its X-Request-Id.")],
    etcd: RunningEtcdOption = None,
    cluster: RunningClusterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Show where a request of late was sent, what the scheduler expected, and what the other ways would have cost.

    Coordinators remember some thousand requests. Over HTTP the same comes with an answer: send `x-kvrelay-explain: 1`.

    Example: kvrelay explain chatcmpl-8f2c
    """
    coordinator, decision = _ask(*etcd_and_cluster(etcd, cluster), request_id)
    if as_json:
        from google.protobuf.json_format import MessageToJson

        print(MessageToJson(decision, preserving_proto_field_name=True))
        return
    from rich.console import Console

    console = Console()
    ago_s = max(0.0, time.time() - decision.unix_ns / 1e9)
    queued = f", after {decision.queued_s:.3f} s in the queue" if decision.queued_s else ""
    console.print(
        f"{decision.request_id}: planned {ago_s:.0f} s ago by {coordinator.coordinator_id}, policy "
        f"{decision.policy}{queued}",
        highlight=False,
    )
    console.print(decision.reason, highlight=False)
    console.print(_table(decision))


def _ask(etcd: Addresses, cluster: str, request_id: str) -> tuple[cluster_pb2.CoordinatorInfo, inference_pb2.Decision]:
    """Leaves with a message when nobody knows."""
    from kvrelay.client.explain import NotExplainedError
    from kvrelay.client.explain import explain as ask
    from kvrelay.etcd import EtcdError

    try:
        return asyncio.run(ask([str(address) for address in etcd], cluster, request_id))
    except EtcdError as error:
        fail(str(error), UNREACHABLE)
    except NotExplainedError as error:
        fail(str(error), FAILED)


def _table(decision: inference_pb2.Decision) -> Table:
    """The chosen way first."""
    from rich.table import Table

    table = Table(title=f"ways for its {decision.num_prompt_tokens} prompt tokens; times as predicted, in seconds")
    for name in ("prefill", "decode"):
        table.add_column(name)
    for name in ("wait", "prefill s", "transfer", "TTFT", "ITL", "cached", "stored", "cost"):
        table.add_column(name, justify="right")
    for number, way in enumerate(decision.candidates):
        times = (way.wait_s, way.prefill_s, way.transfer_s, way.ttft_s, way.itl_s)
        counts = (way.num_cached_tokens, way.num_stored_tokens)
        table.add_row(
            way.prefill_worker_id or "(decode worker)",
            way.decode_worker_id,
            *(f"{seconds:.3f}" for seconds in times),
            *map(str, counts),
            way.excluded or f"{way.cost:.3f}",
            style="" if number else "bold",
        )
    return table
